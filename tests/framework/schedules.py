"""The schedule in memory, as gateways see it: a `SchedulePort` over the rules and the machine of logging."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime

from services.gateway.jobs import ports
from services.logging.schedule import job as life
from services.logging.schedule import store as scheduled
from services.logging.schedule.job import Job, from_us, to_us
from services.logging.schedule.machine import Machine, Rules
from services.logging.schedule.schedule import Limits, Schedule
from services.logging.schedule.store import Accepted, Bounds, Cursor
from services.logging.schedule.stores.memory import MemoryScheduleStore
from services.mesh.clock import Clock
from services.mesh.context import Identity, require_current
from services.mesh.jobs import JobEvent, JobKind, JobRequested, JobState, Sealed


class ScheduleInMemory:
    """A `SchedulePort`. `accept` stands for Kafka; `sweep` for the passing of time: call it after moving the
    clock, or start and stop it as a component. Callers are those of `services.mesh.context`."""

    def __init__(
        self,
        clock: Clock,
        *,
        rules: Rules | None = None,
        bounds: Bounds | None = None,
        limits: Limits | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Leases end as soon as they may: there is no grace, and a lease may be as short as a second."""
        self.store = MemoryScheduleStore(Machine(rules or Rules(), draw), bounds or Bounds())
        self.schedule = Schedule(
            self.store, clock, limits or Limits(min_lease_s=1.0, max_lease_s=3600.0, lease_grace_s=0.0)
        )

    async def start(self) -> None:
        await self.schedule.start()

    async def stop(self) -> None:
        await self.schedule.stop()

    async def accept(self, *events: JobEvent) -> Accepted:
        """What would come by Kafka."""
        return await self.schedule.accept(events)

    async def sweep(self) -> None:
        """What time does."""
        while await self.schedule.sweep():
            pass

    async def claim(
        self, worker: str, max_jobs: int, *, lease_s: float, wait_s: float
    ) -> Sequence[ports.JobClaim]:
        claims = await self.schedule.claim(worker, max_jobs, lease_s=lease_s, wait_s=wait_s)
        return [
            ports.JobClaim(
                scheduled_job(claim.job, claim.request),
                claim.job.fence,
                from_us(claim.job.lease_us),
                None if claim.job.ended is None else scheduled_job(claim.job.ended),
            )
            for claim in claims
        ]

    async def heartbeat(self, beats: Sequence[ports.Beat], *, lease_s: float) -> Sequence[ports.Standing]:
        answers = await self.schedule.heartbeat(
            [scheduled.Beat(beat.job_id, beat.fence, beat.progress_tokens) for beat in beats],
            {beat.job_id: beat.partial for beat in beats if beat.partial is not None},
            lease_s=lease_s,
        )
        return [
            ports.Standing(beat.job_id, standing.held, standing.cancel, watched)
            for beat, (standing, watched) in zip(beats, answers, strict=True)
        ]

    async def report(self, ends: Sequence[ports.AttemptEnd]) -> Sequence[bool]:
        given = [
            scheduled.AttemptEnd(each.job_id, each.fence, each.request_id, _report(each.report))
            for each in ends
        ]
        return [each.taken for each in await self.schedule.report(given)]

    async def get(self, job_id: str, *, wait_s: float = 0.0) -> tuple[ports.ScheduledJob, Sealed | None]:
        job, request, result = await self.schedule.get(_reader(), job_id, wait_s=wait_s)
        return scheduled_job(job, request if job.request.kind is JobKind.BATCH else None), result

    async def list_jobs(
        self,
        which: ports.JobFilter,
        page_size: int,
        page_token: str = "",
        *,
        with_results: bool = False,
        oldest_first: bool = False,
    ) -> tuple[Sequence[tuple[ports.ScheduledJob, Sealed | None]], str]:
        page = await self.schedule.list_jobs(
            _reader(),
            scheduled.JobFilter("", which.states, which.labels, which.batch_id, which.kinds),
            page_size,
            _cursor(page_token),
            with_results=with_results,
            oldest_first=oldest_first,
        )
        token = ""
        if page.more:
            last = page.items[-1][0]
            token = f"{to_us(last.request.create_time)}:{last.job_id}"
        return [(scheduled_job(job), result) for job, result in page.items], token

    async def count(self, batch_id: str = "") -> ports.JobCounts:
        counts = await self.schedule.count(_reader(), batch_id)
        return ports.JobCounts(*(counts.get(state, 0) for state in JobState))

    async def cancel(self, job_id: str) -> ports.ScheduledJob:
        return scheduled_job(await self.schedule.cancel(_reader(), job_id))

    async def watch(
        self, job_id: str
    ) -> AsyncGenerator[tuple[ports.ScheduledJob, Sealed | None, Sealed | None], None]:
        async with aclosing(self.schedule.watch(_reader(), job_id)) as changes:
            async for job, partial, result in changes:
                yield scheduled_job(job), partial, result

    async def list_dead_letters(
        self, which: ports.DeadLetterFilter, page_size: int, page_token: str = ""
    ) -> tuple[Sequence[ports.DeadLetter], str]:
        page = await self.schedule.dead_letters(
            _reader(),
            scheduled.DeadLetterFilter(
                "",
                which.error_reason,
                which.model,
                _us(which.create_time_from),
                _us(which.create_time_before),
                which.unreadable,
            ),
            page_size,
            _cursor(page_token),
        )
        token = ""
        if page.more:
            last = page.items[-1]
            token = f"{last.create_us}:{last.dead_letter_id}"
        return [_dead_letter(letter) for letter in page.items], token

    async def dead_letter(self, dead_letter_id: str) -> ports.DeadLetter:
        return _dead_letter(*await self.schedule.dead_letter(_reader(), dead_letter_id))

    async def replay(self, dead_letter_id: str, job: JobRequested) -> ports.ScheduledJob:
        return scheduled_job(await self.schedule.replay(_reader(), dead_letter_id, job))

    async def discard(self, dead_letter_id: str) -> None:
        await self.schedule.discard(_reader(), dead_letter_id)


