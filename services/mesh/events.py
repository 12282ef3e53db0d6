"""What happens, in our own types: the events that go through the spool to Kafka.

`event_codec` turns them into the messages of `llmos.events.v1`, whose comments are the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import IntEnum

import msgspec
from msgspec import Struct

from services.mesh.context import Identity


class Edge(IntEnum):
    """By which edge a request came."""

    GRPC = 1
    HTTP = 2
    JOB = 3


class Outcome(IntEnum):
    """How a request ended."""

    SUCCEEDED = 1
    REJECTED = 2
    FAILED = 3
    CANCELLED = 4
    ABORTED = 5
    """Only spools and logging write this one, for a process that died."""


class EngineChange(IntEnum):
    """What happened to an engine."""

    LOADED = 1
    UNLOADED = 2
    FAULT = 3


class Usage(Struct, frozen=True):
    """Tokens, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0


class RequestFacts(Struct, frozen=True):
    """What is the same in a request's intent and its outcome. No text of the caller's."""

    request_id: str
    """Made by us, never taken from a caller: the audit log is keyed by it."""
    identity: Identity | None
    method: str
    """The full gRPC method name, also where the request came over HTTP."""
    edge: Edge
    model: str = ""
    trace_id: str = ""
    receive_time: datetime | None = None
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    """The caller's; at most 16."""


class RequestStarted(Struct, frozen=True):
    """A request's intent, written before its first byte."""

    facts: RequestFacts


class RequestEnded(Struct, frozen=True):
    """A request's outcome."""

    facts: RequestFacts
    outcome: Outcome
    error_reason: str = ""
    """Of the tree in `errors`; empty where it succeeded."""
    status_code: int = 0
    """gRPC's."""
    usage: Usage = Usage()
    finish_reasons: tuple[int, ...] = ()
    """Numbers of `llmos.common.v1.FinishReason`, one for each choice that ended."""
    end_time: datetime | None = None
    time_to_first_token_s: float | None = None
    replica: str = ""
    model_revision: str = ""
    served_from_cache: bool = False
    """The answer had been computed for an equal request; `usage` is of what was computed for this one."""


class AnonymousRejected(Struct, frozen=True):
    """How many requests without a valid credential were refused, from one source in one interval."""

    source_address: str
    error_reason: str
    count: int
    interval_start: datetime
    interval_end: datetime


class SpoolGap(Struct, frozen=True):
    """How many events could not be written since the spool was full or its disk failed."""

    dropped: int
    refused: int
    first: datetime
    last: datetime


class AdminChanged(Struct, frozen=True):
    """An administrator changed something."""

    identity: Identity
    method: str
    object: str
    """Kind and id, such as `client/acme-web`."""
    request_id: str


class EngineChanged(Struct, frozen=True):
    """Something happened to an engine."""

    kind: EngineChange
    model: str
    model_revision: str = ""
    detail: str = ""


OtherEvent = AnonymousRejected | SpoolGap | AdminChanged | EngineChanged
"""What belongs to no one request's life."""
