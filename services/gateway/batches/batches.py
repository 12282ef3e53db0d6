"""Batches for their callers: taken, looked at, listed and cancelled.

A batch that is cancelled ends at once in the schedule, and its requests with it. What there is of it by then
is written by another job, the finisher, whose id is a function of the batch's: it is submitted first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from services.gateway.auditing import RequestRecord
from services.gateway.batches.ports import (
    BATCH_PREFIX,
    FINISHER_PREFIX,
    METHOD,
    BatchOutcome,
    BatchWork,
    Progress,
)
from services.gateway.batches.request import decode_outcome, decode_work, encode_work
from services.gateway.batches.runner import BatchRunner, window_end
from services.gateway.files.store import FileStore, Purpose
from services.gateway.jobs.ports import JobCounts, JobFilter, JobSpool, ScheduledJob, SchedulePort, Seals
from services.gateway.openai.parsing import refuse
from services.mesh.clock import Clock
from services.mesh.errors import Conflict, DependencyUnavailable, NotFound
from services.mesh.jobs import JobKind, JobPriority, JobRequested, JobState, Sealed
from services.mesh.randomness import random_bytes

KNOWN_WAIT_S = 2.0
FINISH_S = 6 * 3600
"""How long after its window a batch may still write its files."""
KEPT_S = 30 * 86400.0
"""How long a batch that has ended is known."""
MAX_LOSSES = 20
"""So often the worker of a batch may be lost."""
MAX_LISTED = 10_000
PAGE = 1000


class Status(StrEnum):
    """Where a batch stands, in OpenAI's words."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as its owner sees it."""

    batch_id: str
    status: Status
    work: BatchWork
    create_time: datetime
    expire_time: datetime
    outcome: BatchOutcome = field(default_factory=BatchOutcome)
    """As far as it is known."""
    end_time: datetime | None = None
    cancel_time: datetime | None = None
    error: str = ""
    """Why it failed, where it was not for its input."""


