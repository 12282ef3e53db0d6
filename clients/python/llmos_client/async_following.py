"""Streams that go on after a break, for asyncio; the same as `sync_following` but for how it waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc
from llmos.logging.v1 import audit_service_pb2

from llmos_client import transport
from llmos_client.async_wire import Wire, pause, read
from llmos_client.audit_types import AuditRecord
from llmos_client.errors import LlmosError
from llmos_client.tailing import Followed, TailBreaks, TailState

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ItemT = TypeVar("ItemT")


class AsyncFollowing(Generic[RequestT, ResponseT, ItemT]):
    """Iterate it for what comes. Use it as a context manager: leaving it early cancels the call."""

    def __init__(
        self,
        wire: Wire,
        method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT],
        state: Followed[RequestT, ResponseT, ItemT],
        breaks: TailBreaks,
    ) -> None:
        self._wire = wire
        self._method = method
        self._state = state
        self._breaks = breaks
        self._trace_id = transport.new_trace_id()
        self._cancelled = asyncio.Event()
        self._items = self._run()
        self._call = self._open()

    def __aiter__(self) -> AsyncIterator[ItemT]:
        return self._items

    def cancel(self) -> None:
        """Ends it; the iteration then raises Cancelled."""
        self._cancelled.set()
        self._call.cancel()

    close = cancel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _open(self) -> grpc.aio.UnaryStreamCall[Any, ResponseT]:
        return self._method(
            self._state.request(),
            timeout=self._breaks.call_timeout_s(),
            metadata=transport.call_metadata(self._wire.config, self._trace_id),
        )

    async def _next(self) -> ResponseT | None:
        try:
            response = await read(self._call, self._cancelled, self._trace_id)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._wire.error(rpc_error, self._trace_id) from rpc_error
        if response is None:
            self._state.closed()
        return response

    async def _run(self) -> AsyncIterator[ItemT]:
        try:
            while not self._state.ended:
                try:
                    response = await self._next()
                except LlmosError as error:
                    await pause(self._breaks.failed(error), self._cancelled, self._trace_id)
                    self._call = self._open()
                    continue
                self._breaks.received()
                item = self._state.accept(response) if response is not None else None
                if item is not None:
                    yield item
        finally:
            self._call.cancel()


class AsyncAuditTail(
    AsyncFollowing[audit_service_pb2.TailRequest, audit_service_pb2.TailResponse, AuditRecord]
):
    """Iterate it for records; the same request comes again when its outcome is stored."""

    _state: TailState

    def __init__(self, wire: Wire, state: TailState, breaks: TailBreaks) -> None:
        super().__init__(wire, wire.audit.Tail, state, breaks)

    @property
    def position(self) -> int | None:
        """Of the last record; a later tail goes on from it with `after_position`."""
        return self._state.position
