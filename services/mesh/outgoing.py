"""Calls of which several messages come, as the calling side has them."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextvars import Context
from typing import Any

import grpc

from services.mesh import status
from services.mesh.errors import Cancelled


class OutgoingStream:
    """A stream of responses. Iterate it once; `cancel` in a `finally` ends the work on the other side."""

    def __init__(self, begin: Callable[[], Awaitable[Any]]) -> None:
        self._begin = begin
        self._call: Any = None
        self._cancelled = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        self._call = await self._begin()
        if self._cancelled:
            self._call.cancel()
        try:
            while True:
                response = await _read(self._call)
                if response is grpc.aio.EOF:
                    return
                yield response
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from error
        finally:
            # An abandoned call is not always collected, so never cancelled (grpc #43462).
            self._call.cancel()

    def cancel(self) -> None:
        """Ends the call, begun or not. Safe to repeat."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()


class OutgoingExchange(OutgoingStream):
    """A stream in both directions. Iterate it, and `write` as soon as the first response is there: it begins
    with the iteration. One write at a time."""

    async def write(self, message: Any) -> None:
        """Raises LlmosError where the call has ended; the iteration says why."""
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.InternalError) as error:
            raise Cancelled("The call has ended.") from error

    async def done_writing(self) -> None:
        """No more will be written."""
        await self._call.done_writing()


class _Unshared:
    """A future, as the task takes it that waits for it: cancelled, it ends the waiting, and not the future.

    `asyncio.shield` says the same with a second future and three turns of the event loop, for each token.
    """

    __slots__ = ("_asyncio_future_blocking", "_context", "_future", "_wake")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self._asyncio_future_blocking = True
        self._future = future

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._future.get_loop()

    def add_done_callback(self, wake: Callable[[asyncio.Future[Any]], object], *, context: Context) -> None:
        self._wake, self._context = wake, context
        self._future.add_done_callback(wake, context=context)

    def cancel(self, msg: object = None) -> bool:
        if not self._future.remove_done_callback(self._wake):
            return False  # the task is about to go on, and is cancelled then
        loop = self._future.get_loop()
        cancelled: asyncio.Future[Any] = loop.create_future()
        cancelled.cancel(msg)
        loop.call_soon(self._wake, cancelled, context=self._context)
        return True


@types.coroutine
def _read(call: Any) -> Generator[_Unshared | None, None, Any]:
    """The next response. Who is cancelled here cancels the call, and leaves the read to end by itself:
    cancelled itself, it would never free its memory (grpc #43360). A task for each read would cost more."""
    reading = call.read()
    while True:
        try:
            waits_for = reading.send(None)
        except StopIteration as ended:
            return ended.value
        if waits_for is None:
            yield None
            continue
        # As a task does that takes a future from a coroutine.
        waits_for._asyncio_future_blocking = False
        try:
            yield _Unshared(waits_for)
        except asyncio.CancelledError:
            if not waits_for.cancelled():
                call.cancel()
                _end_later(reading, waits_for)
                raise
        except Exception:  # noqa: S110
            pass  # the coroutine meets it when it goes on


def _end_later(reading: Any, waits_for: asyncio.Future[Any]) -> None:
    """Goes on with an abandoned read when what it waits for has come."""

    def go_on(_: object) -> None:
        try:
            following = reading.send(None)
        except (asyncio.CancelledError, Exception):  # its end, whichever: nobody waits for it
            return
        following._asyncio_future_blocking = False
        _end_later(reading, following)

    waits_for.add_done_callback(go_on)
