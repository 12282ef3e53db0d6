"""gRPC: messages in, our own types through, messages out; and who may ask."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.logging.v1 import schedule_service_pb2 as pb
from llmos.logging.v1 import schedule_service_pb2_grpc

from services.logging.schedule.job import (
    CancelledByTenant,
    Failed,
    Job,
    Postponed,
    Report,
    Succeeded,
    from_us,
)
from services.logging.schedule.schedule import Schedule
from services.logging.schedule.store import (
    AttemptEnd,
    Beat,
    Cursor,
    DeadLetter,
    DeadLetterFilter,
    JobClaim,
    JobFilter,
)
from services.mesh import job_codec
from services.mesh.context import Identity, require_current
from services.mesh.errors import DataCorrupt, PolicyDenied, RequestInvalid, Violation
from services.mesh.jobs import JobKind, JobRequested, JobState, Sealed
from services.mesh.tokens import GATEWAY

DEFAULT_PAGE = 50
MAX_PAGE_WITH_RESULTS = 100
MAX_CURSOR_US = 2**62
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ScheduleServicer(schedule_service_pb2_grpc.ScheduleServiceServicer):
    """llmos.logging.v1.ScheduleService, for gateways: their workers, and on behalf of their callers."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    async def ClaimJobs(self, request: pb.ClaimJobsRequest, context: _Context) -> pb.ClaimJobsResponse:
        _gateway()
        claims = await self._schedule.claim(
            request.worker,
            request.max_jobs,
            lease_s=job_codec.read_duration(request.lease),
            wait_s=job_codec.read_duration(request.wait),
        )
        response = pb.ClaimJobsResponse()
        for claim in claims:
            _fill_claim(response.claims.add(), claim)
        return response

    async def HeartbeatJobs(
        self, request: pb.HeartbeatJobsRequest, context: _Context
    ) -> pb.HeartbeatJobsResponse:
        _gateway()
        standings = await self._schedule.heartbeat(
            [Beat(beat.job_id, beat.fence, beat.progress_tokens) for beat in request.beats],
            {
                beat.job_id: job_codec.read_sealed(beat.partial)
                for beat in request.beats
                if beat.HasField("partial")
            },
            lease_s=job_codec.read_duration(request.lease),
        )
        response = pb.HeartbeatJobsResponse()
        for beat, (standing, watched) in zip(request.beats, standings, strict=True):
            response.standings.add(
                job_id=beat.job_id, held=standing.held, cancel=standing.cancel, watched=watched
            )
        return response

    async def ReportJobs(self, request: pb.ReportJobsRequest, context: _Context) -> pb.ReportJobsResponse:
        _gateway()
        found = await self._schedule.report(
            [AttemptEnd(each.job_id, each.fence, each.request_id, _report(each)) for each in request.reports]
        )
        return pb.ReportJobsResponse(taken=[each.taken for each in found])

    async def GetJob(self, request: pb.GetJobRequest, context: _Context) -> pb.GetJobResponse:
        job, sealed, result = await self._schedule.get(
            _reader(), request.job_id, wait_s=job_codec.read_duration(request.wait)
        )
        response = pb.GetJobResponse()
        _fill(response.job, job, sealed if job.request.kind is JobKind.BATCH else None)
        if result is not None:
            job_codec.fill_sealed(response.result, result)
        return response

    async def ListJobs(self, request: pb.ListJobsRequest, context: _Context) -> pb.ListJobsResponse:
        limit = request.page_size or DEFAULT_PAGE
        which = JobFilter(
            "",
            frozenset(JobState(state) for state in request.states),
            dict(request.labels),
            request.batch_id,
            frozenset(JobKind(kind) for kind in request.kinds) or frozenset({JobKind.REQUEST}),
        )
        page = await self._schedule.list_jobs(
            _reader(),
            which,
            min(limit, MAX_PAGE_WITH_RESULTS) if request.with_results else limit,
            _unpack(request.page_token),
            with_results=request.with_results,
            oldest_first=request.oldest_first,
        )
        response = pb.ListJobsResponse()
        for job, result in page.items:
            _fill(response.jobs.add(), job)
            if request.with_results:
                added = response.results.add()
                if result is not None:
                    job_codec.fill_sealed(added, result)
        if page.more:
            last = response.jobs[-1].job
            response.next_page_token = _pack(last.create_time.ToMicroseconds(), last.job_id)
        return response

    async def CountJobs(self, request: pb.CountJobsRequest, context: _Context) -> pb.CountJobsResponse:
        counts = await self._schedule.count(_reader(), request.batch_id)
        return pb.CountJobsResponse(
            waiting=counts.get(JobState.WAITING, 0),
            running=counts.get(JobState.RUNNING, 0),
            succeeded=counts.get(JobState.SUCCEEDED, 0),
            failed=counts.get(JobState.FAILED, 0),
            cancelled=counts.get(JobState.CANCELLED, 0),
        )

    async def CancelJob(self, request: pb.CancelJobRequest, context: _Context) -> pb.CancelJobResponse:
        response = pb.CancelJobResponse()
        _fill(response.job, await self._schedule.cancel(_reader(), request.job_id))
        return response

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: _Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        async with aclosing(self._schedule.watch(_reader(), request.job_id)) as changes:
            async for job, partial, result in changes:
                response = pb.WatchJobResponse()
                _fill(response.job, job)
                if partial is not None:
                    job_codec.fill_sealed(response.partial, partial)
                if result is not None:
                    job_codec.fill_sealed(response.result, result)
                yield response

    async def ListDeadLetters(
        self, request: pb.ListDeadLettersRequest, context: _Context
    ) -> pb.ListDeadLettersResponse:
        page = await self._schedule.dead_letters(
            _reader(),
            _filter(request.filter),
            request.page_size or DEFAULT_PAGE,
            _unpack(request.page_token),
        )
        response = pb.ListDeadLettersResponse()
        for letter in page.items:
            _fill_letter(response.dead_letters.add(), letter)
        if page.more:
            last = page.items[-1]
            response.next_page_token = _pack(last.create_us, last.dead_letter_id)
        return response

    async def GetDeadLetter(
        self, request: pb.GetDeadLetterRequest, context: _Context
    ) -> pb.GetDeadLetterResponse:
        letter, sealed = await self._schedule.dead_letter(_reader(), request.dead_letter_id)
        response = pb.GetDeadLetterResponse()
        _fill_letter(response.dead_letter, letter, sealed)
        return response

    async def ReplayDeadLetter(
        self, request: pb.ReplayDeadLetterRequest, context: _Context
    ) -> pb.ReplayDeadLetterResponse:
        reader = _reader()
        job = await self._schedule.replay(reader, request.dead_letter_id, _job(request))
        response = pb.ReplayDeadLetterResponse()
        _fill(response.job, job)
        return response

    async def DiscardDeadLetter(
        self, request: pb.DiscardDeadLetterRequest, context: _Context
    ) -> pb.DiscardDeadLetterResponse:
        await self._schedule.discard(_reader(), request.dead_letter_id)
        return pb.DiscardDeadLetterResponse()


