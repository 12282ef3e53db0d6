"""Records of the audit log, and which of them are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from google.protobuf.timestamp_pb2 import Timestamp
from llmos.common.v1 import error_reason_pb2
from llmos.events.v1 import events_pb2
from llmos.logging.v1 import audit_service_pb2

from llmos_client.generation_types import FinishReason, Usage, to_datetime


class Outcome(StrEnum):
    """How a request ended."""

    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    """Refused before any work."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABORTED = "aborted"
    """The process that served it died."""
    UNKNOWN = "unknown"
    """An outcome of a later version of the server."""


_OUTCOMES: dict[int, Outcome] = {
    number: Outcome(name.removeprefix("OUTCOME_").lower())
    for name, number in events_pb2.Outcome.items()
    if number and name.removeprefix("OUTCOME_") in Outcome.__members__
}
_OUTCOME_NUMBERS = {outcome: number for number, outcome in _OUTCOMES.items()}


@dataclass(frozen=True)
class AuditFilter:
    """Which requests; what is set must all hold."""

    request_id: str = ""
    tenant_id: str = ""
    """Without the scope `admin`, only one's own."""
    client_id: str = ""
    outcome: Outcome | None = None
    since: datetime | None = None
    """Received at or after this time; aware."""
    until: datetime | None = None
    """Received before this time; aware."""
    open_only: bool = False
    """Only requests that have no outcome yet."""

    def to_proto(self) -> audit_service_pb2.RequestFilter:
        """Raises ValueError where a time is naive."""
        proto = audit_service_pb2.RequestFilter(
            request_id=self.request_id,
            tenant_id=self.tenant_id,
            client_id=self.client_id,
            open_only=self.open_only,
        )
        if self.outcome is not None:
            proto.outcome = events_pb2.Outcome.ValueType(_OUTCOME_NUMBERS.get(self.outcome, 0))
        if self.since is not None:
            proto.receive_time_from.CopyFrom(_timestamp(self.since))
        if self.until is not None:
            proto.receive_time_before.CopyFrom(_timestamp(self.until))
        return proto


@dataclass(frozen=True)
class AuditRecord:
    """What the audit log knows of one request. Times are aware, in UTC."""

    request_id: str
    position: int
    """The place in the order of storing; grows when the record changes."""
    outcome: Outcome | None
    """None while the request runs."""
    error_reason: str
    """The name of an ErrorReason without its prefix; empty where it succeeded or runs."""
    tenant_id: str
    client_id: str
    method: str
    """The full gRPC method name."""
    edge: str
    """`grpc`, `http` or `job`."""
    model: str
    trace_id: str
    usage: Usage
    """Of what was computed for the request: nothing where it was served from the cache."""
    served_from_cache: bool
    finish_reasons: tuple[FinishReason, ...]
    receive_time: datetime | None
    end_time: datetime | None
    time_to_first_token_s: float | None
    store_time: datetime | None
    raw: audit_service_pb2.RequestRecord = field(repr=False, compare=False, hash=False)

    @property
    def duration_s(self) -> float | None:
        """From arrival to end; None while the request runs."""
        if self.receive_time is None or self.end_time is None:
            return None
        return (self.end_time - self.receive_time).total_seconds()

    @classmethod
    def from_proto(cls, record: audit_service_pb2.RequestRecord) -> AuditRecord:
        ended = record.ended
        facts = ended.facts if record.HasField("ended") else record.started.facts
        has_first = ended.HasField("time_to_first_token")
        return cls(
            request_id=record.request_id,
            position=record.position,
            outcome=_OUTCOMES.get(ended.outcome, Outcome.UNKNOWN) if record.HasField("ended") else None,
            error_reason=_REASONS.get(ended.error_reason, str(ended.error_reason)),
            tenant_id=facts.identity.tenant_id,
            client_id=facts.identity.client_id,
            method=facts.method,
            edge=_EDGES.get(facts.edge, str(facts.edge)),
            model=facts.model,
            trace_id=facts.trace_id,
            usage=Usage.from_proto(ended.usage),
            served_from_cache=ended.served_from_cache,
            finish_reasons=tuple(FinishReason.from_proto(value) for value in ended.finish_reasons),
            receive_time=to_datetime(facts.receive_time) if facts.HasField("receive_time") else None,
            end_time=to_datetime(ended.end_time) if ended.HasField("end_time") else None,
            time_to_first_token_s=ended.time_to_first_token.ToTimedelta().total_seconds()
            if has_first
            else None,
            store_time=to_datetime(record.store_time) if record.HasField("store_time") else None,
            raw=record,
        )


def _timestamp(moment: datetime) -> Timestamp:
    if moment.tzinfo is None:
        raise ValueError("since and until need a time zone, such as datetime.now(UTC)")
    timestamp = Timestamp()
    timestamp.FromDatetime(moment.astimezone(UTC))
    return timestamp


_REASONS: dict[int, str] = {
    number: name.removeprefix("ERROR_REASON_") if number else ""
    for name, number in error_reason_pb2.ErrorReason.items()
}
_EDGES: dict[int, str] = {
    number: name.removeprefix("EDGE_").lower() if number else "" for name, number in events_pb2.Edge.items()
}
