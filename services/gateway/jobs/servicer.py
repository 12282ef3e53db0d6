"""The gRPC edge of jobs: parse, call the use case, translate."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from enum import IntEnum
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from llmos.gateway.v1 import job_service_pb2 as pb
from llmos.gateway.v1 import job_service_pb2_grpc
from llmos.jobs.v1 import payload_pb2

from services.gateway.auditing import current_record
from services.gateway.jobs import request as requests
from services.gateway.jobs.dead_letters import DeadLetters
from services.gateway.jobs.ports import DeadLetter, ScheduledJob, SchedulePort, Seals
from services.gateway.jobs.request import JobParser
from services.gateway.jobs.submission import Submissions
from services.gateway.jobs.work import ValidSubmission
from services.gateway.request import validate
from services.mesh.errors import BY_REASON, DataCorrupt, Internal, LlmosError, NotFound
from services.mesh.job_codec import reason_number, set_time
from services.mesh.jobs import JobAttempt, JobKind, JobState, Sealed

Context = grpc.aio.ServicerContext[Any, Any]
PAGE_SIZE = 50


class JobServicer(job_service_pb2_grpc.JobServiceServicer):
    """llmos.gateway.v1.JobService"""

    def __init__(
        self,
        *,
        parser: JobParser,
        submissions: Submissions,
        dead_letters: DeadLetters,
        schedule: SchedulePort,
        seals: Seals,
    ) -> None:
        self._parser = parser
        self._submissions = submissions
        self._dead_letters = dead_letters
        self._schedule = schedule
        self._seals = seals

    async def SubmitJob(self, request: pb.SubmitJobRequest, context: Context) -> pb.SubmitJobResponse:
        record = current_record()
        submission = self._parser.submission(request, record.source_address)
        found = await self._submissions.submit(record, submission)
        return pb.SubmitJobResponse(job=_job(found))

    async def SubmitJobs(
        self, request: AsyncIterator[pb.SubmitJobsRequest], context: Context
    ) -> pb.SubmitJobsResponse:
        record = current_record()

        async def parsed() -> AsyncGenerator[ValidSubmission | LlmosError, None]:
            async for each in request:
                try:
                    validate(each)
                    yield self._parser.submission(each.job, record.source_address)
                except LlmosError as error:
                    yield error

        async with aclosing(parsed()) as given:
            taken = await self._submissions.submit_all(record, given)
        response = pb.SubmitJobsResponse(batch_id=taken.batch_id, job_ids=taken.job_ids)
        for index, error in taken.refusals:
            response.refusals.add(index=index, error=_error(error))
        return response

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        validate(request)
        record = current_record()
        record.begin()
        found, result = await self._schedule.get(request.id)
        _check_kind(found)
        response = pb.GetJobResponse(job=_job(found))
        if result is not None:
            response.result.CopyFrom(self._result(found, result))
        await record.committed()
        return response

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        which = requests.job_filter(request)
        record = current_record()
        record.begin()
        page_size = request.page_size or PAGE_SIZE
        found, token = await self._schedule.list_jobs(
            which, page_size, request.page_token, with_results=request.with_results
        )
        response = pb.ListJobsResponse(jobs=[_job(each) for each, _ in found], next_page_token=token)
        if request.with_results:
            for each, result in found:
                added = response.results.add()
                if result is not None:
                    added.CopyFrom(self._result(each, result))
        await record.committed()
        return response

    async def CountJobs(self, request: pb.CountJobsRequest, context: Context) -> pb.CountJobsResponse:
        validate(request)
        record = current_record()
        record.begin()
        found = await self._schedule.count(request.batch_id)
        await record.committed()
        return pb.CountJobsResponse(
            waiting=found.waiting,
            running=found.running,
            succeeded=found.succeeded,
            failed=found.failed,
            cancelled=found.cancelled,
        )

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:
        validate(request)
        record = current_record()
        record.begin()
        await record.committed()
        return pb.CancelJobResponse(job=_job(await self._schedule.cancel(request.id)))

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        validate(request)
        record = current_record()
        record.begin()
        await record.committed()
        async with aclosing(self._schedule.watch(request.id)) as changes:
            async for found, partial, result in changes:
                _check_kind(found)
                response = pb.WatchJobResponse(job=_job(found))
                if result is not None:
                    response.result.CopyFrom(self._result(found, result))
                if partial is not None:
                    response.partial_texts.extend(self._partial(found, partial))
                yield response
        record.complete()

    async def ListDeadLetters(
        self, request: pb.ListDeadLettersRequest, context: Context
    ) -> pb.ListDeadLettersResponse:
        validate(request)
        which = requests.dead_letter_filter(request.filter)
        record = current_record()
        record.begin()
        page_size = request.page_size or PAGE_SIZE
        found, token = await self._dead_letters.found(which, page_size, request.page_token)
        await record.committed()
        return pb.ListDeadLettersResponse(
            dead_letters=[_dead_letter(each) for each in found], next_page_token=token
        )

    async def ReplayDeadLetter(
        self, request: pb.ReplayDeadLetterRequest, context: Context
    ) -> pb.ReplayDeadLetterResponse:
        again = requests.again(request)
        record = current_record()
        record.begin()
        await record.committed()
        found = await self._dead_letters.replay(record, request.id, again)
        return pb.ReplayDeadLetterResponse(job=_job(found))

    async def ReplayDeadLetters(
        self, request: pb.ReplayDeadLettersRequest, context: Context
    ) -> AsyncIterator[pb.ReplayDeadLettersResponse]:
        again = requests.again(request)
        which = requests.dead_letter_filter(request.filter)
        record = current_record()
        record.begin()
        await record.committed()
        async with aclosing(self._dead_letters.replay_all(record, which, again)) as replayed:
            async for each in replayed:
                response = pb.ReplayDeadLettersResponse(dead_letter_id=each.dead_letter_id)
                if each.job is not None:
                    response.job.CopyFrom(_job(each.job))
                if each.error is not None:
                    response.error.CopyFrom(_error(each.error))
                yield response
        record.complete()

    async def DiscardDeadLetter(
        self, request: pb.DiscardDeadLetterRequest, context: Context
    ) -> pb.DiscardDeadLetterResponse:
        validate(request)
        record = current_record()
        record.begin()
        await record.committed()
        await self._dead_letters.discard(request.id)
        return pb.DiscardDeadLetterResponse()

    def _result(self, found: ScheduledJob, result: Sealed) -> pb.JobResult:
        try:
            return pb.JobResult.FromString(self._seals.open(result, found.job, "result"))
        except DecodeError:
            raise DataCorrupt("The job's result cannot be read.") from None

    def _partial(self, found: ScheduledJob, partial: Sealed) -> list[str]:
        try:
            opened = payload_pb2.PartialResult.FromString(self._seals.open(partial, found.job, "partial"))
        except DecodeError:
            raise DataCorrupt("The job's partial result cannot be read.") from None
        return list(opened.texts)


def _check_kind(found: ScheduledJob) -> None:
    """Batches are seen at their own routes. Raises NotFound."""
    if found.job.kind is not JobKind.REQUEST:
        raise NotFound(f"There is no job `{found.job.job_id}`.")


def _job(found: ScheduledJob) -> pb.Job:
    job, last = found.job, found.history[-1] if found.history else None
    message = pb.Job(
        id=job.job_id,
        state=_same(found.state),
        method=job.method,
        model=job.model,
        attempts=found.attempts,
        max_attempts=job.max_attempts,
        last_request_id=found.last_request_id or (last.request_id if last else ""),
        labels=job.labels,
        batch_id=job.batch_id,
        priority=_same(job.priority),
        progress_tokens=found.progress_tokens,
        failed_attempts=[_attempt(each) for each in found.history],
    )
    set_time(message.create_time, job.create_time)
    set_time(message.give_up_time, job.give_up_time)
    if found.next_attempt_time is not None and found.state is JobState.WAITING:
        set_time(message.next_attempt_time, found.next_attempt_time)
    if found.end_time is not None:
        set_time(message.end_time, found.end_time)
    if found.result_expire_time is not None:
        set_time(message.result_expire_time, found.result_expire_time)
    if last is not None:
        message.last_error.CopyFrom(_attempt(last).error)
    if found.error_reason and (last is None or last.error_reason != found.error_reason):
        # It was given up for another reason than that an attempt failed.
        message.last_error.CopyFrom(_reason(found.error_reason))
    return message


def _attempt(attempt: JobAttempt) -> pb.JobAttempt:
    message = pb.JobAttempt(number=attempt.number, request_id=attempt.request_id)
    set_time(message.start_time, attempt.start_time)
    set_time(message.end_time, attempt.end_time)
    message.error.reason = _number(attempt.error_reason)
    message.error.status_code = attempt.status_code
    message.error.message = attempt.message
    return message


def _dead_letter(letter: DeadLetter) -> pb.DeadLetter:
    message = pb.DeadLetter(id=letter.dead_letter_id, error=_reason(letter.error_reason, letter.detail))
    set_time(message.create_time, letter.create_time)
    set_time(message.expire_time, letter.expire_time)
    if letter.job is not None:
        message.job.CopyFrom(_job(letter.job))
    else:
        message.topic = letter.topic
        message.place = f"{letter.partition}/{letter.offset}"
    return message


def _error(error: LlmosError) -> pb.JobError:
    said = "An internal error occurred." if type(error) is Internal else error.message
    return pb.JobError(reason=_number(error.reason), status_code=int(error.status), message=said)


def _reason(reason: str, message: str = "") -> pb.JobError:
    status = BY_REASON[reason].status if reason in BY_REASON else Internal.status
    return pb.JobError(reason=_number(reason), status_code=int(status), message=message)


def _number(reason: str) -> Any:
    return reason_number(reason)


def _same(number: IntEnum) -> Any:
    """Our enums have the numbers of the protos, which a test keeps so."""
    return number.value
