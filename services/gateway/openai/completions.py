"""The request of POST /v1/completions: raw text to continue, without the model's template."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from services.gateway.openai import parsing
from services.gateway.openai.parsing import U32, Given, Harmless, Sampled, StreamOptions
from services.gateway.request import refuse_unoffered

REFUSED: Harmless = {"echo": (False,), "suffix": ("",)}
_UNOFFERED = parsing.Unoffered(REFUSED)


class CompletionRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """A text to continue."""

    prompt: str | list[str | int | list[int]]
    """One text, or a list of one; several, and token ids, are refused by name."""
    stream_options: StreamOptions | None = None
    max_tokens: U32 | None = None
    n: U32 | None = None
    best_of: U32 | None = None
    """Refused unless it asks for no more than what is returned."""
    logprobs: U32 | None = None
    """So many of the most probable tokens with each token; 0: the chosen one alone."""

    echo: Given = UNSET
    suffix: Given = UNSET

    @property
    def text(self) -> str:
        given = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return given if isinstance(given, str) else ""

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def parameter(self, field: str) -> str:
        return "logprobs" if field == "spec.top_logprobs" else super().parameter(field)


_decoder = msgspec.json.Decoder(CompletionRequest)


def parse(body: bytes) -> CompletionRequest:
    """Raises RequestInvalid or NotImplementedYet."""
    request = parsing.decode(_decoder, body)
    if request.prompt == []:
        raise parsing.refuse("prompt", "must be a text, or a list of one text")
    refuse_unoffered(_unoffered(request))
    parsing.check_stream_options(request.stream, request.stream_options)
    return request


def _unoffered(request: CompletionRequest) -> Sequence[str]:
    found = []
    if isinstance(request.prompt, list) and (
        len(request.prompt) > 1 or not isinstance(request.prompt[0], str)
    ):
        found.append("prompt")
    if request.best_of is not None and request.best_of != (request.n or 1):
        found.append("best_of")
    return [*found, *_UNOFFERED.asked(request)]
