"""Writes a batch's answers and errors: two files, in the order of the input, a line at a time.

The jobs of a batch are submitted at times that grow with their lines, and listed in that order: so the input
and the list are gone through side by side, and neither is ever held.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import msgspec
from msgspec import Raw, Struct

from services.gateway import http_errors
from services.gateway.batches import lines
from services.gateway.batches.lines import InputError, Line
from services.gateway.batches.ports import BatchWork
from services.gateway.batches.request import LineParser, answer, decode_generation
from services.gateway.files.store import FileStore
from services.gateway.generation import Usage
from services.gateway.jobs.ports import JobFilter, ScheduledJob, SchedulePort, Seals
from services.mesh.errors import BY_REASON, DataCorrupt, Internal, LlmosError
from services.mesh.jobs import JobKind, JobRequested, JobState, Sealed

PAGE = 100
QUEUED = 64
"""Lines that wait for the disk."""
_MICROSECOND = timedelta(microseconds=1)


class Answered(Struct):
    """What a request was answered with."""

    status_code: int
    request_id: str
    body: Raw


class Unanswered(Struct):
    """Why a request was not answered at all."""

    code: str
    message: str


class OutputLine(Struct):
    """A line of either file."""

    id: str
    custom_id: str
    response: Answered | None
    error: Unanswered | None


EXPIRED = Unanswered(
    "batch_expired", "This request could not be executed before the completion window expired."
)
CANCELLED = Unanswered("batch_cancelled", "The batch was cancelled before this request was executed.")
GONE = Unanswered("request_lost", "What became of this request is not known any more.")


@dataclass(slots=True)
class Written:
    """What both files hold."""

    completed: int = 0
    failed: int = 0
    expired: bool = False
    usage: Usage = field(default_factory=Usage)


def line_job_id(work: BatchWork, number: int) -> str:
    """The id of a line's job, which is the same whoever makes it."""
    digest = hmac.digest(work.line_key, b"%d" % number, hashlib.sha256)
    return f"job_{digest[:16].hex()}"


def line_time(batch: JobRequested, number: int) -> datetime:
    """When a line's job counts as submitted."""
    return batch.create_time + number * _MICROSECOND


