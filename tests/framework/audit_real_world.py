"""The real spool, relay, consumers and SQLite store as a `World`, over a broker and a schedule in memory.

Steps are the same as the model's (`audit_model`), so the same trace must end in the same records.
"""

from __future__ import annotations

import contextlib
import random
from datetime import timedelta
from pathlib import Path

from llmos.events.v1 import events_pb2

from services.logging.audit import AuditLog
from services.logging.consumer import TopicConsumer
from services.logging.intake import AuditIntake, Intake, JobIntake
from services.logging.schedule.machine import Machine, Rules
from services.logging.schedule.schedule import Limits, Schedule
from services.logging.schedule.store import Bounds, JobFilter, ScheduleStore
from services.logging.schedule.stores.memory import MemoryScheduleStore
from services.logging.store import Applied, AuditStore, Batch, RecordFilter
from services.logging.stores.sqlite import SqliteStore
from services.mesh.audit_protocol import ProducerAnswer, ProducerReport, PublishPlan
from services.mesh.broker import Topic
from services.mesh.clock import ManualClock
from services.mesh.errors import DependencyUnavailable
from services.mesh.events import AnonymousRejected, Edge, Outcome, RequestEnded, RequestFacts, RequestStarted
from services.mesh.jobs import RetryRequested
from services.mesh.relay import Relay
from services.mesh.spool import Spool
from tests.framework.audit_trace import FENCE_AFTER_S, PARTITIONS, Crash, Fate, StoredRecord
from tests.framework.job_events import job
from tests.framework.memory_broker import MemoryBroker, MemoryPublisher, MemorySource


class _Logging:
    """One life of the logging process."""

    def __init__(
        self, store: AuditStore, scheduled: ScheduleStore, broker: MemoryBroker, clock: ManualClock
    ) -> None:
        self.crash = Crash.NEVER
        crashing: AuditStore = _Crashing(store, self)  # type: ignore[assignment]
        self.log = AuditLog(crashing, clock, fence_after_s=FENCE_AFTER_S, max_tails=8)
        schedule = Schedule(scheduled, clock, Limits())
        intakes: dict[Topic, Intake] = {
            Topic.AUDIT: AuditIntake("audit", self.log, schedule),
            Topic.JOBS: JobIntake("jobs", self.log, schedule, clock),
            Topic.RETRY: JobIntake("retry", self.log, schedule, clock),
        }
        self.sources = {topic: MemorySource(broker, topic) for topic in intakes}
        self.consumers = {
            topic: TopicConsumer(
                self.sources[topic], intake, clock, stalled_after_s=1e9, on_health=self._health
            )
            for topic, intake in intakes.items()
        }

    async def _health(self, _: bool) -> None:
        """Nobody asks."""


class _Died(Exception):
    """The process is gone."""


class _Crashing:
    """The store, with a process around it that may die while it writes."""

    def __init__(self, store: AuditStore, process: _Logging) -> None:
        self._store = store
        self._process = process

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def apply(self, batch: Batch, now_us: int) -> Applied:
        if self._process.crash is Crash.BEFORE_COMMIT:
            raise _Died
        applied = await self._store.apply(batch, now_us)
        if self._process.crash is Crash.AFTER_COMMIT:
            raise _Died
        return applied


class _Watermarks:
    """The way from a relay to logging, which may lose the answer."""

    def __init__(self, world: RealWorld) -> None:
        self._world = world
        self.answered = True

    async def sync(self, report: ProducerReport) -> ProducerAnswer:
        answer = await self._world.logging.log.sync(report)
        if not self.answered:
            raise DependencyUnavailable("the answer is lost")
        return answer


class _Gateway:
    """One life of a gateway."""

    def __init__(self, world: RealWorld, index: int, path: Path) -> None:
        self.spool = Spool.open(
            path,
            source="gateway",
            instance=f"gateway-{index}",
            mode="permissive",
            max_bytes=1 << 26,
            clock=world.clock,
            append_timeout_s=60,
        )
        self.publisher = MemoryPublisher(world.broker, partition=index % PARTITIONS)
        self.watermarks = _Watermarks(world)
        self.relay = Relay(self.spool, self.publisher, self.watermarks, world.clock, plan=PublishPlan())


def no_jobs() -> ScheduleStore:
    """A schedule's store, new."""
    return MemoryScheduleStore(Machine(Rules(), random.random), Bounds())


