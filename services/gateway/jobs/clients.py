"""The schedule over gRPC: logging's ScheduleService, and the translation to and from its messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import IntEnum
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.events.v1 import events_pb2
from llmos.logging.v1 import schedule_service_pb2 as pb
from llmos.logging.v1 import schedule_service_pb2_grpc

from services.gateway.jobs.ports import (
    AttemptEnd,
    Beat,
    DeadLetter,
    DeadLetterFilter,
    Failed,
    JobClaim,
    JobCounts,
    JobFilter,
    Postponed,
    Report,
    ScheduledJob,
    Standing,
    Succeeded,
)
from services.mesh import job_codec
from services.mesh.channel import Channel
from services.mesh.errors import DeadlineExceeded, DependencyUnavailable
from services.mesh.jobs import JobRequested, JobState, Sealed

TIMEOUT_S = 10.0
"""Of a call, besides what it waits for."""
MAX_MESSAGE = 1024
"""Characters of a report's sentence."""


class GrpcSchedule:
    """A `SchedulePort`. Inside a request, the channel asserts whom it is for, and ends calls with it."""

    def __init__(self, channel: Channel, *, timeout_s: float = TIMEOUT_S) -> None:
        self._stub = schedule_service_pb2_grpc.ScheduleServiceStub(channel)
        self._timeout_s = timeout_s

    async def claim(self, worker: str, max_jobs: int, *, lease_s: float, wait_s: float) -> Sequence[JobClaim]:
        request = pb.ClaimJobsRequest(worker=worker, max_jobs=max_jobs)
        job_codec.set_duration(request.lease, lease_s)
        job_codec.set_duration(request.wait, wait_s)
        with _answering():
            found = await self._stub.ClaimJobs(request, timeout=self._timeout_s + wait_s)
        return [_claim(each) for each in found.claims]

    async def heartbeat(self, beats: Sequence[Beat], *, lease_s: float) -> Sequence[Standing]:
        request = pb.HeartbeatJobsRequest()
        job_codec.set_duration(request.lease, lease_s)
        for beat in beats:
            added = request.beats.add(
                job_id=beat.job_id, fence=beat.fence, progress_tokens=beat.progress_tokens
            )
            if beat.partial is not None:
                job_codec.fill_sealed(added.partial, beat.partial)
        with _answering():
            found = await self._stub.HeartbeatJobs(request, timeout=self._timeout_s)
        return [Standing(each.job_id, each.held, each.cancel, each.watched) for each in found.standings]

    async def report(self, ends: Sequence[AttemptEnd]) -> Sequence[bool]:
        request = pb.ReportJobsRequest()
        for end in ends:
            added = request.reports.add(job_id=end.job_id, fence=end.fence, request_id=end.request_id)
            _fill_report(added, end.report)
        with _answering():
            found = await self._stub.ReportJobs(request, timeout=self._timeout_s)
        return list(found.taken)

    async def get(self, job_id: str, *, wait_s: float = 0.0) -> tuple[ScheduledJob, Sealed | None]:
        request = pb.GetJobRequest(job_id=job_id)
        job_codec.set_duration(request.wait, wait_s)
        with _answering():
            found = await self._stub.GetJob(request, timeout=self._timeout_s + wait_s)
        return _scheduled(found.job), _sealed(found, "result")

    async def list_jobs(
        self,
        which: JobFilter,
        page_size: int,
        page_token: str = "",
        *,
        with_results: bool = False,
        oldest_first: bool = False,
    ) -> tuple[Sequence[tuple[ScheduledJob, Sealed | None]], str]:
        request = pb.ListJobsRequest(
            states=[_same(state) for state in sorted(which.states)],
            labels=which.labels,
            batch_id=which.batch_id,
            kinds=[_same(kind) for kind in sorted(which.kinds)],
            page_size=page_size,
            page_token=page_token,
            with_results=with_results,
            oldest_first=oldest_first,
        )
        with _answering():
            found = await self._stub.ListJobs(request, timeout=self._timeout_s)
        results = [_filled(each) for each in found.results]
        results += [None] * (len(found.jobs) - len(results))
        jobs = [_scheduled(each) for each in found.jobs]
        return list(zip(jobs, results, strict=True)), found.next_page_token

    async def count(self, batch_id: str = "") -> JobCounts:
        with _answering():
            found = await self._stub.CountJobs(
                pb.CountJobsRequest(batch_id=batch_id), timeout=self._timeout_s
            )
        return JobCounts(found.waiting, found.running, found.succeeded, found.failed, found.cancelled)

    async def cancel(self, job_id: str) -> ScheduledJob:
        with _answering():
            found = await self._stub.CancelJob(pb.CancelJobRequest(job_id=job_id), timeout=self._timeout_s)
        return _scheduled(found.job)

    async def watch(
        self, job_id: str
    ) -> AsyncGenerator[tuple[ScheduledJob, Sealed | None, Sealed | None], None]:
        call = self._stub.WatchJob(pb.WatchJobRequest(job_id=job_id))
        try:
            async for found in call:
                yield _scheduled(found.job), _sealed(found, "partial"), _sealed(found, "result")
        finally:
            call.cancel()

    async def list_dead_letters(
        self, which: DeadLetterFilter, page_size: int, page_token: str = ""
    ) -> tuple[Sequence[DeadLetter], str]:
        request = pb.ListDeadLettersRequest(page_size=page_size, page_token=page_token)
        _fill_filter(request.filter, which)
        with _answering():
            found = await self._stub.ListDeadLetters(request, timeout=self._timeout_s)
        return [_dead_letter(each) for each in found.dead_letters], found.next_page_token

    async def dead_letter(self, dead_letter_id: str) -> DeadLetter:
        request = pb.GetDeadLetterRequest(dead_letter_id=dead_letter_id)
        with _answering():
            found = await self._stub.GetDeadLetter(request, timeout=self._timeout_s)
        return _dead_letter(found.dead_letter)

    async def replay(self, dead_letter_id: str, job: JobRequested) -> ScheduledJob:
        request = pb.ReplayDeadLetterRequest(dead_letter_id=dead_letter_id)
        job_codec.fill_job(request.job, job)
        with _answering():
            found = await self._stub.ReplayDeadLetter(request, timeout=self._timeout_s)
        return _scheduled(found.job)

    async def discard(self, dead_letter_id: str) -> None:
        request = pb.DiscardDeadLetterRequest(dead_letter_id=dead_letter_id)
        with _answering():
            await self._stub.DiscardDeadLetter(request, timeout=self._timeout_s)


