"""One HTTP request and its answer, over ASGI: a bounded body in, one answer or a stream out.

A caller that goes away cancels the work: `watch` says so to the task that serves the request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, MutableMapping
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from services.gateway import http_errors
from services.gateway.http_errors import unsupported_media_type
from services.gateway.http_receiving import ReceivingBody
from services.mesh.clock import Clock
from services.mesh.errors import Cancelled, ConcurrencyLimit, Internal, LlmosError, MessageTooLarge

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON = (b"content-type", b"application/json")
_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx collects answers otherwise.
    (b"x-accel-buffering", b"no"),
)
_JSON_TYPE = re.compile(
    r"application/([a-z0-9.+-]+\+)?json\s*(;\s*charset\s*=\s*\"?utf-8\"?\s*)?;?", re.IGNORECASE
)
"""In UTF-8, as JSON is anyway. A request without a type is taken to be JSON: small clients send none."""
DISCARD_FACTOR = 8
"""Of a body that is too large, so many times the limit is read and dropped, so that the caller, who is still
sending, gets to read the answer. Beyond that the connection is simply closed."""


class Exchange:
    """Sends at most one answer; after its first byte an error becomes the stream's last event."""

    gone = False
    """The caller has left."""
    parameter: http_errors.Parameter = str
    """How errors name the fields of the message; a route that knows better names sets it."""
    _begun = False
    _complete = False
    _close = False
    _received = False
    _watched: asyncio.Task[Any] | None = None
    _failed: Callable[[LlmosError], bytes] | None = staticmethod(http_errors.event)

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        request_id: str,
        clock: Clock,
        response_metadata: Mapping[str, str] | None = None,
        task: asyncio.Task[Any] | None = None,
    ) -> None:
        """`response_metadata` becomes headers of the answer: what it holds when the answer begins. `task` is
        that which serves the request, where it is to be watched."""
        self.scope = scope
        self.headers = _joined(scope["headers"])
        self._receive = receive
        self._send = send
        cycle = scope.get("llmos.cycle")
        self._cycle = cycle if cycle is not None and send == cycle.send else None
        """uvicorn's part in it; None where the answer passes somebody else on its way, such as CORS."""
        self._clock = clock
        self._received_s = clock.monotonic()
        self._request_id = request_id
        self._task = task
        self._response_metadata = {} if response_metadata is None else response_metadata

    @property
    def stalled(self) -> bool:
        """Whether the caller was cut off since it read nothing."""
        return bool(getattr(self.scope.get("llmos.connection"), "stalled", False))

    @property
    def answered(self) -> bool:
        """Whether an answer has begun."""
        return self._begun

    async def json(self, max_bytes: int) -> bytes:
        """The whole body of a request that holds JSON, not yet parsed. Raises RequestInvalid, or as
        `body` does."""
        # First, since who still sends does not read the answer.
        body = await self.body(max_bytes)
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise unsupported_media_type("A compressed body (content-encoding) is not read here.")
        content_type = self.headers.get("content-type", "")
        if content_type and not _JSON_TYPE.fullmatch(content_type):
            raise unsupported_media_type(f"A body of the type `{content_type[:100]}` is not read here.")
        return body

    async def body(self, max_bytes: int) -> bytes:
        """The whole body. Raises MessageTooLarge, ConcurrencyLimit where too many come slowly or all places
        are taken when it is here, or Cancelled where the caller leaves meanwhile."""
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes * DISCARD_FACTOR:
            self._close = True
            raise _too_large(max_bytes)
        connection = self.scope.get("llmos.connection")
        receiving: ReceivingBody | None = None if connection is None else connection.receiving()
        if receiving is None:
            body = connection.take_body(self._cycle) if connection is not None and self._cycle else None
            if body is None:
                return await self._whole(max_bytes, None)
            self._received = True
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
            return bytes(body)
        try:
            with receiving:
                return await self._whole(max_bytes, receiving)
        except ConcurrencyLimit:
            self._close = not self._received
            raise

    async def _whole(self, max_bytes: int, receiving: ReceivingBody | None) -> bytes:
        parts: list[bytes] = []
        size = 0
        while not self._received:
            part = await self._part()
            size += len(part)
            if size > max_bytes:
                parts.clear()
            else:
                parts.append(part)
            if receiving is not None:
                receiving.holds(size if parts else 0)
            if size > max_bytes * DISCARD_FACTOR:
                self._close = True
                raise _too_large(max_bytes)
        if size > max_bytes:
            raise _too_large(max_bytes)
        return b"".join(parts)

    async def parts(self, max_bytes: int, timeout_s: float) -> AsyncIterator[bytes]:
        """The body as it comes, for one that is too large to hold: it may take `timeout_s` in all, beyond
        what other bodies may. Raises as `body`, but does not let the caller finish: `discard` does."""
        connection = self.scope.get("llmos.connection")
        if connection is not None:
            connection.allow_receiving(timeout_s)
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes:
            raise _too_large(max_bytes)
        size = 0
        while not self._received:
            part = await self._part()
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
            if part:
                yield part

    async def discard(self, max_bytes: int) -> None:
        """Reads and drops what there is left of the body, so that a caller who is still sending gets to read
        the answer. Where that is more than `max_bytes` the connection is closed instead."""
        size = 0
        while not self._received and not self.gone:
            size += len(await self._part())
            if size > max_bytes:
                self._close = True
                return

    async def _part(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
            raise Cancelled("The caller went away before it had sent the request.")
        self._received = not message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part

    def watch(self) -> None:
        """From now on, the caller's leaving cancels the task. The body must have been read."""
        self._watched = self._task
        connection = self.scope.get("llmos.connection")
        if connection is not None:
            connection.on_gone(self._on_gone)

    async def respond(self, status: int, body: bytes, headers: Iterable[Header] = (JSON,)) -> None:
        """Sends the whole answer."""
        headers = (*headers, (b"content-length", b"%d" % len(body)))
        connection = self.scope.get("llmos.connection")
        cycle = self._cycle
        if connection is not None and cycle is not None and self.scope["method"] != "HEAD":
            cycle.keep_alive = cycle.keep_alive and not self._close
            if connection.answer(cycle, self._head(status, headers), body):
                self._begun = self._complete = True
                return
        await self._start(status, headers)
        self._complete = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def begin_stream(
        self, failed: Callable[[LlmosError], bytes] = http_errors.event, opening: bytes = b""
    ) -> None:
        """Sends the head of a stream of server-sent events, and the events that open it; `failed` writes the
        last ones of a broken one."""
        self._failed = failed
        connection = self.scope.get("llmos.connection")
        if opening and connection is not None:
            # The head goes with it.
            connection.hold()
        await self._start(200, _STREAM)
        if opening:
            await self.send(opening)

    async def begin_content(self, length: int, headers: Iterable[Header]) -> None:
        """Sends the head of an answer whose body is sent in pieces. One that breaks off ends its connection,
        so that nobody takes it for whole."""
        self._failed = None
        await self._start(200, (*headers, (b"content-length", b"%d" % length)))

    def gather(self, on: bool = True) -> None:
        """From now on events that come in a burst may be sent together, some milliseconds later."""
        connection = self.scope.get("llmos.connection")
        if connection is not None:
            connection.gather(on)

    async def send(self, data: bytes) -> None:
        """Sends a piece; waits where the caller reads too slowly."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes) -> None:
        """Sends the last events and ends the stream."""
        self._complete = True
        self.gather(False)
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def fail(self, error: LlmosError) -> None:
        """Sends the error, in whatever form is still possible."""
        if self._complete or self.gone:
            return
        if self._begun:
            if self._failed is not None:
                await self.end(self._failed(error))
            elif (connection := self.scope.get("llmos.connection")) is not None:
                connection.cut_off()
        else:
            body = http_errors.body(error, self.parameter)
            await self.respond(http_errors.status(error), body, (JSON, *http_errors.headers(error)))

    def close(self) -> None:
        """Ends the watching."""
        self._watched = None

    async def _start(self, status: int, own: Iterable[Header]) -> None:
        self._begun = True
        headers = [(name.encode(), value.encode()) for name, value in self._common()]
        headers.extend(own)
        if self._close:
            headers.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _head(self, status: int, own: Collection[Header]) -> bytes:
        """An answer's head, but for its last line. Raises Internal where a header would be several."""
        common = self._common()
        text = "".join([_status_line(status), *[f"{name}: {value}\r\n" for name, value in common]])
        head = b"".join([text.encode(), *[b"%b: %b\r\n" % header for header in own]])
        if not head.count(b"\n") == head.count(b"\r") == 1 + len(common) + len(own):
            raise Internal("a header of an answer has several lines")
        return head

    def _common(self) -> list[tuple[str, str]]:
        """The headers that all answers have, and those of this one that are its metadata."""
        elapsed_ms = int((self._clock.monotonic() - self._received_s) * 1000)
        return [
            ("date", _date(int(self._clock.now().timestamp()))),
            ("x-request-id", self._request_id),
            ("openai-processing-ms", str(elapsed_ms)),
            *self._response_metadata.items(),
        ]

    def _on_gone(self) -> None:
        if self._watched is not None and not self._complete:
            self.gone = True
            self._watched.cancel()


@lru_cache(maxsize=64)
def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"


@lru_cache(maxsize=4)
def _date(at_s: int) -> str:
    """RFC 9110, section 5.6.7; it is the same for all answers of a second."""
    return format_datetime(datetime.fromtimestamp(at_s, UTC), usegmt=True)


def _joined(pairs: Iterable[Header]) -> dict[str, str]:
    """The values of a repeated header are joined, so that none of two credentials is silently preferred."""
    found: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _too_large(max_bytes: int) -> MessageTooLarge:
    return MessageTooLarge(f"The body is larger than the limit of {max_bytes} bytes.")
