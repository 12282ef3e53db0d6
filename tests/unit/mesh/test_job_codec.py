"""Job events as bytes: what goes in comes out, and what is no event of ours is called by what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmos.events.v1 import events_pb2

from services.mesh import event_codec, job_codec, validation
from services.mesh.audit_protocol import Place
from services.mesh.errors import DataCorrupt
from services.mesh.jobs import DeadLettered, JobEvent, RetryRequested
from tests.framework.job_events import NOW, job, job_events

Envelope = events_pb2.EventEnvelope


def body(event: JobEvent, event_id: str = "") -> bytes:
    return job_codec.encode(event, source="gateway", producer="gateway-0-abc", time=NOW, event_id=event_id)


@settings(deadline=None, database=None)
@given(event=job_events)
def test_what_goes_in_comes_out(event: JobEvent) -> None:
    value = event_codec.complete(body(event), "gateway-0-abc", Place(3, 9), 4, None)
    validation.validate(Envelope.FromString(value))
    read = job_codec.read(value)
    assert (read.producer, read.place, read.floor) == ("gateway-0-abc", Place(3, 9), 4)
    assert read.event == event


def test_an_event_says_what_it_is() -> None:
    for event, name in (
        (job(), "JobRequested"),
        (RetryRequested(job(), "req_1", "REPLICA_LOST", 1), "RetryRequested"),
        (DeadLettered("DATA_CORRUPT", "no job"), "DeadLettered"),
    ):
        message = Envelope.FromString(body(event, "dead/1"))
        assert (message.type, message.source, message.id) == (f"llmos.events.v1.{name}", "gateway", "dead/1")
        with pytest.raises(DataCorrupt, match="topic of audit events"):
            event_codec.read(event_codec.complete(body(event), "p", Place(1, 1), 1, None))


def test_what_logging_publishes_itself_has_no_place() -> None:
    read = job_codec.read(body(RetryRequested(job(), "req_1", "REPLICA_LOST", 2), "retry/job_1/2"))
    assert read.place is None
    validation.validate(Envelope.FromString(body(job(), "retry/job_1/2")))


def damage(change: Callable[[events_pb2.JobRequested], object]) -> Callable[[Envelope], object]:
    return lambda envelope: change(envelope.job)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.ClearField("job"), "no event of a job"),
        (lambda e: e.ClearField("producer"), "no producer"),
        (lambda e: setattr(e, "sequence", 1), "no place"),
        (damage(lambda j: j.ClearField("job_id")), "job_id"),
        (damage(lambda j: setattr(j, "job_id", "x" * 65)), "job_id"),
        (damage(lambda j: j.ClearField("identity")), "identity"),
        (damage(lambda j: j.identity.ClearField("tenant_id")), "identity.tenant_id"),
        (damage(lambda j: j.ClearField("request")), "request"),
        (damage(lambda j: setattr(j, "kind", 77)), "kind"),
        (damage(lambda j: setattr(j, "priority", 0)), "priority"),
        (damage(lambda j: setattr(j, "max_attempts", 0)), "max_attempts"),
        (damage(lambda j: setattr(j, "max_attempts", 21)), "max_attempts"),
        (damage(lambda j: j.labels.update({f"k{n}": "" for n in range(17)})), "labels"),
        (damage(lambda j: j.ClearField("create_time")), "time"),
        (damage(lambda j: j.ClearField("give_up_time")), "time"),
        (damage(lambda j: setattr(j.give_up_time, "seconds", 2**62)), "give_up_time"),
        (damage(lambda j: setattr(j.not_before_time, "seconds", -(2**62))), "time"),
        (damage(lambda j: setattr(j.result_ttl, "seconds", -1)), "result_ttl"),
        (damage(lambda j: setattr(j, "request_digest", b"x" * 33)), "request_digest"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_a_sentence(
    change: Callable[[Envelope], object], said: str
) -> None:
    envelope = Envelope.FromString(body(job()))
    job_codec.read(envelope.SerializeToString())
    change(envelope)
    with pytest.raises(DataCorrupt, match=said):
        job_codec.read(envelope.SerializeToString())


@settings(deadline=None, database=None)
@given(st.binary(max_size=300), job_events, st.integers(0, 300), st.binary(min_size=1, max_size=4))
def test_garbage_is_called_so(noise: bytes, event: JobEvent, at: int, piece: bytes) -> None:
    whole = body(event)
    for value in (noise, whole[:at], whole[:at] + piece + whole[at + len(piece) :]):
        with contextlib.suppress(DataCorrupt):
            job_codec.read(value)


def test_a_job_without_a_time_to_begin_may_begin_at_once() -> None:
    envelope = Envelope.FromString(body(job(create_time=NOW - timedelta(days=1))))
    envelope.job.ClearField("not_before_time")
    read = job_codec.read(envelope.SerializeToString()).event
    assert read == job(create_time=NOW - timedelta(days=1))