class Batches:
    """The use case. All inside a request of the tenant's."""

    def __init__(
        self,
        *,
        schedule: SchedulePort,
        spool: JobSpool,
        seals: Seals,
        files: FileStore,
        runner: BatchRunner,
        clock: Clock,
    ) -> None:
        self._schedule = schedule
        self._spool = spool
        self._seals = seals
        self._files = files
        self._runner = runner
        self._clock = clock

    async def create(self, record: RequestRecord, work: BatchWork) -> Batch:
        """Takes a batch. Raises RequestInvalid, RateLimit, AuditUnavailable or DependencyUnavailable."""
        tenant_id = record.identity.tenant_id
        try:
            file = await self._files.stat(tenant_id, work.input_file_id)
        except NotFound:
            raise refuse("input_file_id", "names no file") from None
        if file.purpose is not Purpose.BATCH:
            raise refuse("input_file_id", "names a file that was not uploaded for a batch")
        await self._files.check_room(tenant_id)
        record.begin()
        await record.committed()
        work = replace(work, line_key=random_bytes(32), source_address=record.source_address)
        job = self._job(record, BATCH_PREFIX + random_bytes(16).hex(), work)
        await self._submit(job)
        return self._view(job, work, None, None, JobCounts())

    async def get(self, batch_id: str) -> Batch:
        """Raises NotFound or DependencyUnavailable."""
        if not batch_id.startswith(BATCH_PREFIX):
            raise _missing()
        found, sealed = await self._schedule.get(batch_id)
        if found.job.kind is not JobKind.BATCH:
            raise _missing()
        return await self._seen(found, sealed)

    async def list(self, *, limit: int, after: str = "") -> tuple[Sequence[Batch], bool]:
        """A page, newest first, and whether there is more."""
        named: list[str] = []
        token, seen, skipping = "", 0, bool(after)
        which = JobFilter(kinds=frozenset({JobKind.BATCH}))
        while len(named) <= limit and seen < MAX_LISTED:
            page, token = await self._schedule.list_jobs(which, PAGE if skipping else limit + 1, token)
            for found, _ in page:
                batch_id = found.job.job_id
                if not skipping and batch_id.startswith(BATCH_PREFIX):
                    named.append(batch_id)
                skipping = skipping and batch_id != after
            seen += len(page)
            if not token:
                break
        batches = await asyncio.gather(*(self.get(batch_id) for batch_id in named[:limit]))
        return batches, len(named) > limit

    async def cancel(self, record: RequestRecord, batch_id: str) -> Batch:
        """Raises NotFound, Conflict where it has ended otherwise, DependencyUnavailable."""
        batch = await self.get(batch_id)
        record.begin()
        await record.committed()
        if batch.status in (Status.CANCELLING, Status.CANCELLED):
            return batch
        if batch.end_time is not None:
            raise Conflict(f"The batch is {batch.status} already.", hint="", retryable=False)
        work = replace(batch.work, finishes_batch_id=batch_id)
        await self._submit(self._job(record, _finisher(batch_id), work))
        await self._schedule.cancel(batch_id)
        return await self.get(batch_id)

    async def _seen(self, found: ScheduledJob, sealed: Sealed | None) -> Batch:
        job = found.job
        work = decode_work(self._seals.open(job.request, job, "request"))
        if found.state is JobState.SUCCEEDED and sealed is not None:
            outcome = decode_outcome(self._seals.open(sealed, job, "result"))
            return self._view(job, work, found, outcome, JobCounts())
        finisher, result = None, None
        try:
            finisher, sealed = await self._schedule.get(_finisher(job.job_id))
            if sealed is not None:
                result = decode_outcome(self._seals.open(sealed, finisher.job, "result"))
        except NotFound:
            pass
        if result is not None and found.state.is_final:
            return self._view(job, work, found, result, JobCounts(), finisher)
        progress = await self._runner.progress(job)
        counts = await self._schedule.count(job.job_id) if progress else JobCounts()
        outcome = BatchOutcome() if progress is None else _so_far(progress, counts)
        return self._view(job, work, found, outcome, counts, finisher)

    def _view(
        self,
        job: JobRequested,
        work: BatchWork,
        found: ScheduledJob | None,
        outcome: BatchOutcome | None,
        counts: JobCounts,
        finisher: ScheduledJob | None = None,
    ) -> Batch:
        outcome = outcome or BatchOutcome()
        state = found.state if found else JobState.WAITING
        error, end_time, cancel_time = "", None, None
        live = counts.waiting or counts.running
        if finisher is not None and state is not JobState.SUCCEEDED:
            status = Status.CANCELLED if finisher.state.is_final else Status.CANCELLING
            end_time, cancel_time = finisher.end_time, finisher.job.create_time
        elif state is JobState.CANCELLED:
            status = Status.CANCELLED
            end_time = cancel_time = found.end_time if found else None
        elif state is JobState.FAILED:
            status = Status.FAILED
            end_time = found.end_time if found else None
            error = found.history[-1].message if found and found.history else "The batch was given up."
        elif state is JobState.SUCCEEDED:
            end_time = found.end_time if found else None
            if outcome.input_errors:
                status = Status.FAILED
            else:
                status = Status.EXPIRED if outcome.expired else Status.COMPLETED
        elif outcome.in_progress_time is None:
            status = Status.VALIDATING
        elif outcome.finalizing_time is not None or (
            not live and outcome.completed + outcome.failed >= outcome.total
        ):
            status = Status.FINALIZING
        else:
            status = Status.IN_PROGRESS
        return Batch(
            batch_id=job.job_id,
            status=status,
            work=work,
            create_time=job.create_time,
            expire_time=window_end(job, work),
            outcome=outcome,
            end_time=end_time,
            cancel_time=cancel_time,
            error=error,
        )

    def _job(self, record: RequestRecord, job_id: str, work: BatchWork) -> JobRequested:
        now = self._clock.now()
        job = JobRequested(
            job_id=job_id,
            kind=JobKind.BATCH,
            identity=record.identity,
            method=METHOD,
            model="",
            request=Sealed("", b""),
            create_time=now,
            not_before=now,
            max_attempts=MAX_LOSSES,
            give_up_time=now + timedelta(seconds=work.window_s + FINISH_S),
            result_ttl_s=KEPT_S,
            # Before the requests of all batches, or none would ever be seen to end.
            priority=JobPriority.HIGH,
        )
        return replace(job, request=self._seals.seal(encode_work(work), job, "request"))

    async def _submit(self, job: JobRequested) -> None:
        """It is on this machine's disk then, and as a rule the schedule knows it."""
        await self._spool.append_job(job)
        try:
            await self._schedule.get(job.job_id, wait_s=KNOWN_WAIT_S)
        except (NotFound, DependencyUnavailable):
            return


def _so_far(progress: Progress, counts: JobCounts) -> BatchOutcome:
    def time(seconds: float) -> datetime | None:
        return datetime.fromtimestamp(seconds, UTC) if seconds else None

    return BatchOutcome(
        total=progress.total,
        completed=counts.succeeded,
        failed=counts.failed + counts.cancelled + progress.submitted - progress.jobs,
        in_progress_time=time(progress.in_progress_s),
        finalizing_time=time(progress.finalizing_s),
    )


def _finisher(batch_id: str) -> str:
    return FINISHER_PREFIX + batch_id.removeprefix(BATCH_PREFIX)


def _missing() -> NotFound:
    return NotFound("There is no such batch.")
