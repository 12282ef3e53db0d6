"""Claims what is due, runs it and reports.

A claimed job is at work in a task of its own until its report was taken, or refused because its lease was
lost. A gateway that stops postpones what it runs; one that is killed leaves its leases to end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from services.gateway.jobs.ports import (
    AttemptEnd,
    CancelledByTenant,
    JobClaim,
    Postponed,
    Report,
    SchedulePort,
)
from services.gateway.jobs.working.leases import Held, Leases
from services.gateway.jobs.working.outcomes import failed
from services.gateway.jobs.working.places import Places
from services.gateway.jobs.working.ports import Attempt, Runner
from services.gateway.jobs.working.reports import Reports
from services.gateway.jobs.working.telemetry import JobInstruments
from services.mesh.clock import Clock, wait_at_most
from services.mesh.errors import Internal, LlmosError
from services.mesh.interceptors import new_request_id
from services.mesh.jobs import JobKind

logger = logging.getLogger(__name__)

MAX_CLAIMS = 256
"""In one question."""
CLAIM_WAIT_S = 5.0
"""How long the schedule may wait for a job to fall due."""
EMPTY_PAUSE_S = 0.05
"""Before the next question after an empty answer, however soon that came."""
LOOK_AGAIN_S = 0.25
"""Where there is no room: how soon it is looked for again, unless a job ends before."""
MAX_UNREPORTED = 512
"""Jobs that have run and whose reports were not taken yet; with more, nothing is claimed."""
NOT_READY_S = 0.2
PROBE_INTERVAL_S = 1.0
RETRY_MIN_S, RETRY_MAX_S = 0.2, 5.0
"""Between questions that the schedule does not answer."""
UNKNOWN_KIND_WAIT_S = 30.0
"""A newer gateway may know it."""
STOP_S = 5.0
"""The most that a stop takes for what is still at work and its reports."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker works with."""

    schedule: SchedulePort
    runners: Mapping[JobKind, Runner]
    leases: Leases
    places: Places
    is_ready: Callable[[], bool]
    """Whether the gateway would take calls: else nothing is claimed, neither before it knows policy nor when
    it drains."""
    instruments: JobInstruments
    clock: Clock


