"""Jobs, what they give, and what was given up. Times are aware, in UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.common.v1 import error_reason_pb2
from llmos.gateway.v1 import job_service_pb2 as pb

from llmos_client.generation_types import Completion, to_datetime


class JobState(StrEnum):
    """Where a job stands."""

    UNKNOWN = "unknown"
    """A state of a later version of the server."""
    WAITING = "waiting"
    """For its time, for a worker or for its next attempt."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Given up: it is a dead letter."""
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class JobPriority(StrEnum):
    """Which of a tenant's waiting jobs go first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


@dataclass(frozen=True)
class RetryOnFailure:
    """What becomes of a request that fails for a passing reason: a job, which is tried again."""

    max_attempts: int = 5
    """How often in all, the first time included; 2 to 20."""
    give_up_after_s: float = 86_400.0
    """How long after the first attempt another may begin; 7 days at most."""


@dataclass(frozen=True)
class JobError:
    """Why an attempt failed."""

    reason: str
    """The name of an ErrorReason, without its prefix."""
    status_code: int
    """gRPC's."""
    message: str

    @classmethod
    def from_proto(cls, error: pb.JobError) -> JobError:
        return cls(reason_name(error.reason), error.status_code, error.message)


@dataclass(frozen=True)
class JobAttempt:
    """An attempt that failed."""

    number: int
    """The first is 1."""
    request_id: str
    """Finds it in the audit log; empty where its gateway was lost before it could say so."""
    start_time: datetime | None
    end_time: datetime | None
    error: JobError

    @classmethod
    def from_proto(cls, attempt: pb.JobAttempt) -> JobAttempt:
        return cls(
            attempt.number,
            attempt.request_id,
            _time(attempt, "start_time"),
            _time(attempt, "end_time"),
            JobError.from_proto(attempt.error),
        )


@dataclass(frozen=True)
class JobResult:
    """What a job gave."""

    response: ProtoMessage
    """The answer of the request that ran, such as a GenerateResponse or an EmbedResponse."""
    completion: Completion | None
    """The same, where it was a generation."""

    @property
    def text(self) -> str:
        """The text of the first choice; empty where the job was no generation."""
        return self.completion.text if self.completion else ""

    @classmethod
    def from_proto(cls, result: pb.JobResult) -> JobResult | None:
        kind = result.WhichOneof("response")
        if kind is None:  # of a later version of the server
            return None
        completion = Completion.from_proto(result.generate, "") if kind == "generate" else None
        return cls(getattr(result, kind), completion)


@dataclass(frozen=True)
class Job:
    """A job. It holds no text of the caller's but its labels, and its result where that was asked for."""

    id: str
    state: JobState
    method: str
    """The full gRPC method name that it runs."""
    model: str
    priority: JobPriority
    attempts: int
    """How often it was tried, a running attempt included."""
    max_attempts: int
    create_time: datetime | None
    next_attempt_time: datetime | None
    """While it waits: the earliest time of its next attempt."""
    give_up_time: datetime | None
    end_time: datetime | None
    result_expire_time: datetime | None
    """When the result is deleted."""
    last_error: JobError | None
    """Why the last attempt failed; None where none has."""
    last_request_id: str
    """Finds the last attempt in the audit log; empty before the first."""
    progress_tokens: int
    """Tokens that a running attempt has made so far."""
    labels: Mapping[str, str]
    batch_id: str
    """Of `submit_many`; otherwise empty."""
    failed_attempts: tuple[JobAttempt, ...]
    """The oldest first; the newest 20."""
    result: JobResult | None = None
    """Of a job that has succeeded, from `get`, `list` with results and at the end of `watch`, until
    `result_expire_time`."""
    raw: pb.Job = field(default_factory=pb.Job, repr=False, compare=False, hash=False)

    @classmethod
    def from_proto(cls, job: pb.Job, result: pb.JobResult | None = None) -> Job:
        return cls(
            id=job.id,
            state=_STATES.get(job.state, JobState.UNKNOWN),
            method=job.method,
            model=job.model,
            priority=_PRIORITIES.get(job.priority, JobPriority.NORMAL),
            attempts=job.attempts,
            max_attempts=job.max_attempts,
            create_time=_time(job, "create_time"),
            next_attempt_time=_time(job, "next_attempt_time"),
            give_up_time=_time(job, "give_up_time"),
            end_time=_time(job, "end_time"),
            result_expire_time=_time(job, "result_expire_time"),
            last_error=JobError.from_proto(job.last_error) if job.HasField("last_error") else None,
            last_request_id=job.last_request_id,
            progress_tokens=job.progress_tokens,
            labels=dict(job.labels),
            batch_id=job.batch_id,
            failed_attempts=tuple(JobAttempt.from_proto(attempt) for attempt in job.failed_attempts),
            result=JobResult.from_proto(result) if result is not None else None,
            raw=job,
        )


