"""The client for asyncio; the same as `sync_client` but for how it waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc
from llmos.auth.v1 import admin_service_pb2_grpc
from llmos.gateway.v1 import generation_service_pb2, generation_service_pb2_grpc, model_service_pb2_grpc
from llmos.logging.v1 import audit_service_pb2, audit_service_pb2_grpc

from llmos_client import calls, transport
from llmos_client.async_admin import AsyncAdmin
from llmos_client.audit_types import AuditFilter, AuditRecord
from llmos_client.calls import GenerateOptions, Prompt, StreamOptions, Unary
from llmos_client.config import ClientConfig, ClientOptions
from llmos_client.errors import Cancelled, LlmosError, Unavailable, from_status
from llmos_client.generation_types import Completion, Delta, Event, Model, TokenCount
from llmos_client.retry import Attempts, RetryThrottle
from llmos_client.streaming import StreamFacts, StreamState
from llmos_client.tailing import TailBreaks, TailState

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ResultT = TypeVar("ResultT")


class AsyncClient:
    """A connection to an llmos gateway. Use it inside one event loop, as a context manager."""

    def __init__(self, target: str | None = None, **options: Unpack[ClientOptions]) -> None:
        """`target` is host:port; see `config` for the environment. Raises ConfigurationError.

        Nothing is connected before the first call.
        """
        self._wire = _Wire(ClientConfig.of(target, options))
        self.audit = AsyncAudit(self._wire)
        """The audit log; needs the scope `audit.read`."""
        self.admin = AsyncAdmin(self._wire)
        """Administration; needs the scope `admin` or `tenant.admin`."""

    @property
    def target(self) -> str:
        return self._wire.config.target

    @property
    def default_model(self) -> str | None:
        """The model of calls that name none."""
        return self._wire.config.model

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """A whole answer. Raises a class of `errors`."""
        call = calls.generate(self._wire.config, prompt, options)
        return await self._wire.unary(self._wire.generation.Generate, call)

    def stream(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> AsyncStream:
        """An answer as it comes. The work begins now; errors of the call are raised by the iteration."""
        return AsyncStream(self._wire, calls.stream(self._wire.config, prompt, options))

    async def count_tokens(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        system: str | None = None,
        timeout_s: float | None = None,
    ) -> TokenCount:
        """The length of a prompt as the model would see it."""
        call = calls.count_tokens(self._wire.config, prompt, model=model, system=system, timeout_s=timeout_s)
        return await self._wire.unary(self._wire.generation.CountTokens, call)

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The models that this credential may use, sorted by id."""
        call = calls.list_models(self._wire.config, timeout_s=timeout_s)
        return await self._wire.unary(self._wire.models.ListModels, call)

    async def close(self) -> None:
        """Ends what is still running."""
        await self._wire.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.target!r})"


