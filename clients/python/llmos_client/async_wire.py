"""The channel of the client for asyncio with its stubs, and the ways in which calls are made on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import grpc
from llmos.auth.v1 import admin_service_pb2_grpc
from llmos.gateway.v1 import generation_service_pb2_grpc, job_service_pb2_grpc, model_service_pb2_grpc
from llmos.logging.v1 import audit_service_pb2_grpc

from llmos_client import transport
from llmos_client.calls import Unary
from llmos_client.config import ClientConfig
from llmos_client.errors import Cancelled, LlmosError, from_status
from llmos_client.retry import Attempts, RetryThrottle

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ResultT = TypeVar("ResultT")


class Wire:
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

    @cached_property
    def jobs(self) -> job_service_pb2_grpc.JobServiceAsyncStub:
        return job_service_pb2_grpc.JobServiceStub(self.channel)

    async def close(self) -> None:
        if "channel" in self.__dict__:
            await self.channel.close()

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        call: Unary[RequestT, ResponseT, ResultT],
    ) -> ResultT:
        """One answer to one request."""
        return await self._attempted(partial(method, call.request), call)

    async def streamed(
        self,
        method: grpc.aio.StreamUnaryMultiCallable[RequestT, ResponseT],
        call: Unary[Sequence[RequestT], ResponseT, ResultT],
        sent: Callable[[int], object] | None,
    ) -> ResultT:
        """One answer to many requests. `sent` is told how many have been sent."""

        def requests() -> Iterator[RequestT]:
            for count, request in enumerate(call.request, 1):
                yield request
                if sent is not None:
                    sent(count)

        return await self._attempted(lambda **options: method(requests(), **options), call)

    async def _attempted(
        self, send: Callable[..., Awaitable[ResponseT]], call: Unary[Any, ResponseT, ResultT]
    ) -> ResultT:
        trace_id = transport.new_trace_id()
        attempts = Attempts(self.config.retry, self.throttle, call.timeout_s)
        while True:
            try:
                response = await send(
                    timeout=attempts.remaining_s(),
                    metadata=transport.call_metadata(self.config, trace_id),
                )
            except grpc.aio.AioRpcError as rpc_error:
                error = self.error(rpc_error, trace_id)
                if not call.retries or error.job_id:  # it has become a job, and is tried again as that
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


async def read(
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


async def pause(wait_s: float, cancelled: asyncio.Event, trace_id: str) -> None:
    """Waits between two attempts. Raises Cancelled where the stream is cancelled meanwhile."""
    try:
        async with asyncio.timeout(wait_s):
            await cancelled.wait()
    except TimeoutError:
        return
    raise Cancelled("The call was cancelled.", trace_id=trace_id)