@contextmanager
def _answering() -> Iterator[None]:
    """A schedule that says nothing in its time is away. (Where the request's own time is over, the chain says
    so.)"""
    try:
        yield
    except DeadlineExceeded as error:
        raise DependencyUnavailable("The schedule of jobs does not answer.") from error


def _fill_report(message: pb.JobReport, report: Report) -> None:
    if isinstance(report, Succeeded):
        job_codec.fill_sealed(message.succeeded.result, report.result)
    elif isinstance(report, Failed):
        failed = message.failed
        failed.error_reason = job_codec.reason_number(report.error_reason)  # type: ignore[assignment]
        failed.status_code = report.status_code
        failed.message = report.message[:MAX_MESSAGE]
        failed.retryable = report.retryable
        job_codec.set_duration(failed.retry_after, report.retry_after_s)
    elif isinstance(report, Postponed):
        job_codec.set_duration(message.postponed.retry_after, report.retry_after_s)
        job_codec.set_duration(message.postponed.hold_tenant, report.hold_tenant_s)
    else:
        message.cancelled.SetInParent()


def _fill_filter(message: pb.DeadLetterFilter, which: DeadLetterFilter) -> None:
    message.error_reason = job_codec.reason_number(which.error_reason)  # type: ignore[assignment]
    message.model = which.model
    message.unreadable = which.unreadable
    if which.create_time_from is not None:
        job_codec.set_time(message.create_time_from, which.create_time_from)
    if which.create_time_before is not None:
        job_codec.set_time(message.create_time_before, which.create_time_before)


def _claim(message: pb.Claim) -> JobClaim:
    return JobClaim(
        scheduled=_scheduled(message.job),
        fence=message.fence,
        lease_expire_time=job_codec.read_time(message.lease_expire_time),
        ended=_scheduled(message.ended_job) if message.HasField("ended_job") else None,
    )


def _scheduled(message: pb.ScheduledJob) -> ScheduledJob:
    return ScheduledJob(
        job=job_codec.read_job(message.job),
        state=JobState(message.state),
        attempts=message.attempts,
        next_attempt_time=_time(message, "next_attempt_time"),
        end_time=_time(message, "end_time"),
        history=tuple(job_codec.read_attempt(each) for each in message.history),
        last_request_id=message.last_request_id,
        result_expire_time=_time(message, "result_expire_time"),
        error_reason=job_codec.reason_name(message.error_reason),
        progress_tokens=message.progress_tokens,
        version=message.version,
    )


def _dead_letter(message: pb.DeadLetter) -> DeadLetter:
    return DeadLetter(
        dead_letter_id=message.dead_letter_id,
        job=_scheduled(message.job) if message.HasField("job") else None,
        error_reason=job_codec.reason_name(message.error_reason),
        detail=message.detail,
        create_time=job_codec.read_time(message.create_time),
        expire_time=job_codec.read_time(message.expire_time),
        raw=message.raw,
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
    )


def _same(number: IntEnum) -> Any:
    """Our enums have the numbers of the protos, which a test keeps so."""
    return number.value


def _time(message: Message, name: str) -> datetime | None:
    if not message.HasField(name):
        return None
    stamp: Timestamp = getattr(message, name)
    return job_codec.read_time(stamp)


def _sealed(message: Message, name: str) -> Sealed | None:
    return job_codec.read_sealed(getattr(message, name)) if message.HasField(name) else None


def _filled(message: events_pb2.SealedPayload) -> Sealed | None:
    return job_codec.read_sealed(message) if message.ciphertext else None
