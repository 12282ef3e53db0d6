"""The audit log's rules: who reads what, how a tail follows, when a silent producer is fenced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace

from opentelemetry import metrics

from services.logging.store import AuditStore, Batch, Cursor, RecordFilter, RequestRecord
from services.mesh.audit_protocol import ProducerAnswer, ProducerReport, SilenceWatch
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import ConcurrencyLimit, NotFound
from services.mesh.event_codec import EventRead, PlaceRead

logger = logging.getLogger(__name__)

READ_SCOPE = "audit.read"
ADMIN_SCOPE = "admin"
TAIL_PAGE = 200

_meter = metrics.get_meter("llmos.audit")
_stored = _meter.create_counter(
    "llmos.audit.events.stored", unit="{event}", description="Audit events taken in"
)
_late = _meter.create_counter(
    "llmos.audit.late_outcomes", unit="{event}", description="Outcomes of requests that had another already"
)
_closed = _meter.create_counter(
    "llmos.audit.closed_requests", unit="{request}", description="Requests closed by logging, by cause"
)


class AuditLog:
    """What the service does with its store."""

    def __init__(self, store: AuditStore, clock: Clock, *, fence_after_s: float, max_tails: int) -> None:
        """A producer that is silent for `fence_after_s` is taken for dead."""
        self._store = store
        self._clock = clock
        self._watch = SilenceWatch(fence_after_s)
        self._max_tails = max_tails
        self._tails = 0
        self._position = 0
        self._changed = asyncio.Event()

    async def offsets(self, topic: str) -> dict[int, int]:
        """By partition: the next offset to read. Raises DependencyUnavailable."""
        return await self._store.offsets(topic)

    async def take(self, topic: str, events: Sequence[EventRead], offsets: Mapping[int, int]) -> None:
        """Stores what came from Kafka. Raises DependencyUnavailable; then nothing of it is stored."""
        applied = await self._store.apply(Batch(topic, events, offsets), self._now_us())
        now_s = self._clock.monotonic()
        for producer in {event.producer for event in events}:
            self._watch.heard(producer, now_s)
        _stored.add(sum(not isinstance(event.record, PlaceRead) for event in events))
        if applied.late_outcomes:
            _late.add(applied.late_outcomes)
        self._tell(applied.position)

    async def sync(self, report: ProducerReport) -> ProducerAnswer:
        """Hears a producer, and tells it what is stored."""
        self._watch.heard(report.producer, self._clock.monotonic())
        answer, closed = await self._store.sync(report, self._now_us())
        if closed:
            logger.warning("closed %d requests of %s whose outcome was lost", closed, report.producer)
            _closed.add(closed, {"llmos.audit.cause": "lost"})
            await self._tell_newest()
        return answer

    async def fence_silent(self, read_all_until_s: float) -> None:
        """Everything that Kafka had at that moment (monotonic) is stored: closes what dead producers left."""
        self._watch.read_all(read_all_until_s)
        for producer in self._watch.silent(await self._store.producers_with_open_requests()):
            closed = await self._store.fence(producer, self._now_us())
            logger.warning("fenced %s, which is silent, and closed its %d open requests", producer, closed)
            _closed.add(closed, {"llmos.audit.cause": "silent"})
            await self._tell_newest()

    async def search(
        self, reader: Identity, which: RecordFilter, limit: int, after: Cursor | None
    ) -> tuple[list[RequestRecord], Cursor | None]:
        """A page, the newest first, and where the next one begins. Raises ScopeMissing, NotFound."""
        which = visible_to(reader, which)
        found = await self._store.search(which, limit + 1, after)
        page = found[:limit]
        more = len(found) > limit
        return page, Cursor(page[-1].receive_time_us, page[-1].request_id) if more else None

    async def tail(
        self, reader: Identity, which: RecordFilter, *, last: int, after_position: int | None
    ) -> AsyncGenerator[RequestRecord, None]:
        """What is stored, then what is added, for ever. A slow reader holds up nobody: it reads the log.

        Raises ScopeMissing, NotFound, and ConcurrencyLimit where too many follow already.
        """
        which = visible_to(reader, which)
        if self._tails >= self._max_tails:
            raise ConcurrencyLimit(f"{self._max_tails} tails run, which is the limit.")
        self._tails += 1
        try:
            position = after_position
            if position is None:
                records, position = await self._store.newest(which, last)
                for record in records:
                    yield record
            while True:
                records, position = await self._store.changed(which, position, TAIL_PAGE)
                for record in records:
                    yield record
                if len(records) < TAIL_PAGE:
                    await self._beyond(position)
        finally:
            self._tails -= 1

    async def _beyond(self, position: int) -> None:
        while self._position <= position:
            await self._changed.wait()

    async def _tell_newest(self) -> None:
        _, position = await self._store.newest(RecordFilter(), 0)
        self._tell(position)

    def _tell(self, position: int) -> None:
        if position > self._position:
            self._position = position
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def _now_us(self) -> int:
        return int(self._clock.now().timestamp() * 1_000_000)


def visible_to(reader: Identity, which: RecordFilter) -> RecordFilter:
    """The filter, kept to the reader's own tenant unless the reader is an administrator.

    Raises ScopeMissing, and NotFound for another tenant, which may as well not exist.
    """
    reader.require(READ_SCOPE)
    if ADMIN_SCOPE in reader.scopes:
        return which
    if which.tenant_id not in ("", reader.tenant_id):
        raise NotFound("No such tenant.", hint="Leave tenant_id out to see your own tenant's records.")
    return replace(which, tenant_id=reader.tenant_id)
