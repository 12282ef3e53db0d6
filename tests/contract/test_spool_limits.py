"""A spool that is full, a disk that is full or hangs: counted exactly, and no admitted outcome is lost."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.mesh.clock import ManualClock
from services.mesh.errors import AuditUnavailable
from services.mesh.events import Outcome
from tests.framework.audit_path import ended, make_spool, running, started
from tests.framework.spool_story import events, gaps, story
from tests.framework.waiting import eventually


async def test_r29_a_full_spool_drops_with_an_exact_count_and_keeps_room_for_outcomes(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = make_spool(tmp_path / "spool", clock, max_events=20)
    async with running(spool):
        for number in range(30):
            await spool.append_started(started(f"r{number}"))
        assert spool.turned_away == 20
        for number in range(30):
            await spool.append_ended(ended(f"r{number}"))
        # Ten intents took their outcomes' room along; the others' outcomes found none.
        assert spool.turned_away == 40
        told = [what for _, what in story(await events(spool))]
        assert told == [f"r{n} started" for n in range(10)] + [f"r{n} SUCCEEDED" for n in range(10)]
        await spool.trim({1: 5})
        await eventually(lambda: spool.ledger.held_events == 16)
        assert gaps(await events(spool)) == [(40, 0)]
        await clock.advance(5)
        assert gaps(await events(spool)) == [(40, 0)], "once"


async def test_r29_a_strict_spool_refuses_and_counts(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool", mode="strict", max_events=4)
    async with running(spool):
        await spool.append_started(started("a"))
        await spool.append_started(started("b"))
        for _ in range(3):
            with pytest.raises(AuditUnavailable):
                await spool.append_started(started("c"))
        with pytest.raises(AuditUnavailable):
            await spool.append_ended(ended("c", Outcome.REJECTED))
        await spool.append_ended(ended("a"))
        await spool.append_ended(ended("b"))
        await spool.trim({1: 4})
        await eventually(lambda: spool.ledger.held_events == 1)
        assert gaps(await events(spool)) == [(0, 4)]


async def test_r29_the_count_of_what_was_dropped_survives_a_crash(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool", max_events=2)
    async with running(spool):
        await spool.append_started(started("a"))
        for number in range(7):
            await spool.append_started(started(f"r{number}"))
    again = make_spool(tmp_path / "spool")
    async with running(again):
        await again.trim({1: 1})
        await eventually(lambda: again.ledger.held_events == 2)
        assert gaps(await events(again)) == [(7, 0)]


async def test_the_spool_is_bounded_in_bytes(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool", max_bytes=64 * 1024)
    async with running(spool):
        for number in range(500):
            await spool.append_started(started(f"r{number}"))
        assert spool.ledger.bytes <= 64 * 1024
        assert spool.turned_away > 300
        for number in range(500):
            await spool.append_ended(ended(f"r{number}"))
    assert size_of(tmp_path) < 6 * 64 * 1024


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@contextmanager
def disk_full(path: Path) -> Iterator[None]:
    """No file of this process can grow beyond the spool's present size: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = max(file.stat().st_size for file in path.parent.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_r29_a_full_disk_drops_and_counts_and_loses_no_outcome(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    spool = make_spool(path)
    async with running(spool):
        await spool.append_started(started("before"))
        with disk_full(path):
            number = 0
            while not spool.turned_away:
                await spool.append_started(started(f"r{number}"))
                number += 1
                assert number < 20_000
            await spool.append_ended(ended("before"))
            await spool.append_ended(ended("r0"))
        await eventually(lambda: not {"before", "r0"} & set(spool.ledger.open))
        await spool.append_started(started("after"))
        await eventually(lambda: bool(spool.ledger.held_events), what="the gap is recorded")
        told = [what for _, what in story(await events(spool))]
        assert told.count("before SUCCEEDED") == 1
        assert told.count("r0 SUCCEEDED") == 1
        assert told.count("after started") == 1

        async def recorded() -> bool:
            return bool(gaps(await events(spool)))

        await eventually(recorded)
        dropped = sum(dropped for dropped, _ in gaps(await events(spool)))
        assert dropped == spool.turned_away
        found = await events(spool)
        assert [event.place.sequence for event in found] == list(range(1, len(found) + 1))
        assert spool.ledger.held_events == len(found)


async def test_r29_a_full_disk_refuses_where_strict(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    spool = make_spool(path, mode="strict")
    async with running(spool):

        async def fill() -> None:
            for number in range(20_000):
                await spool.append_started(started(f"r{number}"))

        with disk_full(path), pytest.raises(AuditUnavailable):
            await fill()
        await spool.append_started(started("after"))
        assert [what for _, what in story(await events(spool))].count("after started") == 1


@pytest.mark.parametrize("mode", ["permissive", "strict"])
async def test_a_disk_that_hangs_holds_no_caller(tmp_path: Path, mode: str) -> None:
    spool = make_spool(tmp_path / "spool", mode=mode, append_timeout_s=0.05)
    async with running(spool):
        disk_works = threading.Event()
        hanging = asyncio.ensure_future(spool._writer.call(disk_works.wait))
        await asyncio.sleep(0)  # it comes first
        try:
            if mode == "strict":
                with pytest.raises(AuditUnavailable):
                    await spool.append_started(started("a"))
            else:
                await spool.append_started(started("a"))
            await spool.append_ended(ended("a"))
        finally:
            disk_works.set()
        await hanging
        await eventually(lambda: spool.ledger.held_events == 2)
        assert [what for _, what in story(await events(spool))] == ["a started", "a SUCCEEDED"]
        assert spool.turned_away == 0