class Worker:
    """A component of the gateway, to be started last and stopped first."""

    def __init__(self, name: str, parts: WorkerParts) -> None:
        """`name` is the gateway's."""
        self._name = name
        self._parts = parts
        self._reports = Reports(parts.schedule, parts.clock)
        self._held: dict[asyncio.Task[None], Held] = {}
        """By the task that sees the job to its report."""
        self._loops: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()
        self._stopping = False

    @property
    def running(self) -> int:
        """How many jobs are at work."""
        return len(self._held)

    async def start(self) -> None:
        held = _Values(self._held)
        self._loops = [
            asyncio.create_task(self._claim_for_ever(), name="jobs-claim", context=Context()),
            asyncio.create_task(
                self._parts.leases.beat_for_ever(held), name="jobs-heartbeat", context=Context()
            ),
        ]

    async def stop(self) -> None:
        """Postpones what is at work."""
        self._stopping = True
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        for each in self._held.values():
            each.work.cancel()
        if self._held:
            tasks = tuple(self._held)
            patience = asyncio.ensure_future(self._parts.clock.sleep(STOP_S))
            ended = asyncio.ensure_future(asyncio.wait(tasks))
            waits: list[asyncio.Future[Any]] = [patience, ended]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for left in (*tasks, *waits):
                left.cancel()
            await asyncio.gather(*tasks, *waits, return_exceptions=True)
        await self._reports.stop()

    # -- claiming -------------------------------------------------------------------------------------------

    async def _claim_for_ever(self) -> None:
        parts, pause_s = self._parts, RETRY_MIN_S
        while True:
            if not parts.is_ready():
                await self._pause(NOT_READY_S)
                continue
            at_work = [each.attempt for each in self._held.values() if not each.work.done()]
            room = parts.places.room(at_work)
            if not room.jobs or len(self._held) - len(at_work) >= MAX_UNREPORTED:
                await self._pause(PROBE_INTERVAL_S if room.is_probe else LOOK_AGAIN_S)
                continue
            asked_s = parts.clock.monotonic()
            try:
                claims = await parts.schedule.claim(
                    self._name,
                    min(room.jobs, MAX_CLAIMS),
                    lease_s=parts.leases.lease_s,
                    wait_s=CLAIM_WAIT_S,
                )
            except LlmosError as error:
                logger.warning("the schedule does not answer: %s", error.reason)
                await parts.clock.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
                continue
            pause_s = RETRY_MIN_S
            for claim in claims:
                self._begin(claim, asked_s)
            if room.is_probe:
                await parts.clock.sleep(PROBE_INTERVAL_S)
            elif not claims:
                await parts.clock.sleep(EMPTY_PAUSE_S)

    async def _pause(self, at_most_s: float) -> None:
        """Until a job ends."""
        self._ended.clear()
        await wait_at_most(self._parts.clock, self._ended, at_most_s)

    # -- one job --------------------------------------------------------------------------------------------

    def _begin(self, claim: JobClaim, asked_s: float) -> None:
        job, clock = claim.scheduled.job, self._parts.clock
        attempt = Attempt(claim, new_request_id(), waits=job.kind is JobKind.REQUEST)
        # When a later attempt was due, a claim does not say.
        is_first = claim.scheduled.attempts == 1
        wait_s = (clock.now() - max(job.not_before, job.create_time)).total_seconds()
        self._parts.instruments.began(job.kind, wait_s if is_first else None)
        work: asyncio.Task[Report] = asyncio.create_task(
            self._run(attempt), name=f"job-{job.job_id}", context=Context()
        )
        work.add_done_callback(lambda _: self._ended.set())
        # The question may have waited for a while. Where clocks agree, the schedule's own word is nearer.
        now_s, lease_s = clock.monotonic(), self._parts.leases.lease_s
        left_s = min((claim.lease_expire_time - clock.now()).total_seconds(), lease_s)
        held = Held(attempt, work, max(asked_s + lease_s, now_s + left_s))
        task = asyncio.create_task(self._see_through(held, work), name=f"report-{job.job_id}")
        self._held[task] = held
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._held[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a job was not seen through", exc_info=error)

    async def _run(self, attempt: Attempt) -> Report:
        runner = self._parts.runners.get(attempt.job.kind)
        if runner is None:
            return Postponed(UNKNOWN_KIND_WAIT_S)
        try:
            return await runner.run(attempt)
        except Exception:
            logger.exception("job %s failed", attempt.job.job_id)
            return failed(Internal("the server failed"), retryable=True)

    async def _see_through(self, held: Held, work: asyncio.Task[Report]) -> None:
        report: Report | None = None
        taken = False
        try:
            await asyncio.wait({work})
            report = self._report_of(held, work)
            if report is not None:
                taken = await self._reported(held, report)
        finally:
            work.cancel()
            self._parts.instruments.ended(held.attempt.job.kind, report, taken=taken)

    def _report_of(self, held: Held, work: asyncio.Task[Report]) -> Report | None:
        """None: there is nobody who would want to know."""
        if not work.cancelled():
            return work.result()
        if held.lost:
            return None
        if held.cancel:
            return CancelledByTenant()
        # Our own stop, or a lease that ended unheard: then the schedule judges by the fence.
        return Postponed()

    async def _reported(self, held: Held, report: Report) -> bool:
        """Whether the schedule has taken it. Repeated until it says so or not."""
        attempt, pause_s = held.attempt, RETRY_MIN_S
        job_id = attempt.job.job_id
        end = AttemptEnd(job_id, attempt.claim.fence, attempt.request_id, report)
        while not held.lost:
            try:
                taken = await self._reports.report(end, at_once=not self._has_more())
            except LlmosError as error:
                logger.warning("the report of job %s was not taken: %s", job_id, error.reason)
                if not error.retryable:
                    return False
                await self._parts.clock.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
            else:
                if not taken:
                    logger.warning("job %s was another's by the time of its report", job_id)
                return taken
        return False

    def _has_more(self) -> bool:
        """Whether others will end soon: some are claimed and wait for a place, so that none is empty while a
        report waits for theirs."""
        return not self._stopping and any(each.attempt.waits for each in self._held.values())


class _Values:
    """The values of a dict, which may change between one look and the next."""

    def __init__(self, of: Mapping[asyncio.Task[None], Held]) -> None:
        self._of = of

    def __iter__(self) -> Iterator[Held]:
        return iter(tuple(self._of.values()))