def _gateway() -> None:
    """Raises PolicyDenied for anybody else."""
    if require_current().caller.peer_service != GATEWAY:
        raise PolicyDenied("Only gateways run jobs.")


def _reader() -> Identity:
    """Whom the gateway asks for. Raises PolicyDenied for anybody else's word."""
    request = require_current()
    if request.caller.peer_service != GATEWAY:
        raise PolicyDenied("The schedule is asked through the gateway.")
    return request.identity


def _job(request: pb.ReplayDeadLetterRequest) -> JobRequested:
    try:
        return job_codec.read_job(request.job)
    except DataCorrupt as error:
        raise _invalid("job", f"is {error.message}") from error


def _report(message: pb.JobReport) -> Report:
    match message.WhichOneof("outcome"):
        case "succeeded":
            return Succeeded(job_codec.read_sealed(message.succeeded.result))
        case "failed":
            failed = message.failed
            return Failed(
                job_codec.reason_name(failed.error_reason),
                failed.status_code,
                failed.message,
                failed.retryable,
                job_codec.read_duration(failed.retry_after),
            )
        case "postponed":
            return Postponed(
                job_codec.read_duration(message.postponed.retry_after),
                job_codec.read_duration(message.postponed.hold_tenant),
            )
        case _:
            return CancelledByTenant()