class AsyncStream(StreamFacts):
    """An answer as it comes: iterate it for its deltas. Use it as a context manager: leaving it early, by
    `break`, by an error or by the cancellation of the task, cancels the work at the server.

    The iteration ends only after the answer was complete and in order; otherwise it raises: StreamIncomplete,
    StreamBroken, or what the server said.
    """

    def __init__(self, wire: _Wire, call: calls.StreamCall) -> None:
        self._wire = wire
        self._request = call.request
        self._attempts = Attempts(wire.config.retry, wire.throttle, call.timeout_s)
        self._state = StreamState(transport.new_trace_id())
        self._cancelled = asyncio.Event()
        self._events = self._run()
        self._call = self._open()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for event in self._events:
            if isinstance(event, Delta):
                yield event

    def events(self) -> AsyncIterator[Event]:
        """All events, in place of the deltas alone."""
        return self._events

    async def result(self) -> Completion:
        """Reads to the end, and gives the whole answer."""
        async for _ in self._events:
            pass
        return self._state.completion()

    def cancel(self) -> None:
        """Ends the work, at the server too. The iteration then raises Cancelled."""
        self._cancelled.set()
        self._call.cancel()

    close = cancel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _open(self) -> grpc.aio.UnaryStreamCall[Any, generation_service_pb2.StreamGenerateResponse]:
        return self._wire.generation.StreamGenerate(
            self._request,
            timeout=self._attempts.remaining_s(),
            metadata=transport.call_metadata(self._wire.config, self._state.trace_id),
        )

    async def _run(self) -> AsyncIterator[Event]:
        try:
            while True:
                try:
                    response = await _read(self._call, self._cancelled, self._state.trace_id)
                except grpc.aio.AioRpcError as rpc_error:
                    error = self._wire.error(rpc_error, self._state.trace_id)
                    if self._state.started is not None:
                        raise error from rpc_error
                    await _pause(self._attempts.failed(error), self._cancelled, self._state.trace_id)
                    self._call = self._open()
                    continue
                if response is None:
                    self._state.end()
                    return
                if self._state.started is None:
                    self._attempts.succeeded()
                event = self._state.accept(response)
                if event is not None:
                    yield event
        finally:
            self._call.cancel()


