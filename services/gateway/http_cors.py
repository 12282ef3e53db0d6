"""Cross-origin requests: which pages of the web may call the edge from a browser. None, unless set.

A browser's own credentials (cookies) are never allowed: the page has to send an `authorization` header.
"""

from __future__ import annotations

from services.gateway import http_errors
from services.gateway.http_exchange import JSON, ASGIApp, Header, Message, Receive, Scope, Send

ANY = "*"
MAX_AGE_S = 600
METHODS = b"GET, POST, DELETE"
EXPOSED = (
    b"x-request-id, openai-processing-ms, retry-after, retry-after-ms, x-should-retry, x-llmos-cache, age, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
"""What a page's script may read of an answer."""


class Cors:
    """Answers preflights, and says of each answer which page may read it."""

    def __init__(self, origins: frozenset[str]) -> None:
        """`origins` such as `https://chat.example`; `*` is every one."""
        self._origins = origins

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application with this before it; itself where no origin is allowed."""
        if not self._origins:
            return app

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            await self._serve(app, scope, receive, send)

        return serve

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"])
        origin = given.get(b"origin")
        if origin is None:
            await app(scope, receive, send)
            return
        allowed = self._allowed(origin)
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in given:
            await _preflight(allowed, given.get(b"access-control-request-headers", b""), send)
            return

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *allowed]
                if allowed:
                    message["headers"].append((b"access-control-expose-headers", EXPOSED))
            await send(message)

        await app(scope, receive, send_allowed)

    def _allowed(self, origin: bytes) -> tuple[Header, ...]:
        """Empty where the page may not read the answer."""
        if ANY in self._origins:
            return ((b"access-control-allow-origin", b"*"),)
        vary = (b"vary", b"origin")
        if origin.decode("latin-1") in self._origins:
            return ((b"access-control-allow-origin", origin), vary)
        return ()


async def _preflight(allowed: tuple[Header, ...], asked: bytes, send: Send) -> None:
    if not allowed:
        body = http_errors.plain_body(403, "Pages of this origin may not call this server.")
        await _answer(send, 403, [JSON], body)
        return
    headers = [
        *allowed,
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", b"%d" % MAX_AGE_S),
    ]
    if asked:
        # All that it asks for: none but `authorization` means anything to who may call.
        headers.append((b"access-control-allow-headers", asked))
    await _answer(send, 204, headers, b"")


async def _answer(send: Send, status: int, headers: list[Header], body: bytes) -> None:
    if body:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
