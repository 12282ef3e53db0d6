"""The whole platform as a program asks it that uses an OpenAI client: over the gateway's HTTP."""

from __future__ import annotations

import time
from contextlib import aclosing
from urllib.parse import urlsplit

from tests.bench import events
from tests.bench.through_gateway import Platform
from tests.bench.work import CannotMeasure, Stream


class PlatformOverHttp(Platform):
    """A `Subject`: the same mesh, asked with the client that asks other servers."""

    name = "platform"

    async def ask(self, prompt: str, max_tokens: int, due_s: float) -> Stream:
        """Raises CannotMeasure. The tokens are those that the answer's usage counts."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": 1,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        url, key = urlsplit(self._mesh.http_url()), self._key or self._mesh.admin_key
        first_s = last_s = 0.0
        tokens = 0
        text: list[str] = []
        try:
            answer = events.post(str(url.hostname), int(url.port or 0), "/v1/completions", body, key)
            async with aclosing(answer) as found:
                async for event in found:
                    if "error" in event:
                        raise CannotMeasure(f"the platform failed: {event['error']}")
                    last_s = time.perf_counter() - due_s
                    first_s = first_s or last_s
                    if event.get("usage"):
                        tokens = event["usage"]["completion_tokens"]
                    text += [choice["text"] for choice in event["choices"]]
        except events.Refused as error:
            raise CannotMeasure(f"the platform refused: {error}") from error
        except (OSError, EOFError, ValueError) as error:
            raise CannotMeasure(f"the platform failed: {error!r}") from error
        return Stream(first_s, last_s, tokens, text="".join(text))
