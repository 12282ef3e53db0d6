"""Jobs as bytes: our own types (`jobs`) to the messages of `llmos.events.v1`, and back.

What is read is checked against the rules that stand in the protos, so that nobody after this has to. A job
event in a spool is an envelope without its place, as any other (`event_codec.complete` adds it); one that
logging publishes on its own account has no place, and an id that is a function of what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.common.v1 import identity_pb2
from llmos.events.v1 import events_pb2

from services.mesh import validation
from services.mesh.audit_protocol import Place
from services.mesh.context import Identity
from services.mesh.errors import DataCorrupt, RequestInvalid
from services.mesh.event_codec import REASONS, parse_envelope, read_floor_and_place
from services.mesh.jobs import (
    DeadLettered,
    JobAttempt,
    JobEvent,
    JobKind,
    JobPriority,
    JobRequested,
    RetryRequested,
    Sealed,
)

M = TypeVar("M", bound=Message)

MAX_EVENT_BYTES = 1_000_000
"""Of a job event's body: with its place, its key and its headers it fits into the 1 MiB that brokers take."""
MAX_DETAIL = 1024
"""Characters of a dead letter's or an attempt's sentence."""
_REASON_NAMES: Mapping[int, str] = {number: name for name, number in REASONS.items()}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class JobEventRead:
    """A job event as it came from Kafka."""

    producer: str
    place: Place | None
    """In its producer's spool; None of one that logging wrote."""
    floor: int
    event: JobEvent


def encode(event: JobEvent, *, source: str, producer: str, time: datetime, event_id: str = "") -> bytes:
    """The envelope, without a place; `event_id` is for events that never get one."""
    envelope = events_pb2.EventEnvelope(id=event_id, source=source, producer=producer)
    set_time(envelope.time, time)
    if isinstance(event, JobRequested):
        fill_job(envelope.job, event)
        envelope.type = events_pb2.JobRequested.DESCRIPTOR.full_name
    elif isinstance(event, RetryRequested):
        fill_retry(envelope.retry, event)
        envelope.type = events_pb2.RetryRequested.DESCRIPTOR.full_name
    else:
        fill_dead_letter(envelope.dead_letter, event)
        envelope.type = events_pb2.DeadLettered.DESCRIPTOR.full_name
    return envelope.SerializeToString()


def read(value: bytes) -> JobEventRead:
    """Raises DataCorrupt, which says what is wrong, for what is no job event of ours."""
    envelope = parse_envelope(value)
    floor, place = 0, None
    if envelope.epoch or envelope.sequence:
        floor, place = read_floor_and_place(envelope)
    kind = envelope.WhichOneof("payload")
    event: JobEvent
    if kind == "job":
        event = read_job(_valid(envelope.job))
    elif kind == "retry":
        event = read_retry(_valid(envelope.retry))
    elif kind == "dead_letter":
        event = read_dead_letter(_valid(envelope.dead_letter))
    else:
        raise DataCorrupt("no event of a job that this version knows")
    return JobEventRead(envelope.producer, place, floor, event)


def fill_job(message: events_pb2.JobRequested, job: JobRequested) -> None:
    """Writes a job into an empty message."""
    message.job_id = job.job_id
    message.kind = int(job.kind)  # type: ignore[assignment]
    fill_identity(message.identity, job.identity)
    message.method = job.method
    message.model = job.model
    fill_sealed(message.request, job.request)
    set_time(message.create_time, job.create_time)
    set_time(message.not_before_time, job.not_before)
    set_time(message.give_up_time, job.give_up_time)
    message.max_attempts = job.max_attempts
    set_duration(message.result_ttl, job.result_ttl_s)
    message.priority = int(job.priority)  # type: ignore[assignment]
    message.labels.update(job.labels)
    message.prefix_group = job.prefix_group
    message.batch_id = job.batch_id
    message.request_digest = job.request_digest
    message.has_webhook = job.has_webhook


def read_job(message: events_pb2.JobRequested) -> JobRequested:
    """A job of a message that its rules were checked on. Raises DataCorrupt."""
    if not (message.HasField("create_time") and message.HasField("give_up_time")):
        raise DataCorrupt("a job without the time when it was submitted, or is given up")
    create_time = read_time(message.create_time)
    return JobRequested(
        job_id=message.job_id,
        kind=JobKind(message.kind),
        identity=read_identity(message.identity),
        method=message.method,
        model=message.model,
        request=read_sealed(message.request),
        create_time=create_time,
        not_before=read_time(message.not_before_time) if message.HasField("not_before_time") else create_time,
        max_attempts=message.max_attempts,
        give_up_time=read_time(message.give_up_time),
        result_ttl_s=read_duration(message.result_ttl),
        priority=JobPriority(message.priority),
        labels=dict(message.labels),
        prefix_group=message.prefix_group,
        batch_id=message.batch_id,
        request_digest=message.request_digest,
        has_webhook=message.has_webhook,
    )


