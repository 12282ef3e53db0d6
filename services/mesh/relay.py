"""Takes the spool's events to Kafka, and out of the spool once logging has them.

Two loops that do not wait for each other: one publishes what was appended, in batches; the other reports to
logging, trims what is stored, and rewinds where something is not stored after a while. So a broker that
hangs does not make logging believe that this producer died, and a logging service that hangs does not stop
publishing. Appending waits for neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from services.mesh import event_codec
from services.mesh.audit_metrics import AuditMetrics
from services.mesh.audit_protocol import (
    ProducerAnswer,
    ProducerReport,
    PublishPlan,
    must_begin_epoch,
    trim_limits,
)
from services.mesh.broker import PLACE_HEADER, Record, RecordPublisher
from services.mesh.clock import Clock, wait_at_most
from services.mesh.errors import LlmosError
from services.mesh.spool import Spool
from services.mesh.spool_file import SpooledEvent

logger = logging.getLogger(__name__)

MAX_BATCH_EVENTS = 512
MAX_BATCH_BYTES = 512 * 1024
GATHER_S, BUSY_GATHER_S = 0.05, 0.25
"""So long the first event waits for others: what a batch costs here, at the broker and at logging hardly
depends on how many it has. The second, where a batch was published within the last second, unless somebody
waits for an event."""
BUSY_S = 1.0
SYNC_AFTER_PUBLISH_S, BUSY_SYNC_AFTER_PUBLISH_S = 0.25, 1.0
"""How long after publishing logging is asked; it takes a moment to store. The second, where something was
published meanwhile too: a report costs about the same for few events as for many."""
MAX_SYNC_PAUSE_S = 2.0
"""Between questions, while something is awaited."""
HEARTBEAT_S = 10.0
"""Between reports, while nothing is: logging fences who is silent."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.2, 5.0

_Failures = (LlmosError, OSError)


class WatermarkSource(Protocol):
    """The logging service, as a relay sees it."""

    async def sync(self, report: ProducerReport) -> ProducerAnswer:
        """Ends in bounded time. Raises LlmosError."""


class Relay:
    """A component, started after its spool and stopped before it."""

    def __init__(
        self,
        spool: Spool,
        publisher: RecordPublisher,
        watermarks: WatermarkSource,
        clock: Clock,
        *,
        plan: PublishPlan | None = None,
        stop_timeout_s: float = 3.0,
    ) -> None:
        """`stop_timeout_s` bounds how long a stop waits for the last events to be published."""
        self._spool = spool
        self._publisher = publisher
        self._watermarks = watermarks
        self._clock = clock
        self._plan = plan or PublishPlan()
        self._stop_timeout_s = stop_timeout_s
        self._metrics = AuditMetrics(spool)
        self._published = asyncio.Event()
        self._idle = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._metrics.observe()
        self._tasks = [
            asyncio.create_task(self._keep_publishing(), name="audit-publish"),
            asyncio.create_task(self._keep_syncing(), name="audit-sync"),
        ]

    async def stop(self) -> None:
        """Gives the last events a moment to be published; the spool keeps what could not be."""
        if self._tasks:
            if self._spool.appended.is_set():
                self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self._stop_timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._metrics.close()
        await self._publisher.close()

    async def publish_once(self, max_events: int = MAX_BATCH_EVENTS) -> int:
        """Publishes the next batch; returns how many events that were. Raises one of _Failures."""
        events = await self._spool.read_after(self._plan.mark, max_events, MAX_BATCH_BYTES)
        if not events:
            return 0
        key = self._spool.producer.encode()
        await self._publisher.publish([self._record(key, event) for event in events])
        self._metrics.published(len(events), again=events[0].place <= self._plan.highest)
        self._plan.published(events[-1].place)
        self._published.set()
        return len(events)

    async def sync_once(self) -> int:
        """Reports to logging and does what the answer asks for; returns how many events were trimmed.

        Raises one of _Failures.
        """
        spool, plan = self._spool, self._plan
        report = spool.report()
        answer = await self._watermarks.sync(report)
        epoch = must_begin_epoch(report.epoch, spool.ledger.last_sequence, answer)
        trimmed = await spool.trim(trim_limits(report.held, answer.watermarks, plan.highest))
        self._metrics.trimmed(trimmed)
        if epoch is not None and spool.ledger.epoch == report.epoch:
            logger.warning(
                "logging closed epoch %d of %s; going on in %d", report.epoch, report.producer, epoch
            )
            await spool.begin_epoch(epoch)
            self._metrics.fenced()
        if plan.confirmed(spool.ledger.oldest_held, self._clock.monotonic()):
            logger.warning("logging lacks audit events from %s on; publishing again", plan.mark)
            spool.appended.set()
        return trimmed

    def _record(self, key: bytes, event: SpooledEvent) -> Record:
        place = event.place
        producer = self._spool.producer
        value = event_codec.complete(
            event.body, producer, place, self._spool.ledger.floor(place.epoch), event.outcome_of
        )
        at = (PLACE_HEADER, f"{place.epoch}/{place.sequence}".encode())
        if not event.traceparent:
            return Record(key, value, (at,), event.topic)
        return Record(key, value, (at, ("traceparent", event.traceparent.encode())), event.topic)

    async def _keep_publishing(self) -> None:
        appended, hurried = self._spool.appended, self._spool.hurried
        busy_until_s = 0.0

        async def publish_all() -> None:
            nonlocal busy_until_s
            await appended.wait()
            self._idle.clear()
            try:
                await self._clock.sleep(GATHER_S)
                if self._clock.monotonic() < busy_until_s:
                    await wait_at_most(self._clock, hurried, BUSY_GATHER_S - GATHER_S)
                appended.clear()
                hurried.clear()
                # What comes while these are published is the next batch: it is gathered, too.
                last = self._spool.ledger.last
                while self._plan.mark < last and await self.publish_once():
                    busy_until_s = self._clock.monotonic() + BUSY_S
            except BaseException:
                appended.set()
                # A stop does not wait for a broker that is away.
                self._idle.set()
                raise
            if not appended.is_set():
                self._idle.set()

        await self._forever("publish audit events", publish_all)

    async def _keep_syncing(self) -> None:
        pause_s = SYNC_AFTER_PUBLISH_S

        async def sync() -> None:
            nonlocal pause_s
            awaits = self._plan.awaits(self._spool.ledger.oldest_held)
            await wait_at_most(self._clock, self._published, pause_s if awaits else HEARTBEAT_S)
            if self._published.is_set():
                self._published.clear()
                await self._clock.sleep(SYNC_AFTER_PUBLISH_S)
                if self._published.is_set():
                    await self._clock.sleep(BUSY_SYNC_AFTER_PUBLISH_S - SYNC_AFTER_PUBLISH_S)
            pause_s = SYNC_AFTER_PUBLISH_S if await self.sync_once() else min(pause_s * 1.5, MAX_SYNC_PAUSE_S)

        # At once, so that logging hears of a new life, and of what it holds, before anything is published.
        with contextlib.suppress(*_Failures):
            await self.sync_once()
        await self._forever("report to logging", sync)

    async def _forever(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """Repeats a step; says once that it fails, and once that it works again."""
        backoff_s = FIRST_BACKOFF_S
        failing = False
        while True:
            try:
                await step()
            except _Failures as error:
                if not failing:
                    logger.warning("cannot %s: %s; trying again until it works", what, error)
                failing = True
                self._metrics.failed(what)
                await self._clock.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
            else:
                if failing:
                    logger.info("can %s again", what)
                failing, backoff_s = False, FIRST_BACKOFF_S
