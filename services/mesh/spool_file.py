"""The spool's files: a log of frames in segments, used by one thread of one process at a time.

What was committed survives the process: it is with the system. It is on the disk (fdatasync) in `strict`,
where a group has a job, since its submitter forgets it, at the beginning of an epoch, so that no place is
ever used twice, and of a segment; otherwise a power loss may take the last groups.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from services.mesh import spool_import, spool_segments
from services.mesh.audit_protocol import START, Place
from services.mesh.broker import Topic
from services.mesh.event_codec import EventEncoder
from services.mesh.spool_frames import (
    Append,
    Begun,
    Damaged,
    Frame,
    Gap,
    Group,
    Head,
    Left,
    Torn,
    Trimmed,
    grouped,
)
from services.mesh.spool_segments import LastSegment, Segment
from services.mesh.spool_state import Holding, SpoolState

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 4 << 20
"""A segment that has so much beyond what it began with is followed by another one."""
IDLE_SEGMENT_BYTES = 64 << 10
"""The same where nothing is held: what is forgotten shall not stay on the disk for long."""


class SpooledEvent(Struct, frozen=True):
    """An event as it waits to be published."""

    place: Place
    outcome_of: str | None
    traceparent: str
    body: bytes
    topic: Topic = Topic.AUDIT


class Opened(Struct, frozen=True):
    """What was found and done when the files were opened."""

    producer: str
    epoch: int
    holding: Holding
    closed: int
    """How many intents of a former process were given the outcome ABORTED."""
    gap: Gap


class SpoolLocked(OSError):
    """Another process has the files open."""


class SpoolUnusable(OSError):
    """The files are no spool of ours, or are damaged."""


class SpoolFile:
    """See the module. Errors of the disk come as OSError, and leave everything as it was before the call."""

    def __init__(self, folder: Path, *, source: str, instance: str, durable: bool) -> None:
        self._folder = folder
        self._source = source
        self._instance = instance
        self._is_durable = durable
        self._lock: int | None = None
        self._state = SpoolState()
        self._sealed: list[Segment] = []
        self._active: LastSegment | None = None
        self._must_follow = False
        """A segment after the active one may be there, though it could not be begun."""
        self._cursor = (START, 0, 0)
        """A place up to which events were read, and where the next ones are looked for: segment, offset."""

    def open(self, now: datetime) -> Opened:
        """Begins a life: a segment of its own begins the epoch and closes what was open.

        Raises SpoolLocked, SpoolUnusable, or whatever the disk says.
        """
        folder = self._folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = spool_segments.lock(folder)
            self._recover()
            closed = self._begin_life(now)
        except BlockingIOError as error:
            self.close()
            raise SpoolLocked(f"the spool {folder} is in use by another process") from error
        except (Damaged, FileExistsError) as error:
            self.close()
            raise SpoolUnusable(
                f"the spool {folder} cannot be used ({error}); move it away to begin a new one, and keep "
                "it: it may hold events that are nowhere else"
            ) from error
        except BaseException:
            self.close()
            raise
        state = self._state
        return Opened(state.producer, state.epoch, state.holding(), closed, state.gap)

    def append(self, batch: Sequence[Append]) -> list[Place | None]:
        """Writes a batch, all of it or nothing. The result has the events' places; None is a second outcome
        of a request, which is left out.
        """
        state = self._state
        second = state.second_outcomes(batch)
        admitted = [event for at, event in enumerate(batch) if at not in second] if second else batch
        has_job = any(event.topic is not Topic.AUDIT for event in admitted)
        epoch, after = state.epoch, state.last
        self._write(list(grouped(epoch, after + 1, admitted)), sync=self._is_durable or has_job)
        places: list[Place | None] = []
        for at in range(len(batch)):
            if at in second:
                places.append(None)
            else:
                after += 1
                places.append(Place(epoch, after))
        return places

    @property
    def has_window(self) -> bool:
        """Whether `put` may ever succeed: not where each group is synced."""
        return not self._is_durable

    def put(self, event: Append) -> Place | None:
        """Writes an audit event without asking the disk, which `renew` has prepared for that a moment ago.
        None where that cannot be, and `append` says why."""
        active, state = self._active, self._state
        if active is None or self._must_follow or active.size - active.begun_at > SEGMENT_BYTES:
            return None
        if event.topic is not Topic.AUDIT:  # it has to be synced
            return None
        if event.outcome_of and state.has_outcome(event.outcome_of):
            return None
        group = Group(state.epoch, state.last + 1, (event,))
        if not active.put(group):
            return None
        state.add(group)
        return active.end

    def renew(self) -> None:
        """Prepares for `put`, where it can."""
        if self._active is not None and self.has_window:
            self._active.renew()

    def remember_gap(self, gap: Gap) -> None:
        """Keeps over a crash what is left to be recorded."""
        self._write([Left(gap)], sync=self._is_durable)

    def read_after(self, mark: Place, max_events: int, max_bytes: int) -> list[SpooledEvent]:
        """The next events in order; at least one, where there is one. Raises SpoolUnusable as well."""
        found: list[SpooledEvent] = []
        size = 0
        for segment, offset in self._places_after(mark):
            for group, offset_after in self._groups(segment, offset):
                for event in self._held(group, mark):
                    size += len(event.body)
                    if found and (size > max_bytes or len(found) == max_events):
                        self._cursor = (found[-1].place, segment.number, offset)
                        return found
                    found.append(event)
                offset = offset_after
            self._cursor = (found[-1].place if found else mark, segment.number, offset)
        return found

    def trim(self, limits: Mapping[int, int]) -> tuple[int, int]:
        """Forgets each epoch's events up to a sequence. Returns how many events and bytes that were."""
        trimmed = self._state.trim(limits)
        # Where it cannot be written down, a next life has the events again, and they are published once more.
        with contextlib.suppress(OSError):
            self._write([Trimmed(dict(limits))], sync=False)
            if self._state.is_empty and self._is_beyond(IDLE_SEGMENT_BYTES):
                self._follow()
        self._remove_trimmed()
        return trimmed

    def begin_epoch(self, epoch: int) -> None:
        """Goes on under another epoch; what is open stays open."""
        self._write([Begun(epoch)], sync=True)

    def oldest_time_s(self) -> float | None:
        """When the oldest event held happened."""
        return self._state.oldest_time_s

    def close(self) -> None:
        """Another process may open it then."""
        active, self._active = self._active, None
        lock, self._lock = self._lock, None
        try:
            if active is not None:
                active.close()
        finally:
            if lock is not None:
                os.close(lock)

    def _recover(self) -> None:
        """Reads all that is there. What a write left unfinished at the end is cut off: nobody was told."""
        self._sealed = spool_segments.found(self._folder)
        if not self._sealed:
            self._import()
        for segment in self._sealed:
            whole = 0
            try:
                for frame, offset in segment.frames():
                    self._state.apply(frame)
                    segment.note(frame)
                    whole = offset
            except Torn:
                if not whole or segment is not self._sealed[-1]:
                    raise
                if spool_segments.cut(segment, whole):
                    logger.warning("the spool ended with what is no whole group: cut off")
        if self._sealed and not self._state.producer:
            raise Damaged("it does not say whose it is")

    def _import(self) -> None:
        database = self._folder.with_suffix(".db")
        frames = spool_import.read(database) if database.exists() else None
        if frames is not None:
            spool_segments.begin(self._folder, 1, frames).close()
            self._sealed = spool_segments.found(self._folder)
            spool_import.remove(database)
            logger.info("the spool of a former version, %s, is now %s", database, self._folder)

    def _begin_life(self, now: datetime) -> int:
        """Returns how many intents were open."""
        state = self._state
        producer, epoch = state.producer or self._mint(), state.epoch + 1
        encoder = EventEncoder(self._source, producer)
        now_s = now.timestamp()
        aborted = [
            Append(encoder.aborted(intent.body, now), now_s, intent.traceparent, outcome_of=request_id)
            for request_id, intent in state.open.items()
        ]
        frames: list[Frame] = [Head(producer, epoch, state.gap, self._trimmed(), [])]
        frames += grouped(epoch, 1, aborted)
        number = self._sealed[-1].number + 1 if self._sealed else 1
        self._active = spool_segments.begin(self._folder, number, frames)
        for frame in frames:
            state.apply(frame)
        self._remove_trimmed()
        return len(aborted)

    def _mint(self) -> str:
        """A name that no other spool has, ever: a lost one must not come back as another's successor."""
        instance = re.sub(r"[^a-z0-9.-]", "-", self._instance.lower())[:64]
        return f"{instance}-{secrets.token_hex(6)}"

    def _write(self, frames: Sequence[Frame], *, sync: bool) -> None:
        if self._must_follow or self._is_beyond(SEGMENT_BYTES):
            self._follow()
            self._remove_trimmed()
        self._last.append(frames, sync=sync)
        for frame in frames:
            self._state.apply(frame)

    @property
    def _last(self) -> LastSegment:
        if self._active is None:
            raise OSError("the spool is closed")
        return self._active

    def _is_beyond(self, size: int) -> bool:
        return self._last.size - self._last.begun_at > size

    def _follow(self) -> None:
        """Begins the next segment. All that stands before it is on the disk then, so that nothing but the end
        of the last one can be unfinished. Where that fails, nothing is written before it has succeeded: the
        next life would believe a segment that says less than the one before it."""
        self._must_follow = True
        state, last = self._state, self._last
        last.finish()
        head = Head(state.producer, state.epoch, state.gap, self._trimmed(), list(state.open.values()))
        self._active = spool_segments.begin(self._folder, last.number + 1, [head])
        self._must_follow = False
        last.close()
        self._sealed.append(last)

    def _trimmed(self) -> dict[int, int]:
        """By epoch: up to where events that stand in a segment are forgotten."""
        limits: dict[int, int] = {}
        for segment in [*self._sealed, *([self._active] if self._active else [])]:
            for epoch, last in segment.last.items():
                floor = self._state.floor(epoch)
                limits[epoch] = last if floor is None else floor - 1
        return limits

    def _remove_trimmed(self) -> None:
        for segment in list(self._sealed):
            floors = ((self._state.floor(epoch), last) for epoch, last in segment.last.items())
            if all(floor is None or last < floor for floor, last in floors):
                with contextlib.suppress(OSError):  # the next one to look tries again
                    spool_segments.remove(segment)
                    self._sealed.remove(segment)

    def _places_after(self, mark: Place) -> list[tuple[Segment, int]]:
        """The segments that may have events after a place, each with the offset from which on."""
        place, number, offset = self._cursor
        segments = [*self._sealed, self._last]
        if place != mark:
            return [(segment, 0) for segment in segments if segment.end > mark]
        return [
            (segment, offset if segment.number == number else 0)
            for segment in segments
            if segment.number >= number
        ]

    def _groups(self, segment: Segment, offset: int) -> Iterator[tuple[Group, int]]:
        """Those from an offset on, each with the offset after it."""
        try:
            for frame, offset_after in segment.frames(offset):
                if isinstance(frame, Group):
                    yield frame, offset_after
        except Damaged as error:
            raise SpoolUnusable(f"the spool's file {segment.path} is damaged ({error})") from error

    def _held(self, group: Group, mark: Place) -> Iterator[SpooledEvent]:
        """The events of a group that are held, and after a place."""
        epoch = group.epoch
        first = self._state.floor(epoch)
        if first is None or epoch < mark.epoch:
            return
        if epoch == mark.epoch:
            first = max(first, mark.sequence + 1)
        skipped = max(0, first - group.first)
        for sequence, event in enumerate(group.events[skipped:], group.first + skipped):
            place = Place(epoch, sequence)
            yield SpooledEvent(place, event.outcome_of or None, event.traceparent, event.body, event.topic)
