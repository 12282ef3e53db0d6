"""Streams that go on after a break, for threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import grpc
from llmos.logging.v1 import audit_service_pb2

from llmos_client import transport
from llmos_client.audit_types import AuditRecord
from llmos_client.errors import Cancelled, LlmosError
from llmos_client.sync_wire import Wire
from llmos_client.tailing import Followed, TailBreaks, TailState

if TYPE_CHECKING:
    from grpc import _CallIterator

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ItemT = TypeVar("ItemT")


class Following(Generic[RequestT, ResponseT, ItemT]):
    """Iterate it for what comes. Use it as a context manager: leaving it early cancels the call."""

    def __init__(
        self,
        wire: Wire,
        method: grpc.UnaryStreamMultiCallable[RequestT, ResponseT],
        state: Followed[RequestT, ResponseT, ItemT],
        breaks: TailBreaks,
    ) -> None:
        self._wire = wire
        self._method = method
        self._state = state
        self._breaks = breaks
        self._trace_id = transport.new_trace_id()
        self._cancelled = threading.Event()
        self._items = self._run()
        self._call = self._open()

    def __iter__(self) -> Iterator[ItemT]:
        return self._items

    def cancel(self) -> None:
        """Ends it; the iteration then raises Cancelled. From any thread."""
        self._cancelled.set()
        self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _open(self) -> _CallIterator[ResponseT]:
        return self._method(
            self._state.request(),
            timeout=self._breaks.call_timeout_s(),
            metadata=transport.call_metadata(self._wire.config, self._trace_id),
        )

    def _next(self) -> ResponseT | None:
        try:
            response = next(self._call, None)
        except grpc.RpcError as rpc_error:
            raise self._wire.error(rpc_error, self._trace_id) from rpc_error
        if response is None:
            self._state.closed()
        return response

    def _run(self) -> Iterator[ItemT]:
        try:
            while not self._state.ended:
                try:
                    response = self._next()
                except LlmosError as error:
                    if self._cancelled.wait(self._breaks.failed(error)):
                        raise Cancelled("The call was cancelled.", trace_id=self._trace_id) from error
                    self._call = self._open()
                    if self._cancelled.is_set():  # by another thread, which saw the former call
                        self._call.cancel()
                    continue
                self._breaks.received()
                item = self._state.accept(response) if response is not None else None
                if item is not None:
                    yield item
        finally:
            self._call.cancel()


class AuditTail(Following[audit_service_pb2.TailRequest, audit_service_pb2.TailResponse, AuditRecord]):
    """Iterate it for records; the same request comes again when its outcome is stored."""

    _state: TailState

    def __init__(self, wire: Wire, state: TailState, breaks: TailBreaks) -> None:
        super().__init__(wire, wire.audit.Tail, state, breaks)

    @property
    def position(self) -> int | None:
        """Of the last record; a later tail goes on from it with `after_position`."""
        return self._state.position
