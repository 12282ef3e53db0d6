"""The answers of POST /v1/chat/completions, as bytes.

What is the same in all chunks of a stream is written once; a token costs one JSON string and one join.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from services.gateway import http_errors
from services.gateway.generation import Delta, Finished, Generation, Started, TokenLogprob
from services.gateway.openai import answers
from services.gateway.openai.answers import DONE, FINISH_REASONS, Finish, Logprob, TokenUsage, encode
from services.gateway.openai.chat import ChatRequest
from services.mesh.errors import LlmosError

ID = "chatcmpl-"


class ChatLogprobs(Struct):
    """One entry for each token."""

    content: list[Logprob]
    refusal: None


class AnswerMessage(Struct):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Struct):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Struct):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: TokenUsage


class ChatDelta(Struct, omit_defaults=True):
    """A piece of what the model says; the role comes with the first."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChunkChoice(Struct):
    """A piece of one of `n` answers; the reason of its end comes with the last."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatCompletionChunk(Struct, omit_defaults=True):
    """One event of a stream, which `[DONE]` ends. An event with `error` instead ends a broken one."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: TokenUsage | None = None


class ChunkWriter:
    """Writes one stream's events as server-sent events."""

    def __init__(self, body: ChatRequest, started: Started, *, created_s: int, n: int) -> None:
        head = encode(
            {
                "id": answers.id_of(ID, started.request_id),
                "object": "chat.completion.chunk",
                "created": created_s,
                "model": started.model,
                "system_fingerprint": started.model_revision,
            }
        )
        self._body = body
        self._open = b"data: " + head[:-1] + b',"choices":['
        # With include_usage, all chunks but the last say that it is not known yet.
        self._close = (b'],"usage":null}' if body.include_usage else b"]}") + b"\n\n"
        self._heads = [self._open + b'{"index":%d,"delta":' % index for index in range(n)]
        self._tail = b',"logprobs":null,"finish_reason":null}' + self._close

    def opening(self) -> bytes:
        """Each choice's first chunk, with the role."""
        delta = b'{"role":"assistant","content":"","refusal":null}'
        return b"".join(head + delta + self._tail for head in self._heads)

    def delta(self, delta: Delta) -> bytes:
        """A piece of text; empty where the delta has nothing to say yet."""
        if delta.logprobs:
            tail = b',"logprobs":' + encode(_logprobs(delta.logprobs))
            tail += b',"finish_reason":null}' + self._close
        elif delta.text:
            tail = self._tail
        else:
            return b""
        return b"".join((self._heads[delta.choice_index], b'{"content":', encode(delta.text), b"}", tail))

    def closing(self, finished: Finished) -> bytes:
        """Each choice's last chunk, the usage where it was asked for, and the end."""
        parts = [
            b'%s{},"logprobs":null,"finish_reason":%s}%s'
            % (head, encode(FINISH_REASONS[reason]), self._close)
            for head, reason in zip(self._heads, finished.finish_reasons, strict=True)
        ]
        if self._body.include_usage:
            parts.append(self._open + b'],"usage":' + encode(answers.usage(finished.usage)) + b"}\n\n")
        parts.append(DONE)
        return b"".join(parts)

    def failed(self, error: LlmosError) -> bytes:
        """The last event of a broken stream: not `[DONE]`."""
        return http_errors.event(error, self._body.parameter)


def answer(body: ChatRequest, generation: Generation, *, created_s: int) -> bytes:
    """The body of an answer in one piece."""
    started = generation.started
    return encode(
        ChatCompletion(
            id=answers.id_of(ID, started.request_id),
            object="chat.completion",
            created=created_s,
            model=started.model,
            system_fingerprint=started.model_revision,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=AnswerMessage("assistant", choice.text, None),
                    logprobs=_logprobs(choice.logprobs) if choice.logprobs else None,
                    finish_reason=FINISH_REASONS[choice.finish_reason],
                )
                for choice in generation.choices
            ],
            usage=answers.usage(generation.usage),
        )
    )


def _logprobs(entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(answers.logprobs(entries), None)
