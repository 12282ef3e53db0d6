"""What becomes of records from Kafka, topic by topic.

First what they say is stored, then their places and offsets: a crash between the two repeats the first, which
changes nothing. A record that cannot be read becomes a dead letter of the schedule, with its bytes, and does
not stop the others; where its headers tell its place, its producer need not send it again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Protocol

from opentelemetry import metrics

from services.logging.audit import AuditLog
from services.mesh import event_codec, job_codec
from services.mesh.broker import PLACE_HEADER, ReceivedRecord
from services.mesh.clock import Clock
from services.mesh.errors import DataCorrupt, DeadlineExceeded
from services.mesh.event_codec import EventRead, PlaceRead
from services.mesh.jobs import DeadLettered, JobEvent, JobRequested

logger = logging.getLogger(__name__)

MAX_RAW_BYTES = job_codec.MAX_EVENT_BYTES
"""More of an unreadable record is not kept: the dead letter has to fit into a record itself."""
MAX_AGE = timedelta(days=8)
"""A job that was submitted longer ago is nobody's any more: none is given longer than seven days."""

_meter = metrics.get_meter("llmos.audit")
_dead = _meter.create_counter(
    "llmos.audit.dead_letters", unit="{record}", description="Records that could not be read, by topic"
)


class Scheduling(Protocol):
    """The schedule, as jobs come in."""

    async def accept(self, events: Sequence[JobEvent]) -> object:
        """All or nothing, and durably; repeating it changes nothing. Raises LlmosError."""


class Intake(Protocol):
    """Takes the records of one topic."""

    @property
    def topic(self) -> str:
        """The topic's name."""

    async def offsets(self) -> dict[int, int]:
        """By partition: the next offset to read."""

    async def take(self, records: Sequence[ReceivedRecord], offsets: Mapping[int, int]) -> None:
        """Stores records, then the offsets at which to go on. Repeating it changes nothing.

        Raises LlmosError; then the offsets are as they were.
        """

    async def read_all(self, until_s: float) -> None:
        """All that Kafka had of this topic at that moment (monotonic) is taken. Raises LlmosError."""


class AuditIntake:
    """An `Intake` of audit events."""

    def __init__(self, topic: str, log: AuditLog, schedule: Scheduling) -> None:
        self.topic = topic
        self._log = log
        self._schedule = schedule

    async def offsets(self) -> dict[int, int]:
        return await self._log.offsets(self.topic)

    async def take(self, records: Sequence[ReceivedRecord], offsets: Mapping[int, int]) -> None:
        events: list[EventRead] = []
        dead: list[DeadLettered] = []
        for record in records:
            try:
                events.append(event_codec.read(record.value))
            except DataCorrupt as error:
                dead.append(_dead_letter(self.topic, record, error.message))
                events += _place_of(record)
        await _bury(dead, self._schedule)
        await self._log.take(self.topic, events, offsets)

    async def read_all(self, until_s: float) -> None:
        await self._log.fence_silent(until_s)


class JobIntake:
    """An `Intake` of jobs and retries."""

    def __init__(self, topic: str, log: AuditLog, schedule: Scheduling, clock: Clock) -> None:
        self.topic = topic
        self._log = log
        self._schedule = schedule
        self._clock = clock

    async def offsets(self) -> dict[int, int]:
        return await self._log.offsets(self.topic)

    async def take(self, records: Sequence[ReceivedRecord], offsets: Mapping[int, int]) -> None:
        jobs: list[JobEvent] = []
        dead: list[DeadLettered] = []
        places: list[EventRead] = []
        for record in records:
            try:
                read = job_codec.read(record.value)
                if isinstance(read.event, DeadLettered):
                    raise DataCorrupt("a dead letter, on the topic of what is to be done")
            except DataCorrupt as error:
                dead.append(_dead_letter(self.topic, record, error.message))
                places += _place_of(record)
                continue
            jobs.append(self._too_old(record, read.event) or read.event)
            if read.place is not None:
                places.append(EventRead(read.producer, read.place, read.floor, PlaceRead()))
        if jobs:
            await self._schedule.accept(jobs)
        await _bury(dead, self._schedule)
        await self._log.take(self.topic, places, offsets)

    async def read_all(self, until_s: float) -> None:
        """Nothing waits for it."""

    def _too_old(self, record: ReceivedRecord, event: JobEvent) -> DeadLettered | None:
        job = event if isinstance(event, JobRequested) else event.job
        if job is None or self._clock.now() - job.create_time <= MAX_AGE:
            return None
        return DeadLettered(
            DeadlineExceeded.reason,
            "It was submitted more than eight days before it came.",
            job.job_id,
            job=job,
            topic=self.topic,
            partition=record.partition,
            offset=record.offset,
        )


async def _bury(dead: Sequence[DeadLettered], schedule: Scheduling) -> None:
    if not dead:
        return
    await schedule.accept(dead)
    topic = dead[0].topic
    _dead.add(len(dead), {"messaging.destination.name": topic})
    logger.warning("%d records of %s became dead letters, the first: %s", len(dead), topic, dead[0].detail)


def _dead_letter(topic: str, record: ReceivedRecord, detail: str) -> DeadLettered:
    cut = f" ({len(record.value)} bytes, cut)" if len(record.value) > MAX_RAW_BYTES else ""
    return DeadLettered(
        DataCorrupt.reason,
        f"It cannot be read: {detail}{cut}.",
        raw=record.value[:MAX_RAW_BYTES],
        topic=topic,
        partition=record.partition,
        offset=record.offset,
    )


def _place_of(record: ReceivedRecord) -> list[EventRead]:
    """The place of a record that cannot be read, as its key and headers tell it."""
    producer = record.key.decode("utf-8", "replace")[:128]
    if producer:
        with contextlib.suppress(ValueError):
            text = dict(record.headers).get(PLACE_HEADER, b"").decode("ascii")
            return [EventRead(producer, event_codec.read_place(text), 1, PlaceRead())]
    return []
