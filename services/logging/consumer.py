"""Reads a topic, hands its records to the topic's intake, and notices when that does not go on.

The offsets that the intake keeps are what counts: what was taken before a crash and is read again changes
nothing. Kafka is told of them for lag monitors only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from opentelemetry import context, propagate, trace
from opentelemetry.trace import SpanContext, SpanKind

from services.logging.intake import Intake
from services.mesh.broker import ReceivedRecord, RecordSource
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError, Overloaded

logger = logging.getLogger(__name__)
_tracer = trace.get_tracer("llmos.audit")

T = TypeVar("T")

MAX_BATCH = 1000
CHECK_EVERY_S = 3.0
MAX_GOAL_AGE_S = 20.0
MAX_LINKS = 64
BUSY_S = 1.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.2, 5.0


class TopicConsumer:
    """A component. `on_health` hears whether events are being taken as far as Kafka has any."""

    def __init__(
        self,
        source: RecordSource,
        intake: Intake,
        clock: Clock,
        *,
        stalled_after_s: float,
        on_health: Callable[[bool], Awaitable[None]],
        gather_s: float = 0.0,
    ) -> None:
        """`stalled_after_s`: with records waiting and none coming for so long, something hangs.

        `gather_s`: where batches follow each other within BUSY_S, the next one is let grow for so long. What
        a batch costs here, at the broker and on the disk hardly depends on how many it has.
        """
        self._source = source
        self._intake = intake
        self._clock = clock
        self._stalled_after_s = stalled_after_s
        self._on_health = on_health
        self._gather_s = gather_s
        self._progress_s = 0.0
        self._offsets: dict[int, int] = {}
        """By partition, as the intake has them."""
        self._uncommitted: dict[int, int] = {}
        """Those that Kafka was not told of."""
        self._goal: tuple[float, dict[int, int]] | None = None
        """A moment, and what Kafka had then: once that is read, who was silent up to then was silent."""
        self._checked_s = float("-inf")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns at once: queries are answered while Kafka is away."""
        self._progress_s = self._clock.monotonic()
        await self._on_health(True)
        self._task = asyncio.create_task(self._run(), name=f"consume {self._intake.topic}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._commit()
        await self._source.close()

    async def open(self) -> None:
        """Begins to read where the intake is. Raises LlmosError."""
        self._goal = None
        self._offsets = await self._told(self._intake.offsets())
        await self._source.open(self._offsets)
        await self._note_rewind()

    async def step(self, max_records: int, timeout_s: float) -> int:
        """Takes the next records; returns how many. Raises LlmosError."""
        records = await self._source.poll(max_records, timeout_s)
        if not records:
            await self._note_rewind()
            return 0
        with _tracer.start_as_current_span(
            f"process {self._intake.topic}",
            context=context.Context(),
            kind=SpanKind.CONSUMER,
            attributes={
                "messaging.system": "kafka",
                "messaging.operation.type": "process",
                "messaging.destination.name": self._intake.topic,
                "messaging.batch.message_count": len(records),
            },
        ) as span:
            if span.is_recording():
                for origin in _origins(records):
                    span.add_link(origin)
            offsets = {record.partition: record.offset + 1 for record in records}
            await self._told(self._intake.take(records, offsets))
        self._offsets.update(offsets)
        self._uncommitted.update(offsets)
        self._progress_s = self._clock.monotonic()
        await self._reach_goal()
        return len(records)

    async def check(self) -> bool:
        """Compares with what Kafka has, and tells it how far this reader is; False where Kafka has more and
        nothing comes.

        Raises DependencyUnavailable.
        """
        now_s = self._clock.monotonic()
        await self._commit()
        ends = await self._source.ends()
        if self._reads_up_to(ends):
            self._progress_s = max(self._progress_s, now_s)
            await self._on_health(True)
        if self._goal is None or now_s - self._goal[0] > MAX_GOAL_AGE_S:
            self._goal = now_s, ends
        await self._reach_goal()
        return now_s - self._progress_s < self._stalled_after_s

    async def _commit(self) -> None:
        if self._uncommitted:
            offsets, self._uncommitted = self._uncommitted, {}
            await self._source.commit(offsets)

    async def _told(self, work: Awaitable[T]) -> T:
        """A database that fails is told by health. A broker that is away is not, since queries work; nor is a
        schedule that is full, which only those can empty who are let in."""
        try:
            return await work
        except Overloaded:
            raise
        except LlmosError:
            await self._on_health(False)
            raise

    async def _note_rewind(self) -> None:
        """Kafka lost its data: where it is read from now, the next life has to begin as well, since the old
        offsets may soon exist again."""
        positions = self._source.positions()
        rewound = {p: at for p, at in positions.items() if at < self._offsets.get(p, 0)}
        if rewound:
            logger.warning("%s lost its data; reading it from its beginning: %s", self._intake.topic, rewound)
            await self._told(self._intake.take([], rewound))
            self._offsets.update(rewound)

    def _reads_up_to(self, ends: dict[int, int]) -> bool:
        positions = self._source.positions()
        return all(positions.get(partition, 0) >= end for partition, end in ends.items())

    async def _reach_goal(self) -> None:
        if self._goal is not None and self._reads_up_to(self._goal[1]):
            until_s, self._goal = self._goal[0], None
            await self._intake.read_all(until_s)

    async def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        failing = False
        while True:
            try:
                await self.open()
                if failing:
                    logger.info("%s is read again", self._intake.topic)
                failing, backoff_s = False, FIRST_BACKOFF_S
                await self._read_on()
            except LlmosError as error:
                if not failing:
                    logger.warning("%s is not read: %s; trying again until it is", self._intake.topic, error)
                failing = True
            except Exception:
                logger.exception("%s is not read", self._intake.topic)
                failing = True
                await self._on_health(False)
            await self._clock.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def _read_on(self) -> None:
        """Until something fails or hangs."""
        busy_until_s = 0.0
        while True:
            until_check_s = self._checked_s + CHECK_EVERY_S - self._clock.monotonic()
            stored = await self.step(MAX_BATCH, max(until_check_s, 0.0))
            if stored:
                await self._on_health(True)
                now_s = self._clock.monotonic()
                if self._gather_s and stored < MAX_BATCH and now_s < busy_until_s:
                    await self._clock.sleep(self._gather_s)
                busy_until_s = now_s + self._gather_s + BUSY_S
            if self._clock.monotonic() - self._checked_s >= CHECK_EVERY_S:
                self._checked_s = self._clock.monotonic()
                if not await self.check():
                    topic = self._intake.topic
                    logger.error("Kafka has records of %s and gives none; connecting anew", topic)
                    await self._on_health(False)
                    # It has as long again to show that this helped.
                    self._progress_s = self._clock.monotonic()
                    return


def _origins(records: Sequence[ReceivedRecord]) -> list[SpanContext]:
    """Where in their traces the events come from; a batch may have many."""
    found: dict[int, SpanContext] = {}
    for record in records:
        carrier = {key: value.decode("ascii", "replace") for key, value in record.headers}
        if "traceparent" not in carrier:
            continue
        origin = trace.get_current_span(propagate.extract(carrier, context.Context())).get_span_context()
        if origin.is_valid:
            found.setdefault(origin.trace_id, origin)
        if len(found) >= MAX_LINKS:
            break
    return list(found.values())
