"""Events as bytes: what goes in comes out, and garbage is called garbage."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmos.common.v1 import error_reason_pb2, usage_pb2
from llmos.events.v1 import events_pb2

from services.logging.store import Batch
from services.logging.stores.sqlite import SqliteStore
from services.mesh import event_codec, validation
from services.mesh.audit_protocol import Place
from services.mesh.context import Identity
from services.mesh.errors import DataCorrupt
from services.mesh.event_codec import EventEncoder, IntentRead, OtherRead, OutcomeRead
from services.mesh.events import (
    AdminChanged,
    AnonymousRejected,
    Edge,
    EngineChange,
    EngineChanged,
    Outcome,
    RequestEnded,
    RequestFacts,
    RequestStarted,
    SpoolGap,
    Usage,
)

NOW = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
CALLER = Identity("tenant-a", "client-a", "key-a", frozenset({"generate", "audit.read"}))
FACTS = RequestFacts("req_1", CALLER, "/llmos/Generate", Edge.HTTP, "echo", "ab" * 16, NOW, {"team": "red"})
ENCODER = EventEncoder("gateway", "gateway-0-abc")


def envelope(body: bytes, outcome_of: str | None = None) -> events_pb2.EventEnvelope:
    value = event_codec.complete(body, "gateway-0-abc", Place(3, 9), 4, outcome_of)
    message = events_pb2.EventEnvelope.FromString(value)
    validation.validate(message)
    return message


def test_an_intent() -> None:
    message = envelope(ENCODER.started(RequestStarted(FACTS), NOW)[0])
    assert (message.id, message.source, message.producer) == ("gateway-0-abc/3/9", "gateway", "gateway-0-abc")
    assert (message.epoch, message.sequence, message.floor_sequence) == (3, 9, 4)
    assert message.type == "llmos.events.v1.AuditRecorded"
    facts = message.audit.started.facts
    assert facts.request_id == "req_1"
    assert list(facts.identity.scopes) == ["audit.read", "generate"]
    assert (facts.edge, facts.model, dict(facts.labels)) == (events_pb2.EDGE_HTTP, "echo", {"team": "red"})
    assert facts.receive_time.ToDatetime(tzinfo=UTC) == NOW
    read = event_codec.read(message.SerializeToString())
    assert (read.producer, read.place, read.floor) == ("gateway-0-abc", Place(3, 9), 4)
    assert isinstance(read.record, IntentRead)
    assert (read.record.request_id, read.record.tenant_id) == ("req_1", "tenant-a")
    assert read.record.receive_time_us == int(NOW.timestamp() * 1_000_000)
    assert read.record.body == message.audit.started.SerializeToString()


def test_an_outcome() -> None:
    event = RequestEnded(
        FACTS, Outcome.FAILED, "ENGINE_FAULT", 13, Usage(10, 20, 5), (2, 3), NOW, 0.25, "inference-1", "rev"
    )
    message = envelope(ENCODER.ended(event, NOW), "req_1")
    assert message.id == "outcome/req_1"
    ended = message.audit.ended
    assert ended.outcome == events_pb2.OUTCOME_FAILED
    assert ended.error_reason == error_reason_pb2.ERROR_REASON_ENGINE_FAULT
    assert (ended.usage.prompt_tokens, ended.usage.completion_tokens) == (10, 20)
    assert list(ended.finish_reasons) == [2, 3]
    assert ended.time_to_first_token.ToMilliseconds() == 250
    assert (ended.replica, ended.model_revision) == ("inference-1", "rev")
    record = event_codec.read(message.SerializeToString()).record
    assert isinstance(record, OutcomeRead)
    assert record.outcome == Outcome.FAILED
    _, facts = ENCODER.started(RequestStarted(FACTS), NOW)
    assert ENCODER.ended(event, NOW, facts) == ENCODER.ended(event, NOW)


def test_an_aborted_request_keeps_its_facts() -> None:
    body, _ = ENCODER.started(RequestStarted(FACTS), NOW)
    message = envelope(ENCODER.aborted(body, NOW), "req_1")
    assert message.audit.ended.outcome == events_pb2.OUTCOME_ABORTED
    assert message.audit.ended.facts == events_pb2.EventEnvelope.FromString(body).audit.started.facts


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (AnonymousRejected("192.0.2.1", "CREDENTIAL_MISSING", 7, NOW, NOW), "anonymous_rejected"),
        (SpoolGap(3, 1, NOW, NOW), "gap"),
        (AdminChanged(CALLER, "/llmos/CreateClient", "client/x", "req_2"), "admin"),
        (EngineChanged(EngineChange.FAULT, "echo", "rev", "x" * 5000), "engine"),
    ],
)
def test_other_events(event: object, kind: str) -> None:
    message = envelope(ENCODER.other(event, NOW))  # type: ignore[arg-type]
    assert message.audit.WhichOneof("record") == kind
    record = event_codec.read(message.SerializeToString()).record
    assert isinstance(record, OtherRead)
    assert record.kind == kind


def test_what_a_later_version_sends_is_kept_with_its_place() -> None:
    message = events_pb2.EventEnvelope(producer="p", epoch=1, sequence=2, floor_sequence=1)
    later = message.SerializeToString() + b"\xa2\x06\x03new"  # field 100
    assert event_codec.read(later).place == Place(1, 2)
    message.audit.ended.facts.request_id = "req_1"
    message.audit.ended.outcome = 77  # type: ignore[assignment]
    record = event_codec.read(message.SerializeToString()).record
    assert isinstance(record, OutcomeRead)
    assert record.outcome == 77


@pytest.mark.parametrize(
    "broken",
    [
        {"producer": ""},
        {"producer": "x" * 129},
        {"epoch": 0},
        {"sequence": 0},
        {"sequence": 2**63},
        {"epoch": 2**64 - 1},
        {"floor_sequence": 0},
        {"floor_sequence": 10},
    ],
)
def test_an_envelope_without_a_place_is_corrupt(broken: dict[str, object]) -> None:
    fields = {"producer": "p", "epoch": 1, "sequence": 9, "floor_sequence": 1} | broken
    with pytest.raises(DataCorrupt):
        event_codec.read(events_pb2.EventEnvelope(**fields).SerializeToString())  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "1", "1/2/3", "a/b", "0/1", "1/0", "-1/1", f"1/{2**70}"])
def test_a_place_that_is_none(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        event_codec.read_place(text)


labels = st.dictionaries(st.text(min_size=1, max_size=64), st.text(max_size=256), max_size=16)
times = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))  # noqa: DTZ001
names = st.text(max_size=40)
callers = st.builds(Identity, names, names, names, st.frozensets(names))
requests = st.builds(
    RequestFacts,
    request_id=st.text(min_size=1, max_size=64),
    identity=st.none() | callers,
    method=st.text(max_size=128),
    edge=st.sampled_from(Edge),
    model=st.text(max_size=128),
    trace_id=st.text(max_size=32),
    receive_time=st.none() | times,
    labels=labels,
)
tokens = st.sampled_from([0, 1, 127, 128, 2**31])
outcomes = st.builds(
    RequestEnded,
    facts=requests,
    outcome=st.sampled_from(Outcome),
    error_reason=st.sampled_from(["", "unknown", *event_codec.REASONS]),
    status_code=st.integers(0, 16),
    usage=st.builds(Usage, tokens, tokens, tokens),
    finish_reasons=st.lists(st.integers(0, 5), max_size=128).map(tuple),
    end_time=st.none() | times,
    time_to_first_token_s=st.none() | st.floats(0, 10**6),
    replica=st.text(max_size=128),
    model_revision=st.text(max_size=128),
    served_from_cache=st.booleans(),
)


@settings(max_examples=200, deadline=None, database=None)
@given(event=outcomes)
def test_bodies_put_together_are_messages_filled_in(event: RequestEnded) -> None:
    facts, plain = event.facts, events_pb2.RequestFacts()
    plain.request_id, plain.method, plain.edge = facts.request_id, facts.method, facts.edge  # type: ignore[assignment]
    plain.model, plain.trace_id = facts.model, facts.trace_id
    plain.labels.update(facts.labels)
    if (caller := facts.identity) is not None:
        plain.identity.SetInParent()
        plain.identity.tenant_id, plain.identity.client_id = caller.tenant_id, caller.client_id
        plain.identity.key_id = caller.key_id
        plain.identity.scopes.extend(sorted(caller.scopes))
    if facts.receive_time is not None:
        plain.receive_time.FromDatetime(facts.receive_time)
    ended = events_pb2.RequestEnded(
        facts=plain,
        outcome=int(event.outcome),  # type: ignore[arg-type]
        error_reason=event_codec.REASONS.get(event.error_reason, 0),  # type: ignore[arg-type]
        status_code=event.status_code,
        usage=usage_pb2.Usage(**msgspec.structs.asdict(event.usage)),
        finish_reasons=event.finish_reasons,  # type: ignore[arg-type]
        replica=event.replica,
        model_revision=event.model_revision,
        served_from_cache=event.served_from_cache,
    )
    ended.end_time.FromDatetime(event.end_time or NOW)
    if event.time_to_first_token_s is not None:
        whole_s, part_s = divmod(event.time_to_first_token_s, 1)
        ended.time_to_first_token.seconds, ended.time_to_first_token.nanos = int(whole_s), int(part_s * 1e9)

    begun, written = ENCODER.started(RequestStarted(facts), NOW)
    assert events_pb2.RequestFacts.FromString(written) == plain
    intent = events_pb2.EventEnvelope.FromString(begun)
    assert intent.audit.started.facts == plain
    assert intent.time.ToDatetime(tzinfo=UTC) == (facts.receive_time or NOW)
    for body in (ENCODER.ended(event, NOW), ENCODER.ended(event, NOW, written)):
        outcome = events_pb2.EventEnvelope.FromString(body)
        assert outcome.audit.ended == ended
        assert outcome.time == ended.end_time
        assert (outcome.source, outcome.producer) == ("gateway", "gateway-0-abc")


@pytest.mark.parametrize("year", [1, 1969, 1970, 2026, 3058, 9999])
def test_the_last_microsecond_of_a_second_stays_in_it(year: int) -> None:
    last = datetime(year, 12, 30, 23, 59, 59, 999_999, tzinfo=UTC)
    body, _ = ENCODER.started(RequestStarted(RequestFacts("r", None, "m", Edge.GRPC, receive_time=last)), NOW)
    assert events_pb2.EventEnvelope.FromString(body).time.ToDatetime(tzinfo=UTC) == last


numbers = st.sampled_from([0, 1, 2, 9, 2**31, 2**62, 2**63, 2**64 - 1])
seconds = st.sampled_from([0, 1, -1, 253_402_300_799, 2**63 - 1, -(2**63)])
texts = st.text(max_size=70)


@st.composite
def envelopes(draw: st.DrawFn) -> bytes:
    message = events_pb2.EventEnvelope(
        producer=draw(texts), epoch=draw(numbers), sequence=draw(numbers), floor_sequence=draw(numbers)
    )
    message.time.seconds = draw(seconds)
    message.time.nanos = draw(st.integers(-(2**31), 2**31 - 1))
    kind = draw(st.sampled_from(["started", "ended", "gap", "none"]))
    if kind in ("started", "ended"):
        facts = getattr(message.audit, kind).facts
        facts.request_id = draw(texts)
        facts.identity.tenant_id = draw(texts)
        facts.receive_time.seconds = draw(seconds)
    if kind == "ended":
        message.audit.ended.outcome = draw(st.integers(-(2**31), 2**31 - 1))  # type: ignore[assignment]
    if kind == "gap":
        message.audit.gap.dropped = draw(numbers)
    return message.SerializeToString()


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(values=st.lists(envelopes() | st.binary(max_size=200), max_size=8))
async def test_what_is_read_can_be_stored(values: list[bytes], tmp_path: Path) -> None:
    """Else one record would stop all that come after it."""
    events = []
    for value in values:
        try:
            events.append(event_codec.read(value))
        except DataCorrupt:
            continue
    store = SqliteStore(tmp_path / "audit.db")
    await store.start()
    try:
        await store.apply(Batch("topic", events), 0)
    finally:
        await store.stop()
