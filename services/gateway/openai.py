"""The request of POST /v1/chat/completions, as OpenAI's clients write it.

Three kinds of fields: those that are understood, those that are tolerated because they change nothing of
the answer, and those that are refused because ignoring them would. What stands in no list is refused too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from services.mesh.errors import NotImplementedYet, RequestInvalid, Violation

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
NULL = Raw(b"null")

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

REFUSED: Mapping[str, tuple[Any, ...]] = {
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
"""What is not offered, with the values that ask for nothing and pass."""

_REFUSED_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {"audio": (), "function_call": (), "tool_calls": ([],)}


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Raw = NULL
    """Tolerated: padding against a listener who counts bytes."""


class Part(Struct):
    """A part of a message's content; other types than text are refused by name."""

    type: str
    text: str | None = None


class ChatMessage(Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Raw = NULL
    function_call: Raw = NULL
    audio: Raw = NULL
    # What a client gives back of an answer that it got.
    refusal: str | None = None
    annotations: Raw = NULL


class ChatRequest(Struct, forbid_unknown_fields=True):
    """The body. `extra_body` fields of ours: top_k, min_p, repetition_penalty, ignore_eos, stop_token_ids."""

    model: str
    messages: list[ChatMessage]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[U32, float] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    max_tokens: U32 | None = None
    max_completion_tokens: U32 | None = None
    stop: str | list[str] | None = None
    n: U32 | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None

    top_k: U32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[U32] | None = None

    parallel_tool_calls: Raw = NULL
    prediction: Raw = NULL
    prompt_cache_key: Raw = NULL
    prompt_cache_options: Raw = NULL
    prompt_cache_retention: Raw = NULL
    service_tier: Raw = NULL
    store: Raw = NULL

    audio: Raw = NULL
    function_call: Raw = NULL
    functions: Raw = NULL
    modalities: Raw = NULL
    moderation: Raw = NULL
    reasoning_effort: Raw = NULL
    response_format: Raw = NULL
    tool_choice: Raw = NULL
    tools: Raw = NULL
    verbosity: Raw = NULL
    web_search_options: Raw = NULL

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


_decoder = msgspec.json.Decoder(ChatRequest)
_AT = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`", re.DOTALL)
_MAX_NAME_CHARS = 128


def parse(body: bytes) -> ChatRequest:
    """Raises RequestInvalid or NotImplementedYet, which name the parameter as the caller wrote it."""
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestInvalid(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise RequestInvalid("The body is nested too deeply.") from None
    named = list(_unoffered(request))
    if named:
        names = ", ".join(f"`{name}`" for name in named)
        raise NotImplementedYet(
            f"This version of the server does not offer {names}.",
            hint="Leave it out.",
            violations=[Violation(name, "is not offered by this version of the server") for name in named],
        )
    _check_combinations(request)
    return request


def refuse(field: str, description: str) -> RequestInvalid:
    """The error for one parameter."""
    return RequestInvalid(f"`{field}` {description}.", violations=[Violation(field, description)])


def _check_combinations(request: ChatRequest) -> None:
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise refuse("max_tokens", "contradicts max_completion_tokens: send one of them")
    if request.stream_options is not None and not request.stream:
        raise refuse("stream_options", "is only allowed when stream is true")


def _unoffered(request: ChatRequest) -> Iterator[str]:
    for name, harmless in REFUSED.items():
        if _asks(getattr(request, name), harmless):
            yield name
    for index, message in enumerate(request.messages):
        for name, harmless in _REFUSED_IN_MESSAGE.items():
            if _asks(getattr(message, name), harmless):
                yield f"messages[{index}].{name}"
        if isinstance(message.content, list):
            for place, part in enumerate(message.content):
                if part.type != "text":
                    yield f"messages[{index}].content[{place}].type"


def _asks(raw: Raw, harmless: tuple[Any, ...]) -> bool:
    if raw is NULL:
        return False
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return True
    return value is not None and value not in harmless


def _invalid(text: str) -> RequestInvalid:
    """Turns `Expected `int`, got `str` - at `$.messages[0].role`` into an error that names the parameter."""
    found = _AT.search(text)
    path = found.group(1) if found else ""
    said = text[: found.start()] if found else text
    if named := _UNKNOWN.match(said) or _MISSING.match(said):
        path = f"{path}.{named.group(1)}" if path else named.group(1)
        said = "is not a known parameter" if said.startswith("Object contains") else "is required"
    else:
        said = said[:1].lower() + said[1:]
    path = path[:_MAX_NAME_CHARS]
    if not path:
        return RequestInvalid(f"The body is invalid: {said}.")
    return refuse(path, said)