async def report_one(
    schedule: ports.SchedulePort, job_id: str, fence: int, request_id: str, report: ports.Report
) -> bool:
    """Whether it was taken."""
    (taken,) = await schedule.report([ports.AttemptEnd(job_id, fence, request_id, report)])
    return taken


def scheduled_job(job: Job, request: Sealed | None = None) -> ports.ScheduledJob:
    """As the gateway has it after the wire."""
    waiting = job.state is JobState.WAITING
    succeeded = job.state is JobState.SUCCEEDED
    return ports.ScheduledJob(
        replace(job.request, request=request or Sealed("", b"")),
        job.state,
        job.attempts,
        from_us(job.due_us) if waiting else None,
        from_us(job.end_us) if job.end_us else None,
        job.history,
        job.last_request_id,
        from_us(job.expire_us) if succeeded else None,
        job.error_reason,
        job.progress_tokens,
        job.version,
    )


def _dead_letter(letter: scheduled.DeadLetter, request: Sealed | None = None) -> ports.DeadLetter:
    return ports.DeadLetter(
        letter.dead_letter_id,
        None if letter.job is None else scheduled_job(letter.job, request),
        letter.error_reason,
        letter.detail,
        from_us(letter.create_us),
        from_us(letter.expire_us),
        letter.raw,
        letter.topic,
        letter.partition,
        letter.offset,
    )


def _report(report: ports.Report) -> life.Report:
    match report:
        case ports.Succeeded(result):
            return life.Succeeded(result)
        case ports.Failed(reason, status_code, message, retryable, retry_after_s):
            return life.Failed(reason, status_code, message, retryable, retry_after_s)
        case ports.Postponed(retry_after_s, hold_tenant_s):
            return life.Postponed(retry_after_s, hold_tenant_s)
        case ports.CancelledByTenant():
            return life.CancelledByTenant()


def _us(time: datetime | None) -> int | None:
    return None if time is None else to_us(time)


def _cursor(token: str) -> Cursor | None:
    if not token:
        return None
    time_us, row_id = token.split(":", 1)
    return Cursor(int(time_us), row_id)


def _reader() -> Identity:
    return require_current().identity