@dataclass(frozen=True)
class JobUpdate:
    """A job at one time, while it is watched."""

    job: Job
    partial_texts: tuple[str, ...]
    """While it runs: the text of each choice so far, cut at 16 KiB in all. A new attempt begins anew."""


@dataclass(frozen=True)
class JobRefusal:
    """One of many jobs that was not taken."""

    index: int
    """Its place in what was handed in, from 0."""
    error: JobError


@dataclass(frozen=True)
class SubmittedJobs:
    """What became of many jobs."""

    batch_id: str
    """By which those that were taken are counted and listed."""
    job_ids: tuple[str, ...]
    """Of those that were taken, in order."""
    refusals: tuple[JobRefusal, ...]
    raw: pb.SubmitJobsResponse = field(
        default_factory=pb.SubmitJobsResponse, repr=False, compare=False, hash=False
    )

    @classmethod
    def from_proto(cls, response: pb.SubmitJobsResponse) -> SubmittedJobs:
        return cls(
            response.batch_id,
            tuple(response.job_ids),
            tuple(JobRefusal(one.index, JobError.from_proto(one.error)) for one in response.refusals),
            response,
        )


@dataclass(frozen=True)
class JobCounts:
    """How many jobs stand where."""

    waiting: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def unfinished(self) -> int:
        return self.waiting + self.running

    @property
    def total(self) -> int:
        return self.unfinished + self.succeeded + self.failed + self.cancelled

    @classmethod
    def from_proto(cls, counts: pb.CountJobsResponse) -> JobCounts:
        return cls(counts.waiting, counts.running, counts.succeeded, counts.failed, counts.cancelled)


@dataclass(frozen=True)
class DeadLetter:
    """Something that was given up."""

    id: str
    job: Job | None
    """None where it is an event that could not be read."""
    error: JobError
    """Why it was given up."""
    create_time: datetime | None
    expire_time: datetime | None
    """When it is deleted."""
    topic: str
    """Of an event that could not be read: where it came from."""
    place: str
    """Where in the topic it stood, as `PARTITION/OFFSET`."""
    raw: pb.DeadLetter = field(default_factory=pb.DeadLetter, repr=False, compare=False, hash=False)

    @classmethod
    def from_proto(cls, letter: pb.DeadLetter) -> DeadLetter:
        return cls(
            id=letter.id,
            job=Job.from_proto(letter.job) if letter.HasField("job") else None,
            error=JobError.from_proto(letter.error),
            create_time=_time(letter, "create_time"),
            expire_time=_time(letter, "expire_time"),
            topic=letter.topic,
            place=letter.place,
            raw=letter,
        )


@dataclass(frozen=True)
class ReplayedDeadLetter:
    """A dead letter that runs again as a new job, or cannot."""

    dead_letter_id: str
    job: Job | None
    """The new job; None where it could not be replayed."""
    error: JobError | None
    """Why it could not."""
    raw: pb.ReplayDeadLettersResponse = field(
        default_factory=pb.ReplayDeadLettersResponse, repr=False, compare=False, hash=False
    )

    @classmethod
    def from_proto(cls, response: pb.ReplayDeadLettersResponse) -> ReplayedDeadLetter:
        return cls(
            response.dead_letter_id,
            Job.from_proto(response.job) if response.HasField("job") else None,
            JobError.from_proto(response.error) if response.HasField("error") else None,
            response,
        )


def reason_name(number: int) -> str:
    """Of an ErrorReason, without its prefix; the number where it is one of a later version."""
    return _REASONS.get(number, str(number))


def reason_number(name: str) -> error_reason_pb2.ErrorReason.ValueType:
    """Raises ValueError where there is none of this name."""
    try:
        return error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{name}")
    except ValueError:
        raise ValueError(f"{name!r} is no reason of an error, such as NO_REPLICA") from None


def state_number(state: JobState) -> pb.JobState.ValueType:
    """As the protocol has it. Raises ValueError for UNKNOWN."""
    return pb.JobState.Value(f"JOB_STATE_{state.name}")


def priority_number(priority: JobPriority) -> pb.JobPriority.ValueType:
    """As the protocol has it."""
    return pb.JobPriority.Value(f"JOB_PRIORITY_{priority.name}")


def _time(message: Any, name: str) -> datetime | None:
    if not message.HasField(name):
        return None
    timestamp: Timestamp = getattr(message, name)
    return to_datetime(timestamp)


_REASONS: dict[int, str] = {
    number: name.removeprefix("ERROR_REASON_") if number else ""
    for name, number in error_reason_pb2.ErrorReason.items()
}
_STATES: dict[int, JobState] = {
    number: JobState(name.removeprefix("JOB_STATE_").lower())
    for name, number in pb.JobState.items()
    if number and name.removeprefix("JOB_STATE_") in JobState.__members__
}
_PRIORITIES: dict[int, JobPriority] = {
    number: JobPriority(name.removeprefix("JOB_PRIORITY_").lower())
    for name, number in pb.JobPriority.items()
    if number and name.removeprefix("JOB_PRIORITY_") in JobPriority.__members__
}
