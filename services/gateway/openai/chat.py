"""The request of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct

from services.gateway.openai import parsing
from services.gateway.openai.parsing import U32, Given, Harmless, Sampled, StreamOptions
from services.gateway.request import refuse_unoffered

TOLERATED = frozenset(
    {
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "service_tier",
        "store",
    }
)
"""Hints on storing, caching and speed: the answer is the same without them."""

REFUSED: Harmless = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
REFUSED_IN_MESSAGE: Harmless = {"audio": (), "function_call": (), "tool_calls": ([],)}
_OF_REQUEST, _OF_MESSAGE = parsing.Unoffered(REFUSED), parsing.Unoffered(REFUSED_IN_MESSAGE)


class Part(Struct):
    """A part of a message's content; other types than text are refused by name."""

    type: str
    text: str | None = None


class ChatMessage(Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Given = UNSET
    function_call: Given = UNSET
    audio: Given = UNSET
    # What a client gives back of an answer that it got.
    refusal: str | None = None
    annotations: Given = UNSET


class ChatRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """A conversation to go on with."""

    messages: list[ChatMessage]
    stream_options: StreamOptions | None = None
    max_tokens: U32 | None = None
    max_completion_tokens: U32 | None = None
    n: U32 | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None

    parallel_tool_calls: Given = UNSET
    prediction: Given = UNSET
    prompt_cache_key: Given = UNSET
    prompt_cache_options: Given = UNSET
    prompt_cache_retention: Given = UNSET
    service_tier: Given = UNSET
    store: Given = UNSET

    audio: Given = UNSET
    function_call: Given = UNSET
    functions: Given = UNSET
    modalities: Given = UNSET
    moderation: Given = UNSET
    reasoning_effort: Given = UNSET
    response_format: Given = UNSET
    tool_choice: Given = UNSET
    tools: Given = UNSET
    verbosity: Given = UNSET
    web_search_options: Given = UNSET

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def parameter(self, field: str) -> str:
        if field == "spec.max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return super().parameter(field)


_decoder = msgspec.json.Decoder(ChatRequest)


def parse(body: bytes) -> ChatRequest:
    """Raises RequestInvalid or NotImplementedYet."""
    request = parsing.decode(_decoder, body)
    refuse_unoffered(_unoffered(request))
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise parsing.refuse("max_tokens", "contradicts max_completion_tokens: send one of them")
    if request.top_logprobs and not request.logprobs:
        raise parsing.refuse("top_logprobs", "needs logprobs")
    parsing.check_stream_options(request.stream, request.stream_options)
    return request


def _unoffered(request: ChatRequest) -> Sequence[str]:
    found = [*_OF_REQUEST.asked(request)]
    for index, message in enumerate(request.messages):
        found += _OF_MESSAGE.asked(message, f"messages[{index}].")
        if isinstance(message.content, list):
            for place, part in enumerate(message.content):
                if part.type != "text":
                    found.append(f"messages[{index}].content[{place}].type")
    return found
