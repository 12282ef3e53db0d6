"""Errors of the disk and deaths of the process at each call of the spool's files (R30)."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.mesh import spool_file, spool_segments, spool_window
from services.mesh.audit_protocol import START, Place
from services.mesh.event_codec import EventEncoder
from services.mesh.spool_file import SpooledEvent, SpoolFile
from services.mesh.spool_frames import Append
from tests.framework.audit_path import started

NOW = datetime(2030, 1, 1, tzinfo=UTC)


class Fault(Enum):
    EIO = "nothing is done"
    ENOSPC = "half of a write is done, and then there is no room"
    KILL = "half of a write is done, and then the process is gone"


class Killed(BaseException):
    """The process is gone."""


class FaultyDisk:
    """Stands for the module `os` in the spool's files. The call number `fail_at`, counted from 0, fails."""

    CALLS = ("open", "pwrite", "fsync", "fdatasync", "ftruncate", "rename", "unlink")

    def __init__(self) -> None:
        self.fail_at: int | None = None
        self.fault = Fault.EIO
        self.is_dead = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._watched(name, real) if name in self.CALLS else real

    def _watched(self, name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if self.is_dead:
                raise Killed
            if self.fail_at is not None:
                self.fail_at -= 1
                if self.fail_at < 0:
                    self.fail_at = None
                    self._fail(name, args)
            return real(*args, **options)

        return call

    def _fail(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "pwrite" and self.fault is not Fault.EIO:
            fd, data, offset = args
            os.pwrite(fd, data[: len(data) // 2], offset)
        if self.fault is Fault.KILL:
            self.is_dead = True
            raise Killed
        number = errno.EIO if self.fault is Fault.EIO else errno.ENOSPC
        raise OSError(number, os.strerror(number))


class Watched:
    """A spool's files, what was acknowledged of them, and what nobody was told of."""

    def __init__(self, folder: Path, disk: FaultyDisk, durable: bool) -> None:
        self.folder, self.disk, self.durable = folder, disk, durable
        self.acknowledged: dict[Place, bytes] = {}
        self.doubtful: set[bytes] = set()
        """What was written when the process died."""
        self.trimmed: dict[int, int] = {}
        self.begun: set[str] = set()
        self.maybe_begun: set[str] = set()
        self.ended: set[str] = set()
        self.epoch = 0
        self.numbers = 0
        self.encoder = EventEncoder("gateway", "test")
        self.file = self.new()

    def new(self) -> SpoolFile:
        return SpoolFile(self.folder, source="gateway", instance="test", durable=self.durable)

    def held(self) -> list[SpooledEvent]:
        return self.file.read_after(START, 10_000, 1 << 30)

    def open(self) -> None:
        """A life after another. Its process may be killed while it begins, or its disk may fail."""
        while True:
            with contextlib.suppress(Killed):
                self.file.close()
            self.file = self.new()
            self.disk.is_dead = False
            with contextlib.suppress(Killed, OSError):
                opened = self.file.open(NOW)
                break
            self.disk.fail_at = None
        assert opened.epoch > self.epoch, "no epoch is begun twice"
        self.epoch = opened.epoch
        held = self.held()
        self.check(held)
        for event in held:
            if event.outcome_of is not None:
                self.ended.add(event.outcome_of)
            self.acknowledged[event.place] = event.body
        assert self.begun <= self.ended, "none is open any more"

    def check(self, held: list[SpooledEvent]) -> None:
        places = [event.place for event in held]
        assert places == sorted(places)
        for epoch in {place.epoch for place in places}:
            sequences = [place.sequence for place in places if place.epoch == epoch]
            assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))
        bodies = {event.place: event.body for event in held}
        for place, body in self.acknowledged.items():
            if place.sequence > self.trimmed.get(place.epoch, 0):
                assert bodies[place] == body, "what was acknowledged is held"
        for event in held:
            if event.place not in self.acknowledged and event.body not in self.doubtful:
                # What failed is not there; an outcome that a new life wrote for a request that was open is.
                assert event.outcome_of is not None
                assert event.outcome_of in self.begun | self.maybe_begun
                assert event.outcome_of not in self.ended
        outcomes = Counter(event.outcome_of for event in held if event.outcome_of)
        assert not outcomes or max(outcomes.values()) == 1

    def put(self, group: list[Append]) -> None:
        """One by one, in the window; where that cannot be the others together, as the thread does."""
        while group and (place := self.file.put(group[0])) is not None:
            self.acknowledge(group.pop(0), place)
        if group:
            self.append(group)

    def renew(self) -> None:
        try:
            self.file.renew()
        except Killed:
            self.open()

    def group(self, begin: int, end: int) -> list[Append]:
        """Intents, then outcomes of some that are open."""
        group = []
        for _ in range(begin):
            self.numbers += 1
            name = f"req_{self.numbers}"
            group.append(Append(self.encoder.started(started(name), NOW)[0], 1.0, intent_of=name))
        for name in [*sorted(self.begun - self.ended), *(event.intent_of for event in group)][:end]:
            self.numbers += 1
            group.append(Append(f"{name} ended {self.numbers}".encode(), 1.0, outcome_of=name))
        return group

    def append(self, group: list[Append]) -> None:
        try:
            places = self.file.append(group)
        except OSError:
            return
        except Killed:
            self.doubtful |= {event.body for event in group}
            self.maybe_begun |= {event.intent_of for event in group}
            self.open()
            return
        for event, place in zip(group, places, strict=True):
            assert place is not None
            self.acknowledge(event, place)

    def acknowledge(self, event: Append, place: Place) -> None:
        self.acknowledged[place] = event.body
        self.begun |= {event.intent_of} - {""}
        self.ended |= {event.outcome_of} - {""}

    def trim(self, share: float) -> None:
        limits: dict[int, int] = {}
        for epoch in {event.place.epoch for event in self.held()}:
            of_epoch = [event.place.sequence for event in self.held() if event.place.epoch == epoch]
            limits[epoch] = of_epoch[0] + int((of_epoch[-1] - of_epoch[0]) * share)
        self.trimmed |= limits
        try:
            self.file.trim(limits)
        except Killed:
            self.open()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 6), st.integers(0, 6)),
        st.tuples(st.just("put"), st.integers(0, 6), st.integers(0, 6)),
        st.tuples(st.just("renewed put"), st.integers(1, 6), st.integers(0, 6)),
        st.tuples(st.just("trim"), st.sampled_from([0.0, 0.4, 1.0]), st.just(0)),
        st.tuples(st.just("open"), st.just(0), st.just(0)),
        st.tuples(st.just("fault"), st.sampled_from(list(Fault)), st.integers(0, 6)),
    ),
    min_size=3,
    max_size=40,
)


