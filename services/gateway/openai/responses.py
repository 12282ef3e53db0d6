"""The request of POST /v1/responses: text in, text out. Nothing is stored, so nothing can be referred to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from services.gateway.openai import parsing
from services.gateway.openai.parsing import U32, Given, Harmless, Sampled, StreamOptions
from services.gateway.request import refuse_unoffered
from services.mesh.errors import RequestInvalid

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = frozenset(
    {
        LOGPROBS,
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""All but the first tell of things that an answer of this server never has."""

TOLERATED = frozenset(
    {
        "max_tool_calls",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "service_tier",
        "store",
    }
)
"""Hints on storing, caching and speed, and a bound on calls that are never made."""

REFUSED: Harmless = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
}
REFUSED_IN_TEXT: Harmless = {"format": ({"type": "text"},), "verbosity": ("medium",)}
_OF_REQUEST, _OF_TEXT = parsing.Unoffered(REFUSED), parsing.Unoffered(REFUSED_IN_TEXT)
_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})


class InputPart(Struct, forbid_unknown_fields=True):
    """A part of a message; other types than text are refused by name."""

    type: str
    text: str
    # What a client gives back of an answer that it got, and a hint on caching.
    annotations: Given = UNSET
    logprobs: Given = UNSET
    prompt_cache_breakpoint: Given = UNSET


class InputItem(Struct, forbid_unknown_fields=True):
    """A message; other items are refused by name."""

    role: str
    content: str | list[InputPart]
    type: str = "message"
    # What a client gives back of an answer that it got.
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class TextConfig(Struct, forbid_unknown_fields=True):
    """The form of the text: only free text is offered."""

    format: Given = UNSET
    verbosity: Given = UNSET


class ResponsesRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """A text, or messages, to answer."""

    input: str | list[InputItem]
    instructions: str | None = None
    """Stands before the input, as a message of the system."""
    stream_options: StreamOptions | None = None
    max_output_tokens: U32 | None = None
    top_logprobs: U32 | None = None
    include: list[str] | None = None
    text: TextConfig | None = None

    max_tool_calls: Given = UNSET
    parallel_tool_calls: Given = UNSET
    prompt_cache_key: Given = UNSET
    prompt_cache_options: Given = UNSET
    prompt_cache_retention: Given = UNSET
    service_tier: Given = UNSET
    store: Given = UNSET

    access_programs: Given = UNSET
    background: Given = UNSET
    background_options: Given = UNSET
    context_management: Given = UNSET
    conversation: Given = UNSET
    image: Given = UNSET
    moderation: Given = UNSET
    previous_response_id: Given = UNSET
    prompt: Given = UNSET
    reasoning: Given = UNSET
    tool_choice: Given = UNSET
    tools: Given = UNSET
    truncation: Given = UNSET

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def parameter(self, field: str) -> str:
        """The instructions are the message's first: the caller's own begin after it."""
        messages = "spec.prompt.chat.messages"
        if field == "spec.max_tokens":
            return "max_output_tokens"
        if not field.startswith("spec.prompt.chat"):
            return super().parameter(field)
        index, bracket, rest = field.removeprefix(f"{messages}[").partition("]")
        if not bracket or not index.isdecimal():
            return "input"
        place = int(index)
        if self.instructions is not None:
            if place == 0:
                return "instructions"
            place -= 1
        return "input" if isinstance(self.input, str) else f"input[{place}]{rest}"


class _AnyPart(Struct):
    type: str = ""


class _AnyItem(Struct):
    type: str = "message"
    content: str | list[_AnyPart] | None = None


class _AnyInput(Struct):
    input: str | list[_AnyItem] = ""


_decoder = msgspec.json.Decoder(ResponsesRequest)
_tolerant = msgspec.json.Decoder(_AnyInput)


def parse(body: bytes) -> ResponsesRequest:
    """Raises RequestInvalid or NotImplementedYet."""
    try:
        request = parsing.decode(_decoder, body)
    except RequestInvalid:
        # An item of another kind has other fields: its kind is what is to be named.
        refuse_unoffered(_other_kinds(body))
        raise
    refuse_unoffered(_unoffered(request))
    for index, name in enumerate(request.include or ()):
        if name not in INCLUDABLE:
            raise parsing.refuse(f"include[{index}]", "names nothing that can be included")
    if request.top_logprobs and not request.logprobs:
        raise parsing.refuse("top_logprobs", f"needs include: {LOGPROBS}")
    options = request.stream_options
    parsing.check_stream_options(request.stream, options)
    if options is not None and options.include_usage is not None:
        raise parsing.refuse("stream_options.include_usage", "is not a known parameter: usage always comes")
    return request


def _unoffered(request: ResponsesRequest) -> Sequence[str]:
    found = [*_OF_REQUEST.asked(request)]
    if request.text is not None:
        found += _OF_TEXT.asked(request.text, "text.")
    if isinstance(request.input, list):
        found += _kinds(request.input)
    return found


def _kinds(items: Iterable[Any]) -> Iterator[str]:
    """Of items as they are read, or of any."""
    for index, item in enumerate(items):
        if item.type != "message":
            yield f"input[{index}].type"
        elif isinstance(item.content, list):
            for place, part in enumerate(item.content):
                if part.type not in _TEXT_PARTS:
                    yield f"input[{index}].content[{place}].type"


def _other_kinds(body: bytes) -> Sequence[str]:
    try:
        found = _tolerant.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    return [*_kinds(found.input)] if isinstance(found.input, list) else ()