def _filter(message: pb.DeadLetterFilter) -> DeadLetterFilter:
    def time_us(stamp: Timestamp, is_set: bool) -> int | None:
        return stamp.ToMicroseconds() if is_set else None

    return DeadLetterFilter(
        "",
        job_codec.reason_name(message.error_reason),
        message.model,
        time_us(message.create_time_from, message.HasField("create_time_from")),
        time_us(message.create_time_before, message.HasField("create_time_before")),
        message.unreadable,
    )


def _fill_claim(message: pb.Claim, claim: JobClaim) -> None:
    _fill(message.job, claim.job, claim.request)
    message.fence = claim.job.fence
    job_codec.set_time(message.lease_expire_time, from_us(claim.job.lease_us))
    if claim.job.ended is not None:
        _fill(message.ended_job, claim.job.ended)


def _fill(message: pb.ScheduledJob, job: Job, sealed: Sealed | None = None) -> None:
    job_codec.fill_job(message.job, job.request)
    if sealed is not None:
        job_codec.fill_sealed(message.job.request, sealed)
    message.state = job.state.value  # type: ignore[assignment]
    message.attempts = job.attempts
    if job.state is JobState.WAITING:
        job_codec.set_time(message.next_attempt_time, from_us(job.due_us))
    if job.state.is_final:
        job_codec.set_time(message.end_time, from_us(job.end_us))
    if job.state is JobState.SUCCEEDED:
        job_codec.set_time(message.result_expire_time, from_us(job.expire_us))
    for attempt in job.history:
        job_codec.fill_attempt(message.history.add(), attempt)
    message.last_request_id = job.last_request_id
    message.error_reason = job_codec.reason_number(job.error_reason)  # type: ignore[assignment]
    message.progress_tokens = job.progress_tokens
    message.version = job.version


def _fill_letter(message: pb.DeadLetter, letter: DeadLetter, sealed: Sealed | None = None) -> None:
    message.dead_letter_id = letter.dead_letter_id
    if letter.job is not None:
        _fill(message.job, letter.job, sealed)
    message.error_reason = job_codec.reason_number(letter.error_reason)  # type: ignore[assignment]
    message.detail = letter.detail
    job_codec.set_time(message.create_time, from_us(letter.create_us))
    job_codec.set_time(message.expire_time, from_us(letter.expire_us))
    message.raw = letter.raw
    message.topic = letter.topic
    message.partition = letter.partition
    message.offset = letter.offset


def _pack(time_us: int, row_id: str) -> str:
    return base64.urlsafe_b64encode(f"{time_us}:{row_id}".encode()).decode()


def _unpack(token: str) -> Cursor | None:
    """Raises RequestInvalid for what is no token of ours."""
    if not token:
        return None
    try:
        time_us, row_id = base64.urlsafe_b64decode(token.encode()).decode().split(":", 1)
        if abs(int(time_us)) <= MAX_CURSOR_US:
            return Cursor(int(time_us), row_id)
    except (binascii.Error, ValueError) as error:
        raise _invalid("page_token", "is not one that a list returned") from error
    raise _invalid("page_token", "is out of range")


def _invalid(field: str, description: str) -> RequestInvalid:
    return RequestInvalid(
        f"The request is invalid: `{field}` {description}.", violations=[Violation(field, description)]
    )
