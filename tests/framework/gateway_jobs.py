"""The jobs of the gateway over a schedule in memory, with a spool that takes jobs there as Kafka would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.gateway.jobs.assembly import assembled
from services.gateway.jobs.ports import JobCounts, ScheduledJob, Seals
from services.gateway.request import RequestParser
from services.gateway.settings import GatewaySettings
from services.mesh import context
from services.mesh.clock import Clock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.errors import DependencyUnavailable, LlmosError
from services.mesh.jobs import JobRequested, RetryRequested, Sealed
from tests.framework.blobs import MemoryBlobs
from tests.framework.gateway_fakes import ALICE, MAX_TOKENS_LIMIT, Bench
from tests.framework.jobs import new_seals
from tests.framework.schedules import ScheduleInMemory


class BreakableSchedule(ScheduleInMemory):
    """A schedule that may be away, or lose its answers."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.away = False
        self.counted = 0
        self.lost_replays = 0
        """So many replays take place, and are not answered."""

    def _check(self) -> None:
        if self.away:
            raise DependencyUnavailable("The schedule is away.")

    async def get(self, job_id: str, *, wait_s: float = 0.0) -> tuple[ScheduledJob, Sealed | None]:
        self._check()
        return await super().get(job_id, wait_s=wait_s)

    async def count(self, batch_id: str = "") -> JobCounts:
        self._check()
        self.counted += 1
        return await super().count(batch_id)

    async def replay(self, dead_letter_id: str, job: JobRequested) -> ScheduledJob:
        self._check()
        found = await super().replay(dead_letter_id, job)
        if self.lost_replays:
            self.lost_replays -= 1
            raise DependencyUnavailable("The answer was lost.")
        return found


class MemoryJobSpool:
    """A `JobSpool` that takes what it has to the schedule, unless it is held."""

    def __init__(self, schedule: ScheduleInMemory) -> None:
        self.events: list[JobRequested | RetryRequested] = []
        self.error: LlmosError | None = None
        self.held = False
        """Whether Kafka is away."""
        self.disk = asyncio.Event()
        """Cleared: the disk hangs."""
        self.disk.set()
        self.waiting = 0
        self.most_waiting = 0
        self._schedule = schedule
        self._sent = 0
        self._sending: set[asyncio.Task[None]] = set()

    def append_job(self, event: JobRequested | RetryRequested) -> asyncio.Future[None]:
        return asyncio.ensure_future(self._append(event))

    async def _append(self, event: JobRequested | RetryRequested) -> None:
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            await self.disk.wait()
            if self.error is not None:
                raise self.error
            self.events.append(event)
        finally:
            self.waiting -= 1
        if not self.held:
            task = asyncio.create_task(self.release())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def release(self) -> None:
        """Kafka is back."""
        self.held = False
        fresh, self._sent = self.events[self._sent :], len(self.events)
        await self._schedule.accept(*fresh)


class JobBench:
    """The jobs of a bench."""

    def __init__(self, bench: Bench, *, seals: Seals | None = None, **settings: Any) -> None:
        self.bench = bench
        self.schedule = BreakableSchedule(bench.clock)
        self.spool = MemoryJobSpool(self.schedule)
        self.seals = seals or new_seals()
        self.blobs = MemoryBlobs()
        self.settings = GatewaySettings(service_secret_file=Path("nowhere"), **settings)
        self.jobs = assembled(
            self.settings,
            bench.clock,
            schedule=self.schedule,
            spool=self.spool,
            seals=self.seals,
            parser=RequestParser(max_tokens_limit=MAX_TOKENS_LIMIT),
            authorisation=bench.authorisation,
        )

    async def claim(self) -> Sequence[Any]:
        """All that is due, by a worker."""
        return await self.schedule.claim("gateway-0", 256, lease_s=60, wait_s=0)


@asynccontextmanager
async def inside(identity: Identity = ALICE) -> AsyncIterator[None]:
    """What is asked of the schedule in the block is asked by the caller."""
    token = context.enter(RequestContext("req_1", "/test", caller=Caller(identity)))
    try:
        yield
    finally:
        context.leave(token)
