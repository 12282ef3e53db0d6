"""Events as bytes: our own types (`events`) to the messages of `llmos.events.v1`, and back.

A spool stores an envelope without its place, since only the writer knows that: a *body*. `complete` adds
the place when it is published. Concatenated protobuf messages are one message with the fields of both, so
that takes no parsing.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache

from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.common.v1 import error_reason_pb2, identity_pb2, usage_pb2
from llmos.events.v1 import events_pb2
from msgspec import Struct

from services.mesh.audit_protocol import Place
from services.mesh.context import Identity
from services.mesh.errors import DataCorrupt, Status
from services.mesh.events import (
    AdminChanged,
    AnonymousRejected,
    Edge,
    EngineChanged,
    OtherEvent,
    Outcome,
    RequestEnded,
    RequestFacts,
    RequestStarted,
    SpoolGap,
)

AUDIT_TYPE = "llmos.events.v1.AuditRecorded"
MAX_PLACE = 2**62
"""Epochs and sequences beyond are taken for garbage; a database's integers end there."""
MAX_SECONDS = 253_402_300_799
"""The year 9999."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
REASONS: Mapping[str, int] = {
    name.removeprefix("ERROR_REASON_"): number
    for name, number in error_reason_pb2.ErrorReason.items()
    if number
}
"""Numbers of `llmos.common.v1.ErrorReason`, by the reasons of the tree in `errors`."""


class IntentRead(Struct, frozen=True):
    """An intent, with what a store finds it by. `body` is the RequestStarted."""

    request_id: str
    tenant_id: str
    client_id: str
    receive_time_us: int
    body: bytes


class OutcomeRead(Struct, frozen=True):
    """An outcome, with what a store finds it by. `body` is the RequestEnded."""

    request_id: str
    tenant_id: str
    client_id: str
    receive_time_us: int
    outcome: int
    """An `Outcome`, or a number that only a later version knows."""
    body: bytes


class OtherRead(Struct, frozen=True):
    """Anything else, also what this version does not know. `body` is the AuditRecorded."""

    kind: str
    """The name of the record's field, such as `gap`; empty where it is not known."""
    time_us: int
    body: bytes


class PlaceRead(Struct, frozen=True):
    """Nothing but the place: the event is kept elsewhere, as a job is, or cannot be read."""


class EventRead(Struct, frozen=True):
    """An event with its place."""

    producer: str
    place: Place
    floor: int
    record: IntentRead | OutcomeRead | OtherRead | PlaceRead


class EventEncoder:
    """Makes the bodies of one spool's events.

    Those of requests are put together of serialised parts, most of which are the same in many requests and
    are kept: that takes half as long as to fill one message. A property test compares the two.
    """

    def __init__(self, source: str, producer: str) -> None:
        self._source = source
        self._producer = producer
        self._head = events_pb2.EventEnvelope(
            source=source, type=AUDIT_TYPE, producer=producer
        ).SerializeToString()

    def started(self, event: RequestStarted, now: datetime) -> tuple[bytes, bytes]:
        """The body, and the facts alone, for the outcome."""
        time = _time(event.facts.receive_time or now)
        facts = _facts(event.facts, time)
        return self._audit(time, _STARTED, _part(_FACTS, facts)), facts

    def ended(self, event: RequestEnded, now: datetime, facts: bytes = b"") -> bytes:
        """`facts` as they came with the intent, if there was one."""
        time = _time(event.end_time or now)
        usage = event.usage
        ended = (
            _part(_FACTS, facts or _facts(event.facts, _time(event.facts.receive_time or now)))
            + _result(
                event.outcome,
                event.error_reason,
                event.status_code,
                event.finish_reasons,
                event.replica,
                event.model_revision,
                event.served_from_cache,
            )
            + _usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens)
            + _part(_END_TIME, time)
        )
        if event.time_to_first_token_s is not None:
            whole_s, part_s = divmod(event.time_to_first_token_s, 1)
            ended += _part(_FIRST_TOKEN, _seconds(int(whole_s), int(part_s * 1e9)))
        return self._audit(time, _ENDED, ended)

    def _audit(self, time: bytes, kind: bytes, record: bytes) -> bytes:
        return self._head + _part(_TIME, time) + _part(_AUDIT, _part(kind, record))

    def aborted(self, started_body: bytes, now: datetime) -> bytes:
        """The outcome of a request whose process died; `started_body` is the intent's body."""
        started = events_pb2.EventEnvelope.FromString(started_body).audit.started
        envelope = self._envelope(now)
        _fill_aborted(envelope.audit.ended, started, now)
        return envelope.SerializeToString()

    def other(self, event: OtherEvent, now: datetime) -> bytes:
        envelope = self._envelope(now)
        audit = envelope.audit
        if isinstance(event, AnonymousRejected):
            audit.anonymous_rejected.source_address = event.source_address
            audit.anonymous_rejected.error_reason = REASONS.get(event.error_reason, 0)  # type: ignore[assignment]
            audit.anonymous_rejected.count = event.count
            _set_time(audit.anonymous_rejected.interval_start_time, event.interval_start)
            _set_time(audit.anonymous_rejected.interval_end_time, event.interval_end)
        elif isinstance(event, SpoolGap):
            audit.gap.dropped = event.dropped
            audit.gap.refused = event.refused
            _set_time(audit.gap.first_time, event.first)
            _set_time(audit.gap.last_time, event.last)
        elif isinstance(event, AdminChanged):
            _fill_identity(audit.admin.identity, event.identity)
            audit.admin.method = event.method
            audit.admin.object = event.object
            audit.admin.request_id = event.request_id
        else:
            _fill_engine(audit.engine, event)
        return envelope.SerializeToString()

    def _envelope(self, time: datetime) -> events_pb2.EventEnvelope:
        envelope = events_pb2.EventEnvelope(source=self._source, type=AUDIT_TYPE, producer=self._producer)
        _set_time(envelope.time, time)
        return envelope


