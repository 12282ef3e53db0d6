"""The whole way of an audit event in one process: spool, relay, consumer, store, with their loops running."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmos.events.v1 import events_pb2

from services.logging.audit import AuditLog
from services.logging.consumer import AuditConsumer
from services.logging.store import AuditStore, RecordFilter
from services.mesh.audit_protocol import ProducerAnswer, ProducerReport, PublishPlan
from services.mesh.broker import RecordPublisher, RecordSource
from services.mesh.clock import Clock, SystemClock
from services.mesh.context import Identity
from services.mesh.errors import DependencyUnavailable
from services.mesh.events import Edge, Outcome, RequestEnded, RequestFacts, RequestStarted
from services.mesh.relay import Relay
from services.mesh.spool import Spool

TOPIC = "llmos.audit.v1"
CALLER = Identity("tenant-a", "client-a", "key-a", frozenset({"generate"}))
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def facts(request_id: str, *, caller: Identity = CALLER, receive_time: datetime = NOW) -> RequestFacts:
    method = "/llmos.gateway.v1.GenerationService/Generate"
    return RequestFacts(request_id, caller, method, Edge.GRPC, "echo", "0" * 32, receive_time)


def started(request_id: str) -> RequestStarted:
    return RequestStarted(facts(request_id))


def ended(request_id: str, outcome: Outcome = Outcome.SUCCEEDED) -> RequestEnded:
    return RequestEnded(facts(request_id), outcome, end_time=NOW)


def make_spool(path: Path, clock: Clock | None = None, **options: Any) -> Spool:
    settings: dict[str, Any] = {
        "mode": "permissive",
        "max_bytes": 1 << 26,
        "append_timeout_s": 10.0,
    } | options
    return Spool.open(path, source="gateway", instance="gateway-0", clock=clock or SystemClock(), **settings)


@asynccontextmanager
async def running(*components: Any) -> AsyncIterator[None]:
    """Starts components, and stops them in reverse order."""
    begun = []
    try:
        for component in components:
            begun.append(component)
            await component.start()
        yield
    finally:
        for component in reversed(begun):
            await component.stop()


async def serve(spool: Spool, *request_ids: str) -> None:
    """Requests from their intent to their outcome."""
    for request_id in request_ids:
        await spool.append_started(started(request_id))
        await spool.append_ended(ended(request_id))


@dataclass
class DirectWatermarks:
    """A relay's way to logging, without gRPC. `up` False: logging is away."""

    log: AuditLog | None = None
    up: bool = True
    reports: list[ProducerReport] = field(default_factory=list)

    async def sync(self, report: ProducerReport) -> ProducerAnswer:
        if not self.up or self.log is None:
            raise DependencyUnavailable("logging is away")
        self.reports.append(report)
        return await self.log.sync(report)


class LoggingProcess:
    """What of the logging service stands behind gRPC. A component; may be started again after a stop."""

    def __init__(
        self,
        store: AuditStore,
        source: Callable[[], RecordSource],
        watermarks: DirectWatermarks,
        *,
        clock: Clock | None = None,
        topic: str = TOPIC,
        fence_after_s: float = 600,
        stalled_after_s: float = 30,
    ) -> None:
        self._watermarks = watermarks
        self._store = store
        clock = clock or SystemClock()
        self.healthy: list[bool] = []
        self.log = AuditLog(store, clock, fence_after_s=fence_after_s, max_tails=4)
        self.source = source()
        self.consumer = AuditConsumer(
            self.source,
            store,
            self.log,
            clock,
            topic=topic,
            stalled_after_s=stalled_after_s,
            on_health=self._on_health,
        )

    async def _on_health(self, healthy: bool) -> None:
        if self.healthy[-1:] != [healthy]:
            self.healthy.append(healthy)

    async def start(self) -> None:
        await self._store.start()
        await self.consumer.start()
        self._watermarks.log = self.log

    async def stop(self) -> None:
        self._watermarks.log = None
        await self.consumer.stop()
        await self._store.stop()


def make_relay(
    spool: Spool, publisher: RecordPublisher, watermarks: DirectWatermarks, **options: Any
) -> Relay:
    plan = PublishPlan(first_timeout_s=0.5, max_timeout_s=2.0)
    return Relay(spool, publisher, watermarks, SystemClock(), plan=plan, **options)


async def outcomes(store: AuditStore) -> dict[str, str]:
    """By request: the name of its outcome, or `open`."""
    found = await store.search(RecordFilter(), 100_000, None)
    return {
        record.request_id: "open"
        if record.ended is None
        else Outcome(events_pb2.RequestEnded.FromString(record.ended).outcome).name
        for record in found
    }