class AsyncAudit:
    """The audit log."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    async def search(
        self, wanted: AuditFilter | None = None, *, limit: int = 50, timeout_s: float | None = None
    ) -> list[AuditRecord]:
        """The newest requests that match, newest first, `limit` at most (up to 100,000).

        `timeout_s` is for each page of 1,000.
        """
        calls.check_limit(limit)
        records: list[AuditRecord] = []
        token = ""
        while True:
            call = calls.search_page(
                self._wire.config,
                wanted or AuditFilter(),
                limit=limit - len(records),
                page_token=token,
                timeout_s=timeout_s,
            )
            page = await self._wire.unary(self._wire.audit.Search, call)
            records += [AuditRecord.from_proto(record) for record in page.records]
            token = page.next_page_token
            if not token or len(records) >= limit:
                return records[:limit]

    def tail(
        self,
        wanted: AuditFilter | None = None,
        *,
        last: int = 10,
        after_position: int | None = None,
        timeout_s: float | None = None,
        give_up_after_s: float = 60.0,
    ) -> AsyncAuditTail:
        """Follows the log: `last` stored records (up to 1,000) or all after a position, then what is added.

        Goes on after a break without losing or doubling a record. Without `timeout_s` it ends only by
        `cancel`, or when the server stays out of reach for `give_up_after_s`.
        """
        return AsyncAuditTail(
            self._wire,
            TailState(wanted or AuditFilter(), last=last, after_position=after_position),
            TailBreaks(
                self._wire.config.retry,
                self._wire.throttle,
                timeout_s=timeout_s,
                give_up_after_s=give_up_after_s,
            ),
        )


class AsyncAuditTail:
    """Iterate it for records; the same request comes again when its outcome is stored."""

    def __init__(self, wire: _Wire, state: TailState, breaks: TailBreaks) -> None:
        self._wire = wire
        self._state = state
        self._breaks = breaks
        self._trace_id = transport.new_trace_id()
        self._cancelled = asyncio.Event()
        self._records = self._run()
        self._call = self._open()

    @property
    def position(self) -> int | None:
        """Of the last record; a later tail goes on from it with `after_position`."""
        return self._state.position

    def __aiter__(self) -> AsyncIterator[AuditRecord]:
        return self._records

    def cancel(self) -> None:
        """Ends the tail; the iteration then raises Cancelled."""
        self._cancelled.set()
        self._call.cancel()

    close = cancel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _open(self) -> grpc.aio.UnaryStreamCall[Any, audit_service_pb2.TailResponse]:
        return self._wire.audit.Tail(
            self._state.request(),
            timeout=self._breaks.call_timeout_s(),
            metadata=transport.call_metadata(self._wire.config, self._trace_id),
        )

    async def _next(self) -> audit_service_pb2.TailResponse:
        try:
            response = await _read(self._call, self._cancelled, self._trace_id)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._wire.error(rpc_error, self._trace_id) from rpc_error
        if response is None:
            raise Unavailable("The server ended the tail.", trace_id=self._trace_id)
        return response

    async def _run(self) -> AsyncIterator[AuditRecord]:
        try:
            while True:
                try:
                    response = await self._next()
                except LlmosError as error:
                    await _pause(self._breaks.failed(error), self._cancelled, self._trace_id)
                    self._call = self._open()
                    continue
                self._breaks.received()
                record = self._state.accept(response)
                if record is not None:
                    yield record
        finally:
            self._call.cancel()


class _Wire:
    """The channel with its stubs, and the one way in which unary calls are made."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.throttle = RetryThrottle()
        self._credentials = transport.channel_credentials(config)

    @cached_property
    def channel(self) -> grpc.aio.Channel:
        """Made by the first call: grpc ties it to the loop of then, and a client may be made before."""
        options = transport.channel_options()
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.config.target, options)
        return grpc.aio.secure_channel(self.config.target, self._credentials, options)

    @cached_property
    def generation(self) -> generation_service_pb2_grpc.GenerationServiceAsyncStub:
        return generation_service_pb2_grpc.GenerationServiceStub(self.channel)

    @cached_property
    def models(self) -> model_service_pb2_grpc.ModelServiceAsyncStub:
        return model_service_pb2_grpc.ModelServiceStub(self.channel)

    @cached_property
    def audit(self) -> audit_service_pb2_grpc.AuditServiceAsyncStub:
        return audit_service_pb2_grpc.AuditServiceStub(self.channel)

    @cached_property
    def admin(self) -> admin_service_pb2_grpc.AdminServiceAsyncStub:
        return admin_service_pb2_grpc.AdminServiceStub(self.channel)

    async def close(self) -> None:
        if "channel" in self.__dict__:
            await self.channel.close()

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        call: Unary[RequestT, ResponseT, ResultT],
    ) -> ResultT:
        trace_id = transport.new_trace_id()
        attempts = Attempts(self.config.retry, self.throttle, call.timeout_s)
        while True:
            try:
                response = await method(
                    call.request,
                    timeout=attempts.remaining_s(),
                    metadata=transport.call_metadata(self.config, trace_id),
                )
            except grpc.aio.AioRpcError as rpc_error:
                error = self.error(rpc_error, trace_id)
                if not call.retries:
                    raise error from rpc_error
                wait_s = attempts.failed(error)
            else:
                attempts.succeeded()
                return call.decode(response, trace_id)
            await asyncio.sleep(wait_s)

    def error(self, rpc_error: grpc.aio.AioRpcError, trace_id: str) -> LlmosError:
        return from_status(
            rpc_error.code(),
            rpc_error.details() or "",
            rpc_error.trailing_metadata() or (),
            target=self.config.target,
            trace_id=trace_id,
        )


async def _read(
    call: grpc.aio.UnaryStreamCall[Any, ResponseT], cancelled: asyncio.Event, trace_id: str
) -> ResponseT | None:
    """The next message, or None at the end.

    grpc tells of a call that was cancelled here as it would of a cancelled task; the difference matters,
    since swallowing the second would keep a task alive that was told to end.
    """
    try:
        response = await call.read()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if cancelled.is_set() and (task is None or not task.cancelling()):
            raise Cancelled("The call was cancelled.", trace_id=trace_id) from None
        raise
    return None if response is grpc.aio.EOF else cast(ResponseT, response)


async def _pause(wait_s: float, cancelled: asyncio.Event, trace_id: str) -> None:
    """Waits between two attempts. Raises Cancelled where the stream is cancelled meanwhile."""
    try:
        async with asyncio.timeout(wait_s):
            await cancelled.wait()
    except TimeoutError:
        return
    raise Cancelled("The call was cancelled.", trace_id=trace_id)