def complete(body: bytes, producer: str, place: Place, floor: int, outcome_of: str | None) -> bytes:
    """The envelope as it is published. `outcome_of` is the request's id, for an outcome."""
    return (
        body
        + events_pb2.EventEnvelope(
            id=f"outcome/{outcome_of}" if outcome_of else f"{producer}/{place.epoch}/{place.sequence}",
            epoch=place.epoch,
            sequence=place.sequence,
            floor_sequence=floor,
        ).SerializeToString()
    )


def read(value: bytes) -> EventRead:
    """Raises DataCorrupt, which says what is wrong, for what is no audit event of ours."""
    envelope = parse_envelope(value)
    floor, place = read_floor_and_place(envelope)
    return EventRead(envelope.producer, place, floor, _read_record(envelope))


def parse_envelope(value: bytes) -> events_pb2.EventEnvelope:
    """Raises DataCorrupt for what is none, or of nobody."""
    try:
        envelope = events_pb2.EventEnvelope.FromString(value)
    except DecodeError as error:
        raise DataCorrupt("not an EventEnvelope") from error
    if not 0 < len(envelope.producer) <= 128:
        raise DataCorrupt("no producer")
    return envelope


def read_floor_and_place(envelope: events_pb2.EventEnvelope) -> tuple[int, Place]:
    """Raises DataCorrupt."""
    epoch, sequence, floor = envelope.epoch, envelope.sequence, envelope.floor_sequence
    if not (1 <= epoch < MAX_PLACE and 1 <= sequence < MAX_PLACE):
        raise DataCorrupt("no place in an epoch")
    if not 1 <= floor <= sequence:
        raise DataCorrupt("a floor beyond its own event")
    return floor, Place(epoch, sequence)


def read_place(text: str) -> Place:
    """The place in a record's header, for records whose value cannot be read. Raises ValueError."""
    epoch, sequence = text.split("/")
    place = Place(int(epoch), int(sequence))
    if not (1 <= place.epoch < MAX_PLACE and 1 <= place.sequence < MAX_PLACE):
        raise ValueError("no place in an epoch")
    return place


def abort(started: bytes, now_us: int) -> bytes:
    """The RequestEnded of a request that logging closes; `started` is its RequestStarted."""
    ended = events_pb2.RequestEnded()
    _fill_aborted(
        ended, events_pb2.RequestStarted.FromString(started), datetime.fromtimestamp(now_us / 1e6, UTC)
    )
    return ended.SerializeToString()


def _read_record(envelope: events_pb2.EventEnvelope) -> IntentRead | OutcomeRead | OtherRead:
    payload = envelope.WhichOneof("payload")
    if payload in ("job", "retry", "dead_letter"):
        raise DataCorrupt("an event of a job, on the topic of audit events")
    audit = envelope.audit
    kind = audit.WhichOneof("record") if payload == "audit" else None
    if kind == "started":
        started = audit.started
        return IntentRead(*_keys(started.facts), body=started.SerializeToString())
    if kind == "ended":
        ended = audit.ended
        outcome = int(ended.outcome)
        if outcome <= 0:
            raise DataCorrupt("an outcome that says nothing")
        return OutcomeRead(*_keys(ended.facts), outcome=outcome, body=ended.SerializeToString())
    return OtherRead(kind or "", _time_us(envelope.time), audit.SerializeToString())


def _keys(facts: events_pb2.RequestFacts) -> tuple[str, str, str, int]:
    request_id, identity = facts.request_id, facts.identity
    if not 0 < len(request_id) <= 64:
        raise DataCorrupt("a request without an id")
    return request_id, identity.tenant_id, identity.client_id, _time_us(facts.receive_time)


def _time_us(time: Timestamp) -> int:
    seconds, nanos = time.seconds, time.nanos
    if abs(seconds) > MAX_SECONDS or not 0 <= nanos < 10**9:
        raise DataCorrupt("a time beyond the years 1 to 9999")
    return seconds * 1_000_000 + nanos // 1000


