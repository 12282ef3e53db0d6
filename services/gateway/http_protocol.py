"""One HTTP connection: uvicorn's protocol with the limits that it lacks.

A connection has a deadline for the TLS handshake, one for each request from its first byte to its last,
one for idling, and one for a reader that takes nothing. Its head, its number and its body (`http_exchange`)
are bounded. Its requests are served one after another by one task, which waits for the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from services.gateway import http_errors
from services.gateway.http_gathering import GatheringTransport
from services.gateway.http_receiving import Receiving, ReceivingBody
from services.mesh.interceptors import own_task


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a connection may cost."""

    max_connections: int
    max_head_bytes: int
    """Request line and headers together."""
    receive_timeout_s: float
    """From a request's first byte (or the connection's beginning) to its last."""
    idle_timeout_s: int
    """Between two requests of a connection."""
    write_timeout_s: float
    """A reader that takes nothing for so long is cut off."""


Work = tuple[RequestResponseCycle, Any]
"""A request, and the application that serves it."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        state: ServerState,
        limits: HttpLimits,
        bodies: Receiving,
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, state, {})
        self._limits = limits
        self._bodies = bodies
        self._on_lost = on_lost
        self._receiving: asyncio.TimerHandle | None = None
        self._stalling: asyncio.TimerHandle | None = None
        self._in_message = False
        self._in_head = False
        self._has_completed = False
        """Whether what was received last ended a message."""
        self._received_bytes = 0
        """Of the piece that was received last."""
        self._head_bytes = 0
        """Of a message's pieces so far: what its head has at most."""
        self._unsent_bytes = 0
        self.stalled = False
        self._gathering: GatheringTransport | None = None
        self._tell_gone: Callable[[], None] | None = None
        self._next: asyncio.Future[Work | None] | None = None
        """What the connection's task waits for; None where it has something to do, or there is none."""
        self._idling: asyncio.TimerHandle | None = None
        self._idle_since_s: float | None = None
        """By the event loop's time, since the last answer; None where something has come since."""

    def on_gone(self, tell: Callable[[], None]) -> None:
        """Has the request that is being served told when its caller leaves, now where that has happened."""
        self._tell_gone = tell
        if self.transport.is_closing():
            tell()

    def receiving(self) -> ReceivingBody | None:
        """The block in which the request's body is read; None where all of it is here."""
        return self._bodies.body() if self._in_message else None

    def allow_receiving(self, timeout_s: float) -> None:
        """Gives what is left of the request that is being received so long, in place of what there was."""
        if self._receiving is not None:
            self._disarm()
            self._receiving = self.loop.call_later(timeout_s, self._on_receive_timeout)

    def cut_off(self) -> None:
        """Ends the connection at once, in the middle of an answer."""
        self.transport.abort()

    def gather(self, on: bool) -> None:
        """Whether what is written may wait a moment for what comes next; to be ended before the last one."""
        if self._gathering is not None:
            self._gathering.on = on

    def take_body(self, cycle: RequestResponseCycle) -> bytes | None:
        """A request's whole body; None where not all of it is here."""
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        self.flow.resume_reading()
        return body

    def answer(self, cycle: RequestResponseCycle, head: bytes, body: bytes) -> bool:
        """Writes a whole answer in one piece, of whose head the empty line is missing; False where the reader
        has to be waited for. As uvicorn's `send` with two messages."""
        if self.flow.write_paused:
            return False
        if cycle.disconnected:
            return True
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        end = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
        self.transport.write(b"".join((head, end, body)))
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def hold(self) -> None:
        """Has what is written next wait for what is written after it, which has to follow."""
        if self._gathering is not None:
            self._gathering.holds = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._gathering = GatheringTransport(transport, self.loop)
        super().connection_made(cast("asyncio.Transport", self._gathering))
        if len(self.connections) > self._limits.max_connections:
            self._refuse(503, "The server has as many connections as it may have. Retry later.")
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        for timer in (self._idling, self._stalling):
            if timer is not None:
                timer.cancel()
        self._give(None)
        super().connection_lost(exc)
        if self._tell_gone is not None:
            self._tell_gone()
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        self._idle_since_s = None
        self._received_bytes = len(data)
        self._head_bytes += len(data)
        self._has_completed = False
        super().data_received(data)
        if self.transport.is_closing() or (self._has_completed and not self._in_message):
            return
        if self._receiving is None:
            self._arm()
        if self._in_head and self._head_bytes > self._limits.max_head_bytes:
            self._refuse(431, "The request's head is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["llmos.connection"] = self  # type: ignore[typeddict-unknown-key]
        # Also where it came with the rest of one that was answered early.
        self._idle_since_s = None
        self._in_message = self._in_head = True
        self._head_bytes = self._received_bytes

    def on_headers_complete(self) -> None:
        self._in_head = False
        max_bytes = self._limits.max_head_bytes
        if self._head_bytes > max_bytes:  # with what came of the body
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > max_bytes:
                self._refuse(431, "The request's head is too large.")
                return
        super().on_headers_complete()
        self.scope["llmos.cycle"] = self.cycle  # type: ignore[typeddict-unknown-key]

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        self._has_completed = True
        self._disarm()
        if self.transport.is_closing():
            return
        if self.cycle.response_complete:  # before its request was
            self._pause()
        else:
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        # A task for each request would be made, entered in asyncio's list of all tasks, and taken out of it.
        if not self._give((cycle, app)):
            task = self.loop.create_task(self._serve((cycle, app)), context=Context())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def _give(self, work: Work | None) -> bool:
        """Whether the connection's task waited for it."""
        waiting, self._next = self._next, None
        if waiting is None or waiting.done():
            return False
        waiting.set_result(work)
        return True

    async def _serve(self, work: Work | None) -> None:
        """Serves a request, and those that come after it."""
        task = own_task()
        while work is not None:
            cycle, app = work
            await cycle.run_asgi(app)
            del cycle, work
            # Who was cancelled takes no more; where requests came before they were asked for, another waits.
            if self.transport.is_closing() or self._next is not None or task.cancelling():
                return
            self._next = waiting = self.loop.create_future()
            work = await waiting

    def on_response_complete(self) -> None:
        """As uvicorn's, with one timer for all of the connection's pauses."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._pause()

    def _pause(self) -> None:
        """Nothing is to be done until the next request comes."""
        self._idle_since_s = self.loop.time()
        if self._idling is None:
            self._idling = self.loop.call_later(self._limits.idle_timeout_s, self._on_idle)

    def _on_idle(self) -> None:
        self._idling = None
        if self._idle_since_s is None:  # the next answer begins the next pause
            return
        due_s = self._idle_since_s + self._limits.idle_timeout_s
        if due_s > self.loop.time():
            self._idling = self.loop.call_at(due_s, self._on_idle)
        elif not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._stalling = self.loop.call_later(self._limits.write_timeout_s, self._on_stall)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalling is not None:
            self._stalling.cancel()
            self._stalling = None

    def _on_stall(self) -> None:
        unsent_bytes = self.transport.get_write_buffer_size()
        if unsent_bytes < self._unsent_bytes:
            # Slow, but it reads.
            self._unsent_bytes = unsent_bytes
            self._stalling = self.loop.call_later(self._limits.write_timeout_s, self._on_stall)
            return
        self.stalled = True
        self.transport.abort()

    def _arm(self) -> None:
        self._receiving = self.loop.call_later(self._limits.receive_timeout_s, self._on_receive_timeout)

    def _disarm(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _on_receive_timeout(self) -> None:
        self._receiving = None
        if not self.transport.is_closing():
            self._refuse(408, "The request did not arrive in time.")

    def _refuse(self, code: int, text: str) -> None:
        """Answers by itself, unless an answer is on its way, and closes."""
        # Before the first request there is none, whatever uvicorn's annotation says.
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is None or not cycle.response_started or cycle.response_complete:
            body = http_errors.plain_body(code, text)
            head = (
                f"HTTP/1.1 {code} {HTTPStatus(code).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n"
            )
            if code == HTTPStatus.SERVICE_UNAVAILABLE:
                head += "retry-after: 1\r\n"
            self.transport.write(head.encode() + b"\r\n" + body)
        self.transport.close()
        if cycle is not None and not cycle.response_complete:
            # At once, and not when the other side has taken the rest: a task must not wait for that.
            cycle.disconnected = True
            cycle.message_event.set()
            if self._tell_gone is not None:
                self._tell_gone()
