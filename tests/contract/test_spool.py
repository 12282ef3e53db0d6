"""What the spool promises: committed is kept, nothing is unbounded, one outcome for each request."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from llmos.events.v1 import events_pb2

from services.mesh import event_codec
from services.mesh.audit_protocol import START, HeldEpoch, Place
from services.mesh.clock import ManualClock
from services.mesh.errors import AuditUnavailable, StateConflict
from services.mesh.event_codec import IntentRead, OtherRead, OutcomeRead
from services.mesh.events import EngineChange, EngineChanged, Outcome
from services.mesh.spool import Spool
from tests.framework.audit_path import ended, make_spool, running, serve, started
from tests.framework.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


async def events(spool: Spool) -> list[event_codec.EventRead]:
    """All that the spool holds, as it would be published."""
    held = await spool.read_after(START, 100_000, 1 << 30)
    return [
        event_codec.read(
            event_codec.complete(
                each.body, spool.producer, each.place, spool.ledger.floor(each.place.epoch), each.outcome_of
            )
        )
        for each in held
    ]


def story(found: list[event_codec.EventRead]) -> list[tuple[Place, str]]:
    """Places, and what happened there."""
    told = []
    for event in found:
        match event.record:
            case IntentRead(request_id=request_id):
                told.append((event.place, f"{request_id} started"))
            case OutcomeRead(request_id=request_id, outcome=outcome):
                told.append((event.place, f"{request_id} {Outcome(outcome).name}"))
            case OtherRead(kind=kind):
                told.append((event.place, kind))
    return told


def gaps(found: list[event_codec.EventRead]) -> list[tuple[int, int]]:
    """(dropped, refused) of each gap record."""
    others = [event.record for event in found if isinstance(event.record, OtherRead)]
    records = [events_pb2.AuditRecorded.FromString(other.body) for other in others if other.kind == "gap"]
    return [(record.gap.dropped, record.gap.refused) for record in records]


async def test_events_have_places_without_a_gap_and_outcomes_their_own_id(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.db")
    async with running(spool):
        await serve(spool, "a")
        await spool.append_ended(ended("refused", Outcome.REJECTED))
        await spool.append_other(EngineChanged(EngineChange.LOADED, "echo"))
        assert story(await events(spool)) == [
            (Place(1, 1), "a started"),
            (Place(1, 2), "a SUCCEEDED"),
            (Place(1, 3), "refused REJECTED"),
            (Place(1, 4), "engine"),
        ]
        held = await spool.read_after(START, 10, 1 << 20)
        values = [
            events_pb2.EventEnvelope.FromString(
                event_codec.complete(each.body, spool.producer, each.place, 1, each.outcome_of)
            )
            for each in held
        ]
        assert [each.id for each in values] == [
            f"{spool.producer}/1/1",
            "outcome/a",
            "outcome/refused",
            f"{spool.producer}/1/4",
        ]
        assert {each.producer for each in values} == {spool.producer}


async def test_a_name_is_made_once_and_each_life_is_an_epoch(tmp_path: Path) -> None:
    names = []
    for life in (1, 2, 3):
        spool = make_spool(tmp_path / "spool.db")
        async with running(spool):
            assert spool.ledger.epoch == life
            names.append(spool.producer)
            await serve(spool, f"r{life}")
    assert len(set(names)) == 1
    other = make_spool(tmp_path / "lost-and-new.db")
    async with running(other):
        assert other.producer not in names
        assert other.producer.startswith("gateway-0-")


async def test_what_a_dead_process_left_open_is_closed_as_aborted(tmp_path: Path) -> None:
    first = make_spool(tmp_path / "spool.db")
    async with running(first):
        await serve(first, "done")
        for request_id in ("left", "too"):
            await first.append_started(started(request_id))
    second = make_spool(tmp_path / "spool.db")
    async with running(second):
        assert story(await events(second))[-2:] == [
            (Place(2, 1), "left ABORTED"),
            (Place(2, 2), "too ABORTED"),
        ]
        aborted = events_pb2.RequestEnded.FromString((await events(second))[-1].record.body)
        assert aborted.facts.identity.tenant_id == "tenant-a"
        report = second.report()
        assert report.held == (HeldEpoch(1, 1, 4), HeldEpoch(2, 1, 2))
        assert report.settled_before == Place(2, 3)
    third = make_spool(tmp_path / "spool.db")
    async with running(third):
        assert len(await events(third)) == 6, "closed once"


async def test_a_second_intent_or_outcome_is_refused(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.db")
    async with running(spool):
        await spool.append_started(started("a"))
        with pytest.raises(StateConflict):
            await spool.append_started(started("a"))
        results = await asyncio.gather(
            *(spool.append_ended(ended("a")) for _ in range(3)), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in results) == [
            "NoneType",
            "StateConflict",
            "StateConflict",
        ]
        with pytest.raises(StateConflict):
            await spool.append_ended(ended("a", Outcome.FAILED))
        assert [what for _, what in story(await events(spool))] == ["a started", "a SUCCEEDED"]
        assert spool.ledger.events == 2


async def test_trimming_keeps_what_is_above(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.db")
    async with running(spool):
        await serve(spool, "a", "b")
        assert await spool.trim({1: 3}) == 3
        assert story(await events(spool)) == [(Place(1, 4), "b SUCCEEDED")]
        assert spool.report().held == (HeldEpoch(1, 4, 4),)
        await spool.begin_epoch(5)
        await serve(spool, "c")
        assert spool.report().held == (HeldEpoch(1, 4, 4), HeldEpoch(5, 1, 2))
        assert await spool.trim({1: 4, 5: 2}) == 3
        assert (spool.ledger.events, spool.ledger.bytes) == (0, 0)
        assert spool.report().settled_before == Place(5, 3)
    again = make_spool(tmp_path / "spool.db")
    async with running(again):
        assert again.ledger.epoch == 6


async def test_a_second_process_is_refused_with_a_sentence(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.db")
    async with running(spool):
        other = make_spool(tmp_path / "spool.db")
        with pytest.raises(OSError, match="in use by another process"):
            await other.start()
        await other.stop()


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
async def test_a_damaged_file_is_refused_with_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spool.db"
    path.write_bytes(content)
    spool = make_spool(path)
    with pytest.raises(OSError, match=r"spool\.db.*move it away"):
        await spool.start()
    await spool.stop()
    assert path.read_bytes() == content


async def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE other (x)")
    spool = make_spool(path)
    with pytest.raises(OSError, match="no spool of this version"):
        await spool.start()
    await spool.stop()


async def test_r29_a_full_spool_drops_with_an_exact_count_and_keeps_room_for_outcomes(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = make_spool(tmp_path / "spool.db", clock, max_events=20)
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
    spool = make_spool(tmp_path / "spool.db", mode="strict", max_events=4)
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
    spool = make_spool(tmp_path / "spool.db", max_events=2)
    async with running(spool):
        await spool.append_started(started("a"))
        for number in range(7):
            await spool.append_started(started(f"r{number}"))
    again = make_spool(tmp_path / "spool.db")
    async with running(again):
        await again.trim({1: 1})
        await eventually(lambda: again.ledger.held_events == 2)
        assert gaps(await events(again)) == [(7, 0)]


async def test_the_spool_is_bounded_in_bytes(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.db", max_bytes=64 * 1024)
    async with running(spool):
        for number in range(500):
            await spool.append_started(started(f"r{number}"))
        assert spool.ledger.bytes <= 64 * 1024
        assert spool.turned_away > 300
        for number in range(500):
            await spool.append_ended(ended(f"r{number}"))
    assert size_of(tmp_path) < 6 * 64 * 1024


async def test_r25_anonymous_refusals_are_counted_not_kept(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = make_spool(tmp_path / "spool.db", clock, anonymous_interval_s=60.0, max_anonymous=100)
    async with running(spool):
        for number in range(100_000):
            spool.count_anonymous(f"2001:db8::{number % 5000:x}", "CREDENTIAL_MISSING")
        assert spool.ledger.events == 0
        await clock.advance(61)
        await eventually(lambda: spool.ledger.held_events == 101)
        records = [events_pb2.AuditRecorded.FromString(each.record.body) for each in await events(spool)]
        counts = {each.anonymous_rejected.source_address: each.anonymous_rejected.count for each in records}
        assert sum(counts.values()) == 100_000
        assert counts["other"] == 100_000 - 100 * 20


async def test_counts_of_anonymous_refusals_are_written_at_a_stop(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.db")
    async with running(spool):
        spool.count_anonymous("192.0.2.1", "CREDENTIAL_INVALID")
    again = make_spool(tmp_path / "spool.db")
    async with running(again):
        assert [what for _, what in story(await events(again))] == ["anonymous_rejected"]


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
    path = tmp_path / "spool.db"
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
    path = tmp_path / "spool.db"
    spool = make_spool(path, mode="strict")
    async with running(spool):

        async def fill() -> None:
            for number in range(20_000):
                await spool.append_started(started(f"r{number}"))

        with disk_full(path), pytest.raises(AuditUnavailable):
            await fill()
        await spool.append_started(started("after"))
        assert [what for _, what in story(await events(spool))].count("after started") == 1


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.framework.audit_path import ended, make_spool, started

async def main() -> None:
    spool = make_spool(Path(sys.argv[1]), mode=sys.argv[2])
    await spool.start()

    async def work(worker: int) -> None:
        number = 0
        while True:
            request_id = f"{spool.ledger.epoch}-{worker}-{number}"
            await spool.append_started(started(request_id))
            print("S", request_id, flush=True)
            if number % 3:
                await spool.append_ended(ended(request_id))
                print("E", request_id, flush=True)
            number += 1

    await asyncio.gather(*(work(worker) for worker in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["permissive", "strict"])
async def test_r30_what_was_acknowledged_survives_sigkill(tmp_path: Path, mode: str) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    path = tmp_path / "spool.db"
    begun: set[str] = set()
    done: set[str] = set()
    for _ in range(4):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(path), mode, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos' / 'gen'}"},
        )  # fmt: skip
        assert process.stdout is not None
        lines = [await process.stdout.readline() for _ in range(rng.randrange(5, 400))]
        process.send_signal(signal.SIGKILL)
        rest = await process.stdout.read()
        await process.wait()
        # The last line may be torn.
        for line in (b"".join(lines) + rest).split(b"\n")[:-1]:
            kind, _, request_id = line.decode().partition(" ")
            (begun if kind == "S" else done).add(request_id)
    spool = make_spool(path)
    async with running(spool):
        found = await events(spool)
        places = [event.place for event in found]
        assert places == sorted(places)
        for epoch in range(1, 6):
            sequences = [place.sequence for place in places if place.epoch == epoch]
            assert sequences == list(range(1, len(sequences) + 1))
        intents = {event.record.request_id for event in found if isinstance(event.record, IntentRead)}
        results = [event.record for event in found if isinstance(event.record, OutcomeRead)]
        outcomes = {record.request_id: Outcome(record.outcome) for record in results}
        assert len(outcomes) == len(results), "one outcome for each"
        assert intents == set(outcomes), "none is open"
        assert begun <= intents
        assert all(outcomes[request_id] is Outcome.SUCCEEDED for request_id in done)


@pytest.mark.parametrize("mode", ["permissive", "strict"])
async def test_a_disk_that_hangs_holds_no_caller(tmp_path: Path, mode: str) -> None:
    spool = make_spool(tmp_path / "spool.db", mode=mode, append_timeout_s=0.05)
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


async def test_a_caller_that_is_cancelled_leaves_the_intent_to_its_outcome(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.db")
    async with running(spool):
        task = asyncio.ensure_future(spool.append_started(started("a")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await spool.append_ended(ended("a", Outcome.CANCELLED))
        assert [what for _, what in story(await events(spool))] == ["a started", "a CANCELLED"]
        assert not spool.ledger.open