def _tag(message: type[Message], field: str) -> bytes:
    """What stands before a field that holds a message or a text."""
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


def _varint(number: int) -> bytes:
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


_LENGTHS = tuple(_varint(length) for length in range(2048))
_TIME, _AUDIT = _tag(events_pb2.EventEnvelope, "time"), _tag(events_pb2.EventEnvelope, "audit")
_STARTED, _ENDED = _tag(events_pb2.AuditRecorded, "started"), _tag(events_pb2.AuditRecorded, "ended")
_FACTS, _USAGE = _tag(events_pb2.RequestEnded, "facts"), _tag(events_pb2.RequestEnded, "usage")
_END_TIME = _tag(events_pb2.RequestEnded, "end_time")
_FIRST_TOKEN = _tag(events_pb2.RequestEnded, "time_to_first_token")
_NANOS = _varint(Timestamp.DESCRIPTOR.fields_by_name["nanos"].number << 3)
_RECEIVE_TIME = _tag(events_pb2.RequestFacts, "receive_time")


def _part(tag: bytes, value: bytes) -> bytes:
    """A field that holds a message."""
    length = len(value)
    return tag + (_LENGTHS[length] if length < 2048 else _varint(length)) + value


def _seconds(seconds: int, nanos: int) -> bytes:
    """A Timestamp, or a Duration, which is written in the same way."""
    return _second(seconds) + _NANOS + _varint(nanos) if nanos else _second(seconds)


@lru_cache(maxsize=16)
def _second(seconds: int) -> bytes:
    """The same for all that happens in it."""
    return Timestamp(seconds=seconds).SerializeToString()


def _time(time: datetime) -> bytes:
    return _seconds(_whole_seconds(time), time.microsecond * 1000)


def _set_time(stamp: Timestamp, time: datetime) -> None:
    """As `stamp.FromDatetime`, at a fifth of its cost."""
    stamp.seconds = _whole_seconds(time)
    stamp.nanos = time.microsecond * 1000


def _whole_seconds(time: datetime) -> int:
    """Not of `timestamp()`: a float has too few digits to tell the microseconds of all years to 9999."""
    since = time - _EPOCH
    return since.days * 86_400 + since.seconds


def _facts(facts: RequestFacts, receive_time: bytes) -> bytes:
    """`receive_time` is left out where they have none."""
    of_request = events_pb2.RequestFacts()
    of_request.request_id = facts.request_id
    of_request.model = facts.model
    of_request.trace_id = facts.trace_id
    if facts.labels:
        of_request.labels.update(facts.labels)
    written = _of_caller(facts.identity, facts.method, facts.edge) + of_request.SerializeToString()
    if facts.receive_time is not None:
        written += _part(_RECEIVE_TIME, receive_time)
    return written


@lru_cache(maxsize=1024)
def _of_caller(identity: Identity | None, method: str, edge: Edge) -> bytes:
    """What many requests have in common of their facts."""
    message = events_pb2.RequestFacts(method=method, edge=edge)  # type: ignore[arg-type]
    if identity is not None:
        _fill_identity(message.identity, identity)
    return message.SerializeToString()


@lru_cache(maxsize=1024)
def _result(
    outcome: Outcome,
    error_reason: str,
    status_code: int,
    finish_reasons: tuple[int, ...],
    replica: str,
    model_revision: str,
    served_from_cache: bool,
) -> bytes:
    """What many outcomes have in common."""
    return events_pb2.RequestEnded(
        outcome=outcome,  # type: ignore[arg-type]
        error_reason=REASONS.get(error_reason, 0),  # type: ignore[arg-type]
        status_code=status_code,
        finish_reasons=finish_reasons,  # type: ignore[arg-type]
        replica=replica,
        model_revision=model_revision,
        served_from_cache=served_from_cache,
    ).SerializeToString()


@lru_cache(maxsize=1024)
def _usage(prompt_tokens: int, completion_tokens: int, cached_prompt_tokens: int) -> bytes:
    usage = usage_pb2.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cached_prompt_tokens=cached_prompt_tokens,
    )
    return _part(_USAGE, usage.SerializeToString())


def _fill_identity(message: identity_pb2.Identity, identity: Identity) -> None:
    message.tenant_id = identity.tenant_id
    message.client_id = identity.client_id
    message.key_id = identity.key_id
    message.scopes.extend(sorted(identity.scopes))


def _fill_aborted(ended: events_pb2.RequestEnded, started: events_pb2.RequestStarted, now: datetime) -> None:
    ended.facts.CopyFrom(started.facts)
    ended.outcome = events_pb2.OUTCOME_ABORTED
    ended.status_code = Status.UNAVAILABLE
    _set_time(ended.end_time, now)


def _fill_engine(message: events_pb2.EngineChanged, event: EngineChanged) -> None:
    message.kind = event.kind  # type: ignore[assignment]
    message.model = event.model
    message.model_revision = event.model_revision
    message.detail = event.detail[:1024]
