"""The answers of POST /v1/completions, as bytes. Log probabilities have the older form, by columns."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from services.gateway import http_errors
from services.gateway.generation import Delta, Finished, Generation, Started, TokenLogprob
from services.gateway.openai import answers
from services.gateway.openai.answers import DONE, FINISH_REASONS, Finish, TokenUsage, encode
from services.gateway.openai.completions import CompletionRequest
from services.mesh.errors import LlmosError

ID = "cmpl-"


class CompletionLogprobs(Struct):
    """One entry of each list for each token; `text_offset` counts characters from the answer's first."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Struct):
    """One of `n` answers; in a stream a piece of it, and the reason of its end with the last."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(Struct, omit_defaults=True):
    """The whole answer. A stream's events have the same form: `[DONE]` ends it, an event with `error` instead
    a broken one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None


class _Columns:
    """Log probabilities of one choice, with what came before them counted."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        found = CompletionLogprobs([], [], [], [])
        for entry in entries:
            found.tokens.append(answers.text_of(entry.chosen.token))
            found.token_logprobs.append(answers.floored(entry.chosen.logprob))
            found.top_logprobs.append(
                {answers.text_of(other.token): answers.floored(other.logprob) for other in entry.top}
            )
            found.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(entry.chosen.token))
        return found


class ChunkWriter:
    """Writes one stream's events as server-sent events."""

    def __init__(self, body: CompletionRequest, started: Started, *, created_s: int, n: int) -> None:
        head = encode(
            {
                "id": answers.id_of(ID, started.request_id),
                "object": "text_completion",
                "created": created_s,
                "model": started.model,
                "system_fingerprint": started.model_revision,
            }
        )
        self._body = body
        self._open = b"data: " + head[:-1] + b',"choices":['
        close = (b'],"usage":null}' if body.include_usage else b"]}") + b"\n\n"
        self._close = close
        self._tails = [b',"index":%d,"logprobs":null,"finish_reason":null}' % i + close for i in range(n)]
        self._columns = [_Columns() for _ in range(n)]

    def opening(self) -> bytes:
        """Nothing: the first piece of text is the first event."""
        return b""

    def delta(self, delta: Delta) -> bytes:
        """A piece of text; empty where the delta has nothing to say yet."""
        index = delta.choice_index
        if delta.logprobs:
            tail = b',"index":%d,"logprobs":%s,"finish_reason":null}%s' % (
                index,
                encode(self._columns[index].of(delta.logprobs)),
                self._close,
            )
        elif delta.text:
            tail = self._tails[index]
        else:
            return b""
        return b"".join((self._open, b'{"text":', encode(delta.text), tail))

    def closing(self, finished: Finished) -> bytes:
        """Each choice's last chunk, the usage where it was asked for, and the end."""
        parts = [
            b'%s{"text":"","index":%d,"logprobs":null,"finish_reason":%s}%s'
            % (self._open, index, encode(FINISH_REASONS[reason]), self._close)
            for index, reason in enumerate(finished.finish_reasons)
        ]
        if self._body.include_usage:
            parts.append(self._open + b'],"usage":' + encode(answers.usage(finished.usage)) + b"}\n\n")
        parts.append(DONE)
        return b"".join(parts)

    def failed(self, error: LlmosError) -> bytes:
        """The last event of a broken stream: not `[DONE]`."""
        return http_errors.event(error, self._body.parameter)


def answer(body: CompletionRequest, generation: Generation, *, created_s: int) -> bytes:
    """The body of an answer in one piece."""
    started = generation.started
    return encode(
        Completion(
            id=answers.id_of(ID, started.request_id),
            object="text_completion",
            created=created_s,
            model=started.model,
            system_fingerprint=started.model_revision,
            choices=[
                CompletionChoice(
                    text=choice.text,
                    index=choice.index,
                    logprobs=_Columns().of(choice.logprobs) if choice.logprobs else None,
                    finish_reason=FINISH_REASONS[choice.finish_reason],
                )
                for choice in generation.choices
            ],
            usage=answers.usage(generation.usage),
        )
    )
