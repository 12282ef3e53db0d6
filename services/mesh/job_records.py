"""Jobs as bytes that a store keeps: the messages of `llmos.events.v1` without their envelope.

What is kept was checked when it came in (`job_codec.read`), so that nothing is checked again.
"""

from __future__ import annotations

from llmos.events.v1 import events_pb2

from services.mesh.job_codec import (
    fill_attempt,
    fill_dead_letter,
    fill_job,
    fill_retry,
    read_attempt,
    read_dead_letter,
    read_job,
    read_retry,
)
from services.mesh.jobs import DeadLettered, JobAttempt, JobRequested, RetryRequested


def pack_job(job: JobRequested) -> bytes:
    message = events_pb2.JobRequested()
    fill_job(message, job)
    return message.SerializeToString()


def unpack_job(packed: bytes) -> JobRequested:
    return read_job(events_pb2.JobRequested.FromString(packed))


def pack_history(history: tuple[JobAttempt, ...]) -> bytes:
    message = events_pb2.DeadLettered()
    for attempt in history:
        fill_attempt(message.history.add(), attempt)
    return message.SerializeToString()


def unpack_history(packed: bytes) -> tuple[JobAttempt, ...]:
    if not packed:
        return ()
    return tuple(read_attempt(each) for each in events_pb2.DeadLettered.FromString(packed).history)


def pack_news(event: RetryRequested | DeadLettered) -> bytes:
    envelope = events_pb2.EventEnvelope()
    if isinstance(event, RetryRequested):
        fill_retry(envelope.retry, event)
    else:
        fill_dead_letter(envelope.dead_letter, event)
    return envelope.SerializeToString()


def unpack_news(packed: bytes) -> RetryRequested | DeadLettered:
    envelope = events_pb2.EventEnvelope.FromString(packed)
    if envelope.HasField("retry"):
        return read_retry(envelope.retry)
    return read_dead_letter(envelope.dead_letter)