class OutputWriter:
    """Writes the files of a batch."""

    def __init__(self, schedule: SchedulePort, seals: Seals, files: FileStore, parser: LineParser) -> None:
        self._schedule = schedule
        self._seals = seals
        self._files = files
        self._parser = parser

    async def write(
        self,
        batch: JobRequested,
        work: BatchWork,
        output_file_id: str,
        error_file_id: str,
        *,
        cancelled: bool = False,
    ) -> tuple[Written, bool, bool]:
        """What was written, and whether there are answers, and errors. Inside a request of the tenant's.

        Raises what the schedule, the files or the seals raise."""
        try:
            return await self._write(batch, work, output_file_id, error_file_id, cancelled)
        except ExceptionGroup as group:
            raise _first(group) from None

    async def _write(
        self, batch: JobRequested, work: BatchWork, output_file_id: str, error_file_id: str, cancelled: bool
    ) -> tuple[Written, bool, bool]:
        tenant_id, written = batch.identity.tenant_id, Written()
        name = batch.job_id
        outputs = _File(self._files, tenant_id, output_file_id, f"{name}_output.jsonl")
        errors = _File(self._files, tenant_id, error_file_id, f"{name}_error.jsonl")
        async with asyncio.TaskGroup() as group, aclosing(self._jobs(batch.job_id)) as jobs:
            ahead = await anext(jobs, None)
            content = self._files.read(tenant_id, work.input_file_id)
            async with aclosing(content), aclosing(lines.split(content)) as found:
                async for raw in found:
                    line = lines.read(raw, work.endpoint)
                    if isinstance(line, InputError):
                        raise DataCorrupt("A batch's input is not what it was.")
                    due = line_time(batch, line.number)
                    # What is not of this line any more was discarded, or put in another's place.
                    while ahead is not None and ahead[0].job.create_time < due:
                        ahead = await anext(jobs, None)
                    own = ahead is not None and ahead[0].job.job_id == line_job_id(work, line.number)
                    told = self._told(work, line, ahead if own else None, written, cancelled)
                    is_answer = told.response is not None and told.response.status_code == 200
                    written.completed += is_answer
                    written.failed += not is_answer
                    await (outputs if is_answer else errors).put(group, msgspec.json.encode(told) + b"\n")
            await outputs.end()
            await errors.end()
        return written, outputs.begun, errors.begun

    def _told(
        self,
        work: BatchWork,
        line: Line,
        found: tuple[ScheduledJob, Sealed | None] | None,
        written: Written,
        cancelled: bool,
    ) -> OutputLine:
        """A line's end."""
        line_id = f"batch_req_{line_job_id(work, line.number).removeprefix('job_')}"

        def unanswered(why: Unanswered) -> OutputLine:
            return OutputLine(line_id, line.custom_id, None, why)

        def failed(error: LlmosError, request_id: str, parameter: Callable[[str], str] = str) -> OutputLine:
            body = Raw(http_errors.body(error, parameter))
            status = http_errors.status(error)
            return OutputLine(line_id, line.custom_id, Answered(status, request_id, body), None)

        try:
            body = self._parser.body(work.endpoint, line.body)
        except LlmosError as error:
            return failed(error, "")
        if found is None:
            try:
                self._parser.work(work.endpoint, line.body, work.source_address)
            except LlmosError as error:
                return failed(error, "", body.parameter)
            return unanswered(CANCELLED if cancelled else GONE)
        scheduled, sealed = found
        if scheduled.state is JobState.CANCELLED:
            return unanswered(CANCELLED)
        if scheduled.state is JobState.FAILED:
            if _has_expired(scheduled):
                written.expired = True
                return unanswered(EXPIRED)
            attempt = scheduled.history[-1] if scheduled.history else None
            reason = attempt.error_reason if attempt else scheduled.error_reason
            text = attempt.message if attempt else "The request was given up."
            ended = BY_REASON.get(reason, Internal)(text, hint="")
            return failed(ended, attempt.request_id if attempt else "", body.parameter)
        if scheduled.state is not JobState.SUCCEEDED:
            # It came to the schedule only now.
            return unanswered(CANCELLED if cancelled else EXPIRED)
        if sealed is None:
            return unanswered(GONE)
        generation = decode_generation(self._seals.open(sealed, scheduled.job, "result"))
        used, usage = written.usage, generation.usage
        written.usage = Usage(
            used.prompt_tokens + usage.prompt_tokens,
            used.completion_tokens + usage.completion_tokens,
            used.cached_prompt_tokens + usage.cached_prompt_tokens,
        )
        end_time = scheduled.end_time or scheduled.job.create_time
        answered = Raw(answer(work.endpoint, body, generation, int(end_time.timestamp())))
        response = Answered(200, scheduled.last_request_id or generation.started.request_id, answered)
        return OutputLine(line_id, line.custom_id, response, None)

    async def _jobs(self, batch_id: str) -> AsyncGenerator[tuple[ScheduledJob, Sealed | None], None]:
        """The batch's jobs with their results, in the order of the input."""
        which, token = JobFilter(batch_id=batch_id, kinds=frozenset({JobKind.REQUEST})), ""
        while True:
            page, token = await self._schedule.list_jobs(
                which, PAGE, token, with_results=True, oldest_first=True
            )
            for each in page:
                yield each
            if not token:
                return


class _File:
    """A file that comes into being with its first line."""

    def __init__(self, files: FileStore, tenant_id: str, file_id: str, filename: str) -> None:
        self._files = files
        self._tenant_id = tenant_id
        self._file_id = file_id
        self._filename = filename
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(QUEUED)
        self.begun = False

    async def put(self, group: asyncio.TaskGroup, line: bytes) -> None:
        if not self.begun:
            self.begun = True
            group.create_task(
                self._files.write(self._tenant_id, self._file_id, self._filename, self._parts())
            )
        await self._queue.put(line)

    async def end(self) -> None:
        if self.begun:
            await self._queue.put(b"")

    async def _parts(self) -> AsyncIterator[bytes]:
        while line := await self._queue.get():
            yield line


def _first(group: BaseException) -> BaseException:
    """The first of what was raised at the same time."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _has_expired(scheduled: ScheduledJob) -> bool:
    """Whether it could have been tried again, had there been time."""
    return scheduled.end_time is not None and scheduled.end_time >= scheduled.job.give_up_time
