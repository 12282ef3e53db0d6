"""What the answers of several routes have in common, and the list of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from msgspec import Struct

from services.gateway.generation import FinishReason, Model, TokenLogprob, Usage
from services.gateway.http_errors import Said

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"
FINISH_REASONS: Mapping[FinishReason, Literal["stop", "length", "tool_calls", "content_filter"]] = {
    FinishReason.END_OF_SEQUENCE: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.CONTENT_FILTER: "content_filter",
    FinishReason.CANCELLED: "stop",
}
Finish = Literal["stop", "length", "tool_calls", "content_filter"]
LEAST_LOGPROB = -9999.0
"""JSON has no infinity; this is the client library's own floor for "as good as impossible"."""


class ErrorAnswer(Struct):
    """Every error on every path."""

    error: Said


class Alternative(Struct):
    """A token and its natural log probability."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(Struct):
    """The chosen token, and the most probable ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class PromptTokensDetails(Struct):
    cached_tokens: int


class TokenUsage(Struct):
    """What was counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ModelObject(Struct):
    """A model that the caller may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Struct):
    """The models that the caller may use."""

    object: Literal["list"]
    data: list[ModelObject]


def id_of(prefix: str, request_id: str) -> str:
    """The id that clients expect, made of the request's own."""
    return f"{prefix}{request_id.removeprefix('req_')}"


def model(found: Model) -> bytes:
    return encode(_model(found))


def models(found: Sequence[Model]) -> bytes:
    return encode(ModelList("list", [_model(each) for each in found]))


def usage(counted: Usage) -> TokenUsage:
    return TokenUsage(
        prompt_tokens=counted.prompt_tokens,
        completion_tokens=counted.completion_tokens,
        total_tokens=counted.prompt_tokens + counted.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(counted.cached_prompt_tokens),
    )


def logprobs(entries: Sequence[TokenLogprob]) -> list[Logprob]:
    return [
        Logprob(
            text_of(entry.chosen.token),
            floored(entry.chosen.logprob),
            list(entry.chosen.token),
            [Alternative(text_of(o.token), floored(o.logprob), list(o.token)) for o in entry.top],
        )
        for entry in entries
    ]


def text_of(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def floored(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _model(found: Model) -> ModelObject:
    created_s = int(found.create_time.timestamp()) if found.create_time else 0
    return ModelObject(found.id, "model", created_s, "llmos")
