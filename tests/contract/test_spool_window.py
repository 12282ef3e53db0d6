"""Events that are put into the window of the spool's file by the event loop, beside what the thread does."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.mesh import spool_recent, spool_segments, spool_window
from services.mesh.audit_protocol import START, Place
from services.mesh.spool_file import SpoolFile
from services.mesh.spool_frames import Append, Group
from services.mesh.spool_recent import Recent
from tests.framework.audit_path import ended, make_spool, running, serve, started
from tests.framework.job_events import job
from tests.framework.spool_story import events, story
from tests.framework.waiting import eventually

NOW = datetime(2030, 1, 1, tzinfo=UTC)


async def test_an_event_is_with_the_system_when_the_call_returns(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "first")
        assert spool.append_started(started("a"), urgent=False).done()
        assert spool.append_ended(ended("a")).done()
        assert spool.append_started(started("b"), urgent=False).done()
        shutil.copytree(tmp_path / "spool", tmp_path / "copy")
    again = make_spool(tmp_path / "copy")
    async with running(again):
        told = [what for _, what in story(await events(again))]
        assert told[2:] == ["a started", "a SUCCEEDED", "b started", "b ABORTED"]


async def test_in_strict_mode_it_is_synced_first(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool", mode="strict")
    async with running(spool):
        await serve(spool, "first")
        intent = spool.append_started(started("a"))
        assert not intent.done()
        await intent


async def test_more_than_a_window_takes_goes_by_the_thread_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_window, "WINDOW_BYTES", 16384)
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "first")
        waiting = [spool.append_started(started(f"r{n}")) for n in range(100)]
        waiting += [spool.append_ended(ended(f"r{n}")) for n in range(100)]
        at_once = sum(each.done() for each in waiting)
        assert 5 < at_once < 100
        await asyncio.gather(*waiting)
        found = story(await events(spool))
        assert [place.sequence for place, _ in found] == list(range(1, 203))
        assert [what for _, what in found[2:]] == [f"r{n} started" for n in range(100)] + [
            f"r{n} SUCCEEDED" for n in range(100)
        ]
        assert spool.append_started(started("then")).done(), "the window is prepared again"


async def test_a_window_that_is_old_is_renewed_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "first")
        with monkeypatch.context() as patch:
            patch.setattr("services.mesh.spool_writer.WINDOW_S", -1.0)
            assert not spool.append_started(started("a")).done()
        await spool.append_ended(ended("a"))
        assert spool.append_started(started("b")).done()


async def test_what_came_while_the_thread_was_busy_is_put_when_it_is_not(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "first")
        free = threading.Event()
        busy = asyncio.ensure_future(spool._writer.call(free.wait))
        await eventually(lambda: bool(spool._writer._with_thread))
        waiting = [spool.append_started(started("a"))]
        waiting.append(spool.append_started(started("b"), urgent=False))
        assert not any(each.done() for each in waiting)
        group = spool._writer._group
        free.set()
        await asyncio.gather(busy, *waiting)
        assert [what for _, what in story(await events(spool))][2:] == ["a started", "b started"]
        assert spool._writer._group == group + 1, (
            "the thread was asked to read, by this test, and for nothing else"
        )


async def test_a_job_that_came_meanwhile_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    class Disk:
        def __getattr__(self, name: str) -> Any:
            if name == "fdatasync":
                return self.sync
            return getattr(os, name)

        def sync(self, fd: int) -> None:
            os.fdatasync(fd)
            synced.append(fd)

    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "first")
        monkeypatch.setattr(spool_segments, "os", Disk())
        free = threading.Event()
        busy = asyncio.ensure_future(spool._writer.call(free.wait))
        await eventually(lambda: bool(spool._writer._with_thread))
        appended = spool.append_job(job("job_1"))
        free.set()
        await asyncio.gather(busy, appended)
        assert len(synced) == 1


async def test_a_process_that_stops_leaves_nothing_behind_the_last_event(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "a")
        assert spool.append_started(started("b")).done()
        assert spool.append_ended(ended("b")).done()
    (segment,) = spool_segments.found(tmp_path / "spool")
    assert len([frame for frame, _ in segment.frames() if isinstance(frame, Group)]) >= 3


@pytest.mark.parametrize(("rest", "is_told"), [(b"", False), (bytes(100), False), (b"\x05\0\0\0half", True)])
async def test_what_stands_behind_the_last_event_is_cut_off(
    rest: bytes, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Zeros are what a process leaves that did not stop; anything else is told."""
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "a")
        shutil.copytree(tmp_path / "spool", tmp_path / "copy")
    (segment,) = (tmp_path / "copy").glob("*.log")
    content = segment.read_bytes().rstrip(b"\0")
    # The last event's frame ends with a zero.
    segment.write_bytes(content + b"\0" + rest)
    again = make_spool(tmp_path / "copy")
    with caplog.at_level(logging.WARNING):
        async with running(again):
            assert [what for _, what in story(await events(again))] == ["a started", "a SUCCEEDED"]
    assert ("no whole group" in caplog.text) is is_told


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "trim", "epoch", "read"]), st.integers(0, 12), st.integers(1, 9)
    ),
    max_size=60,
)


@given(steps=STEPS)
def test_what_is_read_from_memory_is_what_stands_in_the_files(steps: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_recent, "MAX_RECENT_BYTES", 90)
        file = SpoolFile(Path(folder) / "spool", source="gateway", instance="test", durable=False)
        file.open(NOW)
        recent = Recent()
        epoch, last = 1, 0
        for kind, number, count in steps:
            mark = Place(epoch, max(0, last - number)) if number < 12 else START
            if kind == "add":
                last += 1
                event = Append(f"event {last}".encode() * count, 1.0, outcome_of=f"req_{epoch}_{last}")
                (place,) = file.append([event])
                assert place == Place(epoch, last)
                recent.add(event, place)
            elif kind == "trim":
                file.trim({mark.epoch: mark.sequence})
                recent.forget(mark)
            elif kind == "epoch":
                epoch, last = epoch + 1, 0
                file.begin_epoch(epoch)
            else:
                found = recent.after(mark, count, 60)
                if found is not None:
                    assert found == file.read_after(mark, count, 60)
        file.close()


async def test_events_are_read_from_memory_as_they_were_written(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await eventually(lambda: not spool._writer._with_thread)
        for number in range(5):
            await serve(spool, f"r{number}")
        group = spool._writer._group
        mark = Place(1, 2)
        found = await spool.read_after(mark, 100, 1 << 20)
        assert [event.place.sequence for event in found] == list(range(3, 11))
        assert spool._writer._group == group, "no file was read"
        assert found == spool._file.read_after(mark, 100, 1 << 20)
        await spool.trim({1: 6})
        found = await spool.read_after(mark, 100, 1 << 20)
        assert [event.place.sequence for event in found] == list(range(7, 11))
