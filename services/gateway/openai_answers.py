"""The answers of the OpenAI-compatible routes, as bytes.

What is the same in all chunks of a stream is written once; a token costs one JSON string and one join.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from services.gateway.generation import (
    Delta,
    Finished,
    FinishReason,
    Generation,
    Model,
    Started,
    TokenLogprob,
    Usage,
)

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"

FINISH_REASONS: Mapping[FinishReason, str] = {
    FinishReason.END_OF_SEQUENCE: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.CONTENT_FILTER: "content_filter",
    FinishReason.CANCELLED: "stop",
}


def completion_id(request_id: str) -> str:
    """The id that clients expect, made of the request's own."""
    return f"chatcmpl-{request_id.removeprefix('req_')}"


class ChunkWriter:
    """Writes one stream's events as server-sent events."""

    def __init__(self, started: Started, *, created_s: int, n: int, include_usage: bool) -> None:
        head = encode(
            {
                "id": completion_id(started.request_id),
                "object": "chat.completion.chunk",
                "created": created_s,
                "model": started.model,
                "system_fingerprint": started.model_revision,
            }
        )
        self._n = n
        self._include_usage = include_usage
        self._open = b"data: " + head[:-1] + b',"choices":['
        # With include_usage, all chunks but the last say that it is not known yet.
        self._close = (b'],"usage":null}' if include_usage else b"]}") + b"\n\n"
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
        if self._include_usage:
            parts.append(self._open + b'],"usage":' + encode(_usage(finished.usage)) + b"}\n\n")
        parts.append(DONE)
        return b"".join(parts)


def completion(generation: Generation, *, created_s: int) -> bytes:
    """The body of an answer in one piece."""
    started = generation.started
    return encode(
        {
            "id": completion_id(started.request_id),
            "object": "chat.completion",
            "created": created_s,
            "model": started.model,
            "system_fingerprint": started.model_revision,
            "choices": [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": _logprobs(choice.logprobs) if choice.logprobs else None,
                    "finish_reason": FINISH_REASONS[choice.finish_reason],
                }
                for choice in generation.choices
            ],
            "usage": _usage(generation.usage),
        }
    )


def model(found: Model) -> bytes:
    return encode(_model(found))


def models(found: Sequence[Model]) -> bytes:
    return encode({"object": "list", "data": [_model(each) for each in found]})


def _model(found: Model) -> dict[str, Any]:
    created_s = int(found.create_time.timestamp()) if found.create_time else 0
    return {"id": found.id, "object": "model", "created": created_s, "owned_by": "llmos"}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
    }


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_alternative(entry.chosen.token, entry.chosen.logprob),
                "top_logprobs": [_alternative(other.token, other.logprob) for other in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _alternative(token: bytes, logprob: float) -> dict[str, Any]:
    # JSON has no infinity; the client library's own floor for "as good as impossible" is -9999.
    return {
        "token": token.decode("utf-8", "replace"),
        "logprob": max(logprob, -9999.0),
        "bytes": list(token),
    }