def fill_attempt(message: events_pb2.JobAttempt, attempt: JobAttempt) -> None:
    """Writes an attempt into an empty message."""
    message.number = attempt.number
    message.request_id = attempt.request_id
    message.worker = attempt.worker
    set_time(message.start_time, attempt.start_time)
    set_time(message.end_time, attempt.end_time)
    message.error_reason = reason_number(attempt.error_reason)  # type: ignore[assignment]
    message.status_code = attempt.status_code
    message.message = attempt.message[:MAX_DETAIL]


def read_attempt(message: events_pb2.JobAttempt) -> JobAttempt:
    """An attempt of a message. Raises DataCorrupt."""
    return JobAttempt(
        number=message.number,
        request_id=message.request_id,
        worker=message.worker,
        start_time=read_time(message.start_time),
        end_time=read_time(message.end_time),
        error_reason=reason_name(message.error_reason),
        status_code=message.status_code,
        message=message.message,
    )


def fill_sealed(message: events_pb2.SealedPayload, sealed: Sealed) -> None:
    """Writes what is sealed into an empty message."""
    message.key_id = sealed.key_id
    message.ciphertext = sealed.ciphertext


def read_sealed(message: events_pb2.SealedPayload) -> Sealed:
    """What is sealed, of a message."""
    return Sealed(message.key_id, message.ciphertext)


def fill_identity(message: identity_pb2.Identity, identity: Identity) -> None:
    """Writes an identity into an empty message: all of it that other services may know."""
    message.tenant_id = identity.tenant_id
    message.client_id = identity.client_id
    message.key_id = identity.key_id
    message.scopes.extend(sorted(identity.scopes))
    message.roles.extend(sorted(identity.roles))
    message.token_id = identity.token_id
    if identity.issued_at_s:
        message.issue_time.seconds = identity.issued_at_s


def read_identity(message: identity_pb2.Identity) -> Identity:
    """An identity of a message."""
    return Identity(
        tenant_id=message.tenant_id,
        client_id=message.client_id,
        key_id=message.key_id,
        scopes=frozenset(message.scopes),
        roles=frozenset(message.roles),
        token_id=message.token_id,
        issued_at_s=message.issue_time.seconds,
    )


def reason_number(reason: str) -> int:
    """The number of an error's reason; 0 for none, or one that is not known."""
    return REASONS.get(reason, 0)


def reason_name(number: int) -> str:
    """The reason of a number; empty for none, or one that is not known."""
    return _REASON_NAMES.get(number, "")


def set_time(stamp: Timestamp, time: datetime) -> None:
    """To the microsecond."""
    since = time - _EPOCH
    stamp.seconds = since.days * 86_400 + since.seconds
    stamp.nanos = since.microseconds * 1000


def read_time(stamp: Timestamp) -> datetime:
    """To the microsecond. Raises DataCorrupt beyond the years 1 to 9999."""
    try:
        return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)
    except OverflowError as error:
        raise DataCorrupt("a time beyond the years 1 to 9999") from error


def set_duration(duration: Duration, seconds: float) -> None:
    """To the nanosecond."""
    duration.seconds, duration.nanos = divmod(round(seconds * 1e9), 10**9)


def read_duration(duration: Duration) -> float:
    """In seconds."""
    return duration.seconds + duration.nanos / 1e9


def _valid(message: M) -> M:
    """The message. Raises DataCorrupt where it breaks a rule."""
    try:
        validation.validate(message)
    except RequestInvalid as error:
        field, description = error.violations[0] if error.violations else ("", "is too complex")
        said = f"no valid {message.DESCRIPTOR.name}: {field} {description}"
        raise DataCorrupt(said[:MAX_DETAIL]) from error
    return message


def read_retry(message: events_pb2.RetryRequested) -> RetryRequested:
    """A retry of a message that its rules were checked on. Raises DataCorrupt."""
    return RetryRequested(
        read_job(message.job), message.request_id, reason_name(message.error_reason), message.attempts
    )


def fill_retry(message: events_pb2.RetryRequested, event: RetryRequested) -> None:
    """Writes a retry into an empty message."""
    fill_job(message.job, event.job)
    message.request_id = event.request_id
    message.error_reason = reason_number(event.error_reason)  # type: ignore[assignment]
    message.attempts = event.attempts


def fill_dead_letter(message: events_pb2.DeadLettered, event: DeadLettered) -> None:
    """Writes a dead letter into an empty message."""
    message.job_id = event.job_id
    message.error_reason = reason_number(event.error_reason)  # type: ignore[assignment]
    message.detail = event.detail[:MAX_DETAIL]
    message.attempts = event.attempts
    if event.job is not None:
        fill_job(message.job, event.job)
    message.raw = event.raw
    message.topic = event.topic
    for attempt in event.history:
        fill_attempt(message.history.add(), attempt)
    message.partition = event.partition
    message.offset = event.offset


def read_dead_letter(message: events_pb2.DeadLettered) -> DeadLettered:
    """A dead letter of a message that its rules were checked on. Raises DataCorrupt."""
    return DeadLettered(
        error_reason=reason_name(message.error_reason),
        detail=message.detail,
        job_id=message.job_id,
        attempts=message.attempts,
        job=read_job(message.job) if message.HasField("job") else None,
        history=tuple(read_attempt(each) for each in message.history),
        raw=message.raw,
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
    )
