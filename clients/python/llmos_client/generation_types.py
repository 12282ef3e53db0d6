"""What the client takes and returns. The protobuf message stands beside a value in `raw`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal

from google.protobuf.timestamp_pb2 import Timestamp
from llmos.common.v1 import finish_reason_pb2, usage_pb2
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, model_service_pb2

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the model asks for."""

    id: str
    name: str
    arguments_json: str
    """A JSON object, as the model wrote it."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant's message."""
    tool_call_id: str = ""
    """Of a tool's message: the call that it answers."""
    name: str = ""


class FinishReason(StrEnum):
    """Why a choice ended."""

    UNKNOWN = "unknown"
    """A reason of a later version of the server."""
    END_OF_SEQUENCE = "end_of_sequence"
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"
    CANCELLED = "cancelled"

    @classmethod
    def from_proto(cls, value: int) -> FinishReason:
        return _FINISH_REASONS.get(value, cls.UNKNOWN)


_FINISH_REASONS: dict[int, FinishReason] = {
    number: FinishReason(name.removeprefix("FINISH_REASON_").lower())
    for name, number in finish_reason_pb2.FinishReason.items()
    if number and name.removeprefix("FINISH_REASON_") in FinishReason.__members__
}


@dataclass(frozen=True)
class Usage:
    """Tokens, counted by the engine."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Of the prompt's tokens: those whose work was done before."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @classmethod
    def from_proto(cls, usage: usage_pb2.Usage) -> Usage:
        return cls(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens)


@dataclass(frozen=True)
class Started:
    """The first event of a stream."""

    request_id: str
    model: str
    model_revision: str
    seed: int
    """The seed in force; the same request with it gives the same answer."""
    stream_id: str
    """Of a resumable stream; otherwise empty."""

    @classmethod
    def from_proto(cls, started: generation_pb2.Started) -> Started:
        return cls(started.request_id, started.model, started.model_revision, started.seed, started.stream_id)


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call."""

    index: int
    id: str
    """On the call's first piece only."""
    name: str
    """On the call's first piece only."""
    arguments_json: str


@dataclass(frozen=True)
class Delta:
    """A piece of the answer."""

    seq: int
    """1, 2, 3 and so on; the client has checked that none is missing."""
    choice_index: int
    text: str
    """May be empty."""
    token_ids: tuple[int, ...]
    tool_calls: tuple[ToolCallDelta, ...] = ()
    raw: generation_pb2.Delta = field(
        default_factory=generation_pb2.Delta, repr=False, compare=False, hash=False
    )
    """With log probabilities, where they were asked for."""

    @classmethod
    def from_proto(cls, delta: generation_pb2.Delta) -> Delta:
        calls = tuple(ToolCallDelta(c.index, c.id, c.name, c.arguments_json) for c in delta.tool_calls)
        return cls(delta.seq, delta.choice_index, delta.text, tuple(delta.token_ids), calls, delta)


@dataclass(frozen=True)
class Moved:
    """The stream went on at another replica; nothing was lost."""

    stream_id: str


@dataclass(frozen=True)
class Finished:
    """The last event of a stream."""

    finish_reasons: tuple[FinishReason, ...]
    """One for each choice, in order."""
    usage: Usage

    @classmethod
    def from_proto(cls, finished: generation_pb2.Finished) -> Finished:
        ends = sorted(finished.choices, key=lambda end: end.index)
        reasons = tuple(FinishReason.from_proto(end.finish_reason) for end in ends)
        return cls(reasons, Usage.from_proto(finished.usage))


Event = Started | Delta | Moved | Finished
"""One event of a stream."""


@dataclass(frozen=True)
class Choice:
    """One of the answers to a request."""

    index: int
    text: str
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    choices: tuple[Choice, ...]
    usage: Usage
    request_id: str
    trace_id: str
    model: str
    model_revision: str
    seed: int
    raw: generation_service_pb2.GenerateResponse | None = field(
        default=None, repr=False, compare=False, hash=False
    )
    """None where the answer came as a stream."""

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason if self.choices else FinishReason.UNKNOWN

    @classmethod
    def from_proto(cls, response: generation_service_pb2.GenerateResponse, trace_id: str) -> Completion:
        return cls(
            choices=tuple(
                Choice(
                    choice.index,
                    choice.text,
                    FinishReason.from_proto(choice.finish_reason),
                    tuple(ToolCall(c.id, c.name, c.arguments_json) for c in choice.tool_calls),
                )
                for choice in response.choices
            ),
            usage=Usage.from_proto(response.usage),
            request_id=response.request_id,
            trace_id=trace_id,
            model=response.model,
            model_revision=response.model_revision,
            seed=response.seed,
            raw=response,
        )


@dataclass(frozen=True)
class TokenCount:
    """The length of a prompt."""

    prompt_tokens: int
    """Template included."""
    context_tokens: int
    """What the model can hold, prompt and answer together."""


@dataclass(frozen=True)
class Model:
    """A model that requests may name."""

    id: str
    revision: str
    capabilities: tuple[str, ...]
    """Such as `generate`, `chat`."""
    context_tokens: int
    ready: bool
    """Whether a replica serves it now."""
    create_time: datetime | None
    numerics_id: str = ""
    """Names what a replica computes it with: weights, kernels, number formats, instruction set."""
    raw: model_service_pb2.Model = field(
        default_factory=model_service_pb2.Model, repr=False, compare=False, hash=False
    )

    @classmethod
    def from_proto(cls, model: model_service_pb2.Model) -> Model:
        return cls(
            id=model.id,
            revision=model.revision,
            capabilities=tuple(_capabilities(model.capabilities)),
            context_tokens=model.context_tokens,
            ready=model.ready,
            create_time=to_datetime(model.create_time) if model.HasField("create_time") else None,
            numerics_id=model.numerics_id,
            raw=model,
        )


def _capabilities(values: Iterable[int]) -> Iterable[str]:
    return (_CAPABILITIES.get(value, str(value)) for value in values)


_CAPABILITIES: dict[int, str] = {
    number: name.removeprefix("MODEL_CAPABILITY_").lower()
    for name, number in model_service_pb2.ModelCapability.items()
}


def to_datetime(timestamp: Timestamp) -> datetime:
    """Aware, in UTC."""
    return timestamp.ToDatetime(tzinfo=UTC)
