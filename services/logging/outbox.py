"""Tells Kafka what the schedule has decided: each retry of an attempt, and each dead letter.

At least once: a row leaves the schedule's outbox when Kafka has it. A repeat has the same envelope id, a
function of what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from opentelemetry import metrics

from services.logging.schedule.job import from_us
from services.logging.schedule.store import OutboxRow
from services.mesh import job_codec
from services.mesh.broker import Record, RecordPublisher, Topic
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError
from services.mesh.jobs import DeadLettered, RetryRequested, Sealed

logger = logging.getLogger(__name__)

MAX_ROWS = 32
"""At a time; each may have about 1 MiB."""
MAX_VALUE_BYTES = 1_040_000
"""With key and headers it fits into the 1 MiB that brokers take."""
GATHER_S = 0.05
"""So long the first news waits for others."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.2, 5.0

_meter = metrics.get_meter("llmos.jobs")
_published = _meter.create_counter(
    "llmos.jobs.outbox.published", unit="{event}", description="Retries and dead letters that Kafka took"
)


class News(Protocol):
    """The schedule, as the outbox reads it. Raises LlmosError."""

    async def outbox(self, limit: int) -> list[OutboxRow]:
        """The oldest first."""

    async def published(self, numbers: Sequence[int]) -> None:
        """Forgets rows."""

    async def news(self) -> None:
        """Returns when there may be more than at the last call."""


class Outbox:
    """A component."""

    def __init__(
        self, schedule: News, publisher: RecordPublisher, clock: Clock, *, source: str, producer: str
    ) -> None:
        """`producer` names this process in the events' envelopes."""
        self._schedule = schedule
        self._publisher = publisher
        self._clock = clock
        self._source = source
        self._producer = producer
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns at once: Kafka may be away."""
        self._task = asyncio.create_task(self._run(), name="outbox")

    async def stop(self) -> None:
        """What is not published now is published by the next life."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._publisher.close()

    async def publish_once(self) -> int:
        """Publishes the next rows; returns how many. Raises LlmosError."""
        rows = await self._schedule.outbox(MAX_ROWS)
        if rows:
            await self._publisher.publish([self._record(row) for row in rows])
            await self._schedule.published([row.number for row in rows])
            _published.add(len(rows))
        return len(rows)

    def _record(self, row: OutboxRow) -> Record:
        value = self._encoded(row, row.event)
        if len(value) > MAX_VALUE_BYTES:
            value = self._encoded(row, _shortened(row.event))
        topic = Topic.RETRY if isinstance(row.event, RetryRequested) else Topic.DEAD_LETTER
        return Record(self._producer.encode(), value, (), topic)

    def _encoded(self, row: OutboxRow, event: RetryRequested | DeadLettered) -> bytes:
        return job_codec.encode(
            event,
            source=self._source,
            producer=self._producer,
            time=from_us(row.time_us),
            event_id=row.event_id,
        )

    async def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        failing = False
        while True:
            try:
                while await self.publish_once():
                    if failing:
                        logger.info("retries and dead letters are published again")
                    failing, backoff_s = False, FIRST_BACKOFF_S
                await self._schedule.news()
                await self._clock.sleep(GATHER_S)
            except LlmosError as error:
                if not failing:
                    logger.warning("retries and dead letters are not published: %s; trying again", error)
                failing = True
                await self._clock.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
            except Exception:
                logger.exception("retries and dead letters are not published")
                failing = True
                await self._clock.sleep(MAX_BACKOFF_S)


def _shortened(event: RetryRequested | DeadLettered) -> RetryRequested | DeadLettered:
    """Without what makes it too large for Kafka: the schedule has it all."""
    if isinstance(event, RetryRequested):
        return replace(event, job=replace(event.job, request=Sealed(event.job.request.key_id, b"")))
    job = None if event.job is None else replace(event.job, request=Sealed(event.job.request.key_id, b""))
    return replace(event, job=job, raw=event.raw[: MAX_VALUE_BYTES // 2])
