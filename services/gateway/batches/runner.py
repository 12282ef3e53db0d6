"""What a worker does with a job of kind BATCH, a step at a time: it checks the input, submits a job a line,
waits until all have ended, and writes the files.

Each step can be done again by whoever takes the batch over: the ids of the jobs are functions of the batch,
and how far it has come, with the ids of its files, is a note in the file store. Between two steps it is
postponed, so that it holds no worker while it waits.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import msgspec

from services.gateway.batches import lines
from services.gateway.batches.lines import Check, InputError
from services.gateway.batches.output import OutputWriter, line_job_id, line_time
from services.gateway.batches.ports import METHOD, BatchOutcome, BatchWork, Progress
from services.gateway.batches.request import LineParser, decode_work, encode_outcome
from services.gateway.files.store import FileStore, Purpose
from services.gateway.jobs.ports import (
    Failed,
    JobClaim,
    JobSpool,
    Postponed,
    Report,
    SchedulePort,
    Seals,
    Succeeded,
)
from services.mesh import context
from services.mesh.clock import Clock
from services.mesh.context import Caller, RequestContext
from services.mesh.errors import LlmosError, NotFound
from services.mesh.interceptors import new_request_id
from services.mesh.jobs import JobKind, JobRequested, JobState, Sealed

SLICE_LINES, SLICE_BYTES = 2000, 16 * 1024 * 1024
"""Submitted in one step; the next follows when the schedule knows them."""
WINDOW = 64
"""Of those, on their way to the disk at once."""
SLICE_PAUSE_S = 0.2
ROOM_PAUSE_S = 5.0
MIN_POLL_S, MAX_POLL_S, POLL_SHARE = 0.25, 30.0, 0.05
"""How often it is looked whether all have ended: a share of how long the batch has run. The schedule wakes
the batch when they have; that is lost where it comes while we look."""
LOST_PAUSE_S = 5.0
RESULT_TTL_S = 7 * 86400.0
"""Of a request's result: longer than any batch takes."""
MAX_ATTEMPTS = 5
"""Of a request."""


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What a batch may cost."""

    max_lines: int
    max_jobs_per_tenant: int
    """A batch waits with further requests while its tenant has so many jobs that have not ended."""


class BatchRunner:
    """Runs batches."""

    def __init__(
        self,
        *,
        schedule: SchedulePort,
        spool: JobSpool,
        seals: Seals,
        files: FileStore,
        parser: LineParser,
        clock: Clock,
        limits: RunnerLimits,
    ) -> None:
        self._schedule = schedule
        self._spool = spool
        self._seals = seals
        self._files = files
        self._parser = parser
        self._clock = clock
        self._limits = limits
        self._output = OutputWriter(schedule, seals, files, parser)

    async def run(self, claim: JobClaim) -> Report:
        """A step of the batch, for the identity in its job: that it may still act is the worker's to ask."""
        job = claim.scheduled.job
        caller = RequestContext(new_request_id(), METHOD, caller=Caller(job.identity))
        token = context.enter(caller)
        try:
            work = decode_work(self._seals.open(job.request, job, "request"))
            return await (self._finish(job, work) if work.finishes_batch_id else self._step(job, work))
        except LlmosError as error:
            return _failed(error)
        finally:
            context.leave(token)

    async def _step(self, job: JobRequested, work: BatchWork) -> Report:
        progress = await self.progress(job)
        if progress is None:
            check = await self._check(job, work)
            if check.errors:
                return self._succeeded(job, BatchOutcome(input_errors=tuple(check.errors)))
            progress = Progress(total=check.lines, in_progress_s=self._now_s())
            await self._note(job, progress)
        window_over = self._clock.now() >= window_end(job, work)
        if not progress.finalizing_s:
            if progress.submitted < progress.total and not window_over:
                paused = await self._submit(job, work, progress)
                if paused is not None:
                    return paused
            if not window_over:
                counts = await self._schedule.count(job.job_id)
                ended = counts.succeeded + counts.failed + counts.cancelled
                if counts.waiting or counts.running or ended < progress.jobs:
                    return Postponed(self._poll_s(progress))
            elif await self._goes_on(job.job_id):
                # Their own time ends with the batch's; the schedule says so in a moment.
                return Postponed(1.0)
        return await self._write(job, job, work, progress)

    async def _check(self, job: JobRequested, work: BatchWork) -> Check:
        check = Check(work.endpoint, self._limits.max_lines)
        content = self._files.read(job.identity.tenant_id, work.input_file_id)
        try:
            async with aclosing(content), aclosing(lines.split(content)) as found:
                async for raw in found:
                    if not check.add(raw):
                        return check
        except NotFound:
            text = f"There is no file {work.input_file_id} any more."
            check.errors.append(InputError(0, "file_not_found", text, "input_file_id"))
            return check
        check.end()
        return check

    async def _submit(self, job: JobRequested, work: BatchWork, progress: Progress) -> Report | None:
        """Submits some more of the requests; None when all are."""
        while progress.submitted < progress.total:
            counts = await self._schedule.count(job.job_id)
            known = counts.waiting + counts.running + counts.succeeded + counts.failed + counts.cancelled
            if known < progress.jobs:
                return Postponed(SLICE_PAUSE_S)
            of_tenant = await self._schedule.count()
            if of_tenant.waiting + of_tenant.running >= self._limits.max_jobs_per_tenant:
                return Postponed(ROOM_PAUSE_S)
            await self._submit_slice(job, work, progress)
            await self._note(job, progress)
        return None

    async def _submit_slice(self, job: JobRequested, work: BatchWork, progress: Progress) -> None:
        waiting: list[asyncio.Future[None]] = []
        size_bytes = count = 0
        content = self._files.read(job.identity.tenant_id, work.input_file_id, progress.offset)
        found = lines.split(content, number=progress.line, offset=progress.offset)
        async with aclosing(content), aclosing(found):
            async for raw in found:
                line = lines.read(raw, work.endpoint)
                if isinstance(line, InputError):
                    raise NotFound("The batch's input is not what it was.")
                try:
                    event = self._line_job(job, work, line)
                except LlmosError:
                    # Its answer is this error; it is found again when the files are written.
                    pass
                else:
                    waiting.append(self._spool.append_job(event))
                    size_bytes += len(event.request.ciphertext)
                    progress.jobs += 1
                progress.submitted += 1
                progress.line, progress.offset = raw.number, raw.next_offset
                count += 1
                if len(waiting) >= WINDOW:
                    await asyncio.gather(*waiting)
                    waiting.clear()
                if count >= SLICE_LINES or size_bytes >= SLICE_BYTES:
                    break
        await asyncio.gather(*waiting)

    def _line_job(self, job: JobRequested, work: BatchWork, line: lines.Line) -> JobRequested:
        """Raises what the route itself would refuse with."""
        valid = self._parser.work(work.endpoint, line.body, work.source_address)
        tenant_id = job.identity.tenant_id
        group = self._seals.keyed_hash(tenant_id, "prefix", valid.model.encode() + b"\0" + valid.prefix)
        event = JobRequested(
            job_id=line_job_id(work, line.number),
            kind=JobKind.REQUEST,
            identity=job.identity,
            method=valid.method,
            model=valid.model,
            request=Sealed("", b""),
            create_time=line_time(job, line.number),
            not_before=job.create_time,
            max_attempts=MAX_ATTEMPTS,
            give_up_time=window_end(job, work),
            result_ttl_s=RESULT_TTL_S,
            prefix_group=group[:16].hex(),
            batch_id=job.job_id,
        )
        return replace(event, request=self._seals.seal(valid.payload, event, "request"))

    async def _write(
        self, job: JobRequested, batch: JobRequested, work: BatchWork, progress: Progress
    ) -> Report:
        """Writes the files of `batch`; the result is that of `job`."""
        if not progress.finalizing_s:
            ttl_s = work.output_ttl_s or None
            progress.finalizing_s = self._now_s()
            progress.output_file_id = self._files.new_id(Purpose.BATCH_OUTPUT, ttl_s)
            progress.error_file_id = self._files.new_id(Purpose.BATCH_OUTPUT, ttl_s)
            await self._note(batch, progress)
        written, answers, errors = await self._output.write(
            batch,
            work,
            progress.output_file_id,
            progress.error_file_id,
            cancelled=job is not batch,
        )
        return self._succeeded(
            job,
            BatchOutcome(
                output_file_id=progress.output_file_id if answers else "",
                error_file_id=progress.error_file_id if errors else "",
                total=written.completed + written.failed,
                completed=written.completed,
                failed=written.failed,
                expired=written.expired,
                in_progress_time=_time(progress.in_progress_s),
                finalizing_time=_time(progress.finalizing_s),
                usage=written.usage,
            ),
        )

    async def _finish(self, job: JobRequested, work: BatchWork) -> Report:
        """Writes what there is of a batch that was cancelled."""
        found, _ = await self._schedule.get(work.finishes_batch_id)
        if not found.state.is_final:
            found = await self._schedule.cancel(work.finishes_batch_id)
        if not found.state.is_final or await self._goes_on(found.job.job_id):
            return Postponed(MIN_POLL_S * 2)
        progress = await self.progress(found.job)
        if found.state is JobState.SUCCEEDED or progress is None:
            return self._succeeded(job, BatchOutcome())
        return await self._write(job, found.job, work, progress)

    async def _goes_on(self, batch_id: str) -> bool:
        counts = await self._schedule.count(batch_id)
        return bool(counts.waiting or counts.running)

    async def progress(self, job: JobRequested) -> Progress | None:
        """How far a batch has come; None: not past its check."""
        note = await self._files.note(job.identity.tenant_id, self._note_name(job))
        return None if note is None else msgspec.json.decode(note, type=Progress)

    async def _note(self, job: JobRequested, progress: Progress) -> None:
        text = msgspec.json.encode(progress)
        await self._files.write_note(job.identity.tenant_id, self._note_name(job), text)

    def _note_name(self, job: JobRequested) -> str:
        return note_name(self._files, job)

    def _succeeded(self, job: JobRequested, outcome: BatchOutcome) -> Succeeded:
        return Succeeded(self._seals.seal(encode_outcome(outcome), job, "result"))

    def _poll_s(self, progress: Progress) -> float:
        age_s = self._now_s() - progress.in_progress_s
        return min(max(age_s * POLL_SHARE, MIN_POLL_S), MAX_POLL_S)

    def _now_s(self) -> float:
        return self._clock.now().timestamp()


def window_end(job: JobRequested, work: BatchWork) -> datetime:
    """When its requests are given up. The batch itself has longer, to write its files."""
    return job.create_time + timedelta(seconds=work.window_s)


def note_name(files: FileStore, job: JobRequested) -> str:
    """Where a batch's progress is noted."""
    return files.note_name(job.job_id, job.create_time.timestamp(), RESULT_TTL_S)


def _failed(error: LlmosError) -> Report:
    """What passes is not an attempt: the batch has its window."""
    if error.retryable:
        return Postponed(error.retry_after_s or LOST_PAUSE_S)
    return Failed(error.reason, int(error.status), error.message, retryable=False)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