class RealWorld:
    """See the module. `close` when done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[int, Path] = {}
        self._gateways: dict[int, _Gateway] = {}
        self._names = 0
        self._facts: dict[str, RequestFacts] = {}
        self._owners: dict[str, int] = {}
        self._ever_fenced: set[int] = set()
        self._settled = 0
        self.clock = ManualClock()
        self.broker = MemoryBroker(PARTITIONS)
        self._stores = 0
        self._store: SqliteStore | None = None
        self._scheduled: ScheduleStore = no_jobs()
        self._logging: _Logging | None = None

    @property
    def logging(self) -> _Logging:
        assert self._logging is not None
        return self._logging

    async def begin(self) -> None:
        self._stores += 1
        self._store = SqliteStore(self._folder / f"audit-{self._stores}.db")
        await self._store.start()
        self._scheduled = no_jobs()
        await self.restart_store()

    async def close(self) -> None:
        for gateway in list(self._gateways):
            await self.crash(gateway)
        if self._store is not None:
            await self._store.stop()

    async def open(self, gateway: int) -> None:
        if gateway not in self._paths:
            self._names += 1
            self._paths[gateway] = self._folder / f"spool-{gateway}-{self._names}"
        live = self._gateways[gateway] = _Gateway(self, gateway, self._paths[gateway])
        await live.spool.start()
        self._owners[live.spool.producer] = gateway

    async def crash(self, gateway: int) -> None:
        # What is in the file when a process dies is what is in it when the file is closed: nothing is
        # written at a stop but counts of anonymous refusals.
        live = self._gateways.pop(gateway)
        await live.spool.stop()

    async def lose(self, gateway: int) -> None:
        self._paths.pop(gateway, None)

    async def power_loss(self, gateway: int, share: float) -> set[str]:
        raise NotImplementedError("only the model loses power")

    async def start(self, gateway: int, request_id: str) -> None:
        facts = RequestFacts(request_id, None, "/test", Edge.GRPC, receive_time=self.clock.now())
        self._facts[request_id] = facts
        await self._gateways[gateway].spool.append_started(RequestStarted(facts))

    async def end(self, gateway: int, request_id: str, outcome: str) -> None:
        facts = self._facts.get(request_id) or RequestFacts(
            request_id, None, "/test", Edge.GRPC, receive_time=self.clock.now()
        )
        ended = RequestEnded(facts, Outcome[outcome], end_time=self.clock.now())
        await self._gateways[gateway].spool.append_ended(ended)

    async def note(self, gateway: int, number: int) -> None:
        now = self.clock.now()
        event = AnonymousRejected("192.0.2.1", "CREDENTIAL_MISSING", number, now, now)
        await self._gateways[gateway].spool.append_other(event)

    async def job(self, gateway: int, number: int) -> None:
        now = self.clock.now()
        submitted = job(f"job_{number}", create_time=now, give_up_time=now + timedelta(days=7))
        event = RetryRequested(submitted, "req", "REPLICA_LOST", 1) if number % 2 else submitted
        await self._gateways[gateway].spool.append_job(event)

    async def publish(self, gateway: int, limit: int, fate: Fate) -> None:
        live = self._gateways[gateway]
        live.publisher.fate = fate
        with contextlib.suppress(DependencyUnavailable):
            await live.relay.publish_once(limit)

    async def sync(self, gateway: int, answered: bool) -> None:
        live = self._gateways[gateway]
        live.watermarks.answered = answered
        before = await self._closed_by_logging()
        with contextlib.suppress(DependencyUnavailable):
            await live.relay.sync_once()
        self._settled += await self._closed_by_logging() - before

    async def land_delayed(self) -> None:
        await self.broker.land_delayed()

    async def duplicate(self, partition: int, back: int) -> None:
        await self.broker.duplicate(partition, back)

    async def wipe_broker(self) -> None:
        self.broker.wipe()

    async def consume(self, partition: int, limit: int, crash: Crash) -> None:
        await self._take(Topic.AUDIT, partition, limit, crash)

    async def schedule(self, partition: int, limit: int, crash: Crash) -> None:
        for topic in (Topic.JOBS, Topic.RETRY):
            await self._take(topic, partition, limit, crash)

    async def _take(self, topic: Topic, partition: int, limit: int, crash: Crash) -> None:
        self.logging.sources[topic].only = partition
        self.logging.crash = crash
        with contextlib.suppress(_Died):
            await self.logging.consumers[topic].step(limit, 0)
        if crash is not Crash.NEVER:
            await self.restart_store()

    async def restart_store(self) -> None:
        assert self._store is not None
        self._logging = _Logging(self._store, self._scheduled, self.broker, self.clock)
        for consumer in self._logging.consumers.values():
            await consumer.open()

    async def wipe_store(self) -> None:
        assert self._store is not None
        await self._store.stop()
        await self.begin()

    async def check(self) -> None:
        before = await self._open_by_producer()
        await self.logging.consumers[Topic.AUDIT].check()
        after = await self._open_by_producer()
        self._ever_fenced |= {self._owners[producer] for producer in before - after}

    async def advance(self, duration_s: float) -> None:
        await self.clock.advance(duration_s)

    async def records(self) -> dict[str, StoredRecord]:
        assert self._store is not None
        found = await self._store.search(RecordFilter(), 100_000, None)
        return {
            record.request_id: StoredRecord(
                record.started is not None,
                None
                if record.ended is None
                else Outcome(events_pb2.RequestEnded.FromString(record.ended).outcome).name,
                record.closed_by_logging,
            )
            for record in found
        }

    async def notes(self) -> list[int]:
        assert self._store is not None
        found = await self._store.other_events(100_000)
        return [events_pb2.AuditRecorded.FromString(body).anonymous_rejected.count for _, _, _, body in found]

    async def jobs(self) -> list[int]:
        found = (await self._scheduled.list_jobs(JobFilter(), 100_000, None)).items
        return [int(job.job_id.removeprefix("job_")) for job, _ in found]

    async def held(self, gateway: int) -> int:
        return self._gateways[gateway].spool.ledger.held_events

    async def settled_by_logging(self) -> int:
        return self._settled

    async def fenced(self) -> set[int]:
        return self._ever_fenced

    async def _closed_by_logging(self) -> int:
        return sum(record.closed_by_logging for record in (await self.records()).values())

    async def _open_by_producer(self) -> set[str]:
        assert self._store is not None
        return set(await self._store.producers_with_open_requests())
