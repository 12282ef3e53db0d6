"""The whole way of an audit event in one process: spool, relay, consumer, store, with their loops running."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from llmos.events.v1 import events_pb2

from services.logging.audit import AuditLog
from services.logging.consumer import TopicConsumer
from services.logging.intake import AuditIntake, Intake, JobIntake
from services.logging.outbox import Outbox
from services.logging.schedule.machine import Machine, Rules
from services.logging.schedule.schedule import Limits, Schedule
from services.logging.schedule.store import Bounds, ScheduleStore
from services.logging.schedule.stores.memory import MemoryScheduleStore
from services.logging.store import AuditStore, RecordFilter
from services.mesh.audit_protocol import ProducerAnswer, ProducerReport, PublishPlan
from services.mesh.broker import RecordPublisher, RecordSource, Topic
from services.mesh.clock import Clock, SystemClock
from services.mesh.context import Identity
from services.mesh.errors import DependencyUnavailable
from services.mesh.events import Edge, Outcome, RequestEnded, RequestFacts, RequestStarted
from services.mesh.relay import Relay
from services.mesh.spool import Spool

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
        source: Callable[[Topic], RecordSource],
        watermarks: DirectWatermarks,
        *,
        clock: Clock | None = None,
        prefix: str = "llmos",
        publisher: RecordPublisher | None = None,
        scheduled: ScheduleStore | None = None,
        fence_after_s: float = 600,
        stalled_after_s: float = 30,
    ) -> None:
        self._watermarks = watermarks
        self._store = store
        clock = clock or SystemClock()
        self.healthy_of: dict[Topic, list[bool]] = {}
        """What each consumer has told, without repetition."""
        self.log = AuditLog(store, clock, fence_after_s=fence_after_s, max_tails=4)
        self.scheduled = scheduled or MemoryScheduleStore(Machine(Rules(), random.random), Bounds())
        self.schedule = Schedule(self.scheduled, clock, Limits())
        self.outbox = publisher and Outbox(
            self.schedule, publisher, clock, source="logging", producer="logging-0"
        )
        intakes: dict[Topic, Intake] = {
            Topic.AUDIT: AuditIntake(f"{prefix}.audit.v1", self.log, self.schedule),
            Topic.JOBS: JobIntake(f"{prefix}.jobs.v1", self.log, self.schedule, clock),
            Topic.RETRY: JobIntake(f"{prefix}.retry.v1", self.log, self.schedule, clock),
        }
        self.sources = {topic: source(topic) for topic in intakes}
        self.consumers = {
            topic: TopicConsumer(
                self.sources[topic],
                intake,
                clock,
                stalled_after_s=stalled_after_s,
                on_health=partial(self._on_health, topic),
            )
            for topic, intake in intakes.items()
        }
        self.source, self.consumer = self.sources[Topic.AUDIT], self.consumers[Topic.AUDIT]

    async def _on_health(self, topic: Topic, healthy: bool) -> None:
        told = self.healthy_of.setdefault(topic, [])
        if told[-1:] != [healthy]:
            told.append(healthy)

    @property
    def healthy(self) -> list[bool]:
        """What the consumer of audit events has told."""
        return self.healthy_of.get(Topic.AUDIT, [])

    async def start(self) -> None:
        await self._store.start()
        await self.scheduled.start()
        await self.schedule.start()
        for consumer in self.consumers.values():
            await consumer.start()
        if self.outbox is not None:
            await self.outbox.start()
        self._watermarks.log = self.log

    async def stop(self) -> None:
        self._watermarks.log = None
        if self.outbox is not None:
            await self.outbox.stop()
        for consumer in self.consumers.values():
            await consumer.stop()
        await self.schedule.stop()
        await self.scheduled.stop()
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
