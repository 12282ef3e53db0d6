"""A schedule, gateways that run its jobs, and time: what tests of the worker live in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from services.gateway.jobs.ports import AttemptEnd, Beat, JobClaim, ScheduledJob, Standing
from services.mesh.clock import ManualClock
from services.mesh.errors import DependencyUnavailable
from tests.framework.gateway_fakes import Bench, FakeReplica
from tests.framework.job_workers import JobBench, standing
from tests.framework.schedules import ScheduleInMemory


class FrozenWorker:
    """A `SchedulePort` as a gateway sees it that is stopped for a while: what it says comes late."""

    def __init__(self, schedule: ScheduleInMemory) -> None:
        self._schedule = schedule
        self.awake = asyncio.Event()
        self.awake.set()
        self.error: DependencyUnavailable | None = None
        self.refused: list[str] = []
        """Jobs whose reports were."""
        self.faults = 0
        """So many reports break."""
        self.messages: list[int] = []
        """How many reports each had."""

    async def _passing(self) -> None:
        await self.awake.wait()
        if self.error is not None:
            raise self.error

    async def claim(self, worker: str, max_jobs: int, *, lease_s: float, wait_s: float) -> Sequence[JobClaim]:
        await self._passing()
        # A long poll that a frozen process leaves behind would be answered.
        return await self._schedule.claim(worker, max_jobs, lease_s=lease_s, wait_s=0)

    async def heartbeat(self, beats: Sequence[Beat], *, lease_s: float) -> Sequence[Standing]:
        await self._passing()
        return await self._schedule.heartbeat(beats, lease_s=lease_s)

    async def report(self, ends: Sequence[AttemptEnd]) -> Sequence[bool]:
        await self._passing()
        self.messages.append(len(ends))
        if self.faults:
            self.faults -= 1
            raise ValueError("insides")
        taken = await self._schedule.report(ends)
        self.refused += [end.job_id for end, each in zip(ends, taken, strict=True) if not each]
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)


class World:
    """One schedule and some gateways."""

    def __init__(self, *, lease_s: float = 15.0) -> None:
        self.clock = ManualClock()
        self.schedule = ScheduleInMemory(self.clock, draw=lambda: 0.0)
        self.lease_s = lease_s
        self.gateways: list[JobBench] = []

    @asynccontextmanager
    async def gateway(self, *replicas: FakeReplica, **fields: Any) -> AsyncIterator[JobBench]:
        of_bench = {key: fields.pop(key) for key in ("admission_limits",) if key in fields}
        bench = Bench(list(replicas) or [FakeReplica()], clock=self.clock, max_concurrent=500, **of_bench)
        if self.gateways:
            fields["seals"] = self.gateways[0].seals
        fields.setdefault("schedule", FrozenWorker(self.schedule))
        made = JobBench(bench, lease_s=self.lease_s, name=f"gateway-{len(self.gateways)}", **fields)
        self.gateways.append(made)
        async with made.serving():
            yield made

    async def pass_s(self, duration_s: float) -> None:
        """Time goes by, for everybody."""
        while duration_s > 0:
            step_s = min(duration_s, 0.5)
            await self.clock.advance(step_s)
            await self.schedule.sweep()
            for _ in range(20):
                await asyncio.sleep(0)
            duration_s -= step_s

    async def until(self, condition: Callable[[], bool], within_s: float = 60.0) -> None:
        for _ in range(int(within_s / 0.1)):
            if condition():
                return
            await self.pass_s(0.1)
        raise AssertionError("it did not happen")

    async def end_of(self, job_id: str = "job_1", within_s: float = 600.0) -> ScheduledJob:
        for _ in range(int(within_s)):
            found, _ = await standing(self.schedule, job_id)
            if found.state.is_final:
                return found
            await self.pass_s(1.0)
        raise AssertionError(f"{job_id} is {found.state.name}")