@contextlib.contextmanager
def faulty_disk() -> Iterator[FaultyDisk]:
    disk = FaultyDisk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_segments, "os", disk)
        patch.setattr(spool_window, "os", disk)
        patch.setattr(spool_window, "WINDOW_BYTES", 4096)
        patch.setattr(spool_file, "SEGMENT_BYTES", 2000)
        patch.setattr(spool_file, "IDLE_SEGMENT_BYTES", 500)
        yield disk


@given(steps=STEPS, durable=st.booleans())
@settings(max_examples=200, deadline=None)
def test_r30_faults_at_any_call_lose_nothing_that_was_acknowledged(
    steps: list[tuple[Any, ...]], durable: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, faulty_disk() as disk:
        watched = Watched(Path(folder) / "spool", disk, durable)
        watched.open()
        for kind, first, second in steps:
            if kind == "append":
                watched.append(watched.group(first, second))
            elif kind in ("put", "renewed put"):
                if kind == "renewed put":
                    watched.renew()
                watched.put(watched.group(first, second))
            elif kind == "trim":
                watched.trim(first)
            elif kind == "fault":
                disk.fault, disk.fail_at = first, second
            else:
                watched.open()
        disk.fail_at = None
        watched.open()
        watched.trim(1.0)
        assert watched.held() == []
        assert len(list((Path(folder) / "spool").glob("*.log"))) == 1, "what is forgotten is removed"
        watched.file.close()


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC])
@pytest.mark.parametrize("call", range(10))
@pytest.mark.parametrize("groups", [1, 2])
def test_r30_a_segment_that_could_not_be_begun_is_not_believed(
    groups: int, call: int, fault: Fault, tmp_path: Path
) -> None:
    """It may be there all the same, and say less than the one before it, if that one were written to."""
    with faulty_disk() as disk:
        watched = Watched(tmp_path / "spool", disk, durable=False)
        watched.open()
        watched.append(watched.group(3, 3))
        watched.renew()
        disk.fault, disk.fail_at = fault, call
        watched.trim(1.0)
        disk.fail_at = None
        watched.renew()
        watched.put(watched.group(2, 1))
        if groups > 1:
            watched.append(watched.group(2, 1))
        watched.open()
        assert len(watched.begun) == 3 + 2 * groups
        assert watched.begun == watched.ended
        watched.file.close()


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC])
def test_r30_after_an_error_nothing_is_put_before_the_disk_has_made_it_good(
    fault: Fault, tmp_path: Path
) -> None:
    """What failed is cut off the file, and with it the end of the window."""
    with faulty_disk() as disk:
        watched = Watched(tmp_path / "spool", disk, durable=False)
        watched.open()
        watched.renew()
        watched.put(watched.group(2, 1))
        assert len(watched.acknowledged) == 3
        disk.fault, disk.fail_at = fault, 0
        watched.append(watched.group(2, 1))
        assert len(watched.acknowledged) == 3
        (event,) = watched.group(1, 0)
        assert watched.file.put(event) is None
        disk.fail_at = 0
        watched.renew()
        assert watched.file.put(event) is None
        watched.renew()
        place = watched.file.put(event)
        assert place == Place(1, 4)
        watched.acknowledge(event, place)
        watched.open()
        watched.file.close()
