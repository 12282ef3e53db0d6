"""The channel of the client for threads with its stubs, and the one way in which unary calls are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import grpc
from llmos.auth.v1 import admin_service_pb2_grpc
from llmos.gateway.v1 import generation_service_pb2_grpc, job_service_pb2_grpc, model_service_pb2_grpc
from llmos.logging.v1 import audit_service_pb2_grpc

from llmos_client import transport
from llmos_client.calls import Unary
from llmos_client.config import ClientConfig
from llmos_client.errors import LlmosError, from_status
from llmos_client.retry import Attempts, RetryThrottle

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ResultT = TypeVar("ResultT")


class Wire:
    """The channel with its stubs, and the one way in which unary calls are made."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.throttle = RetryThrottle()
        credentials = transport.channel_credentials(config)
        options = transport.channel_options()
        if credentials is None:
            self.channel = grpc.insecure_channel(config.target, options)
        else:
            self.channel = grpc.secure_channel(config.target, credentials, options)
        self.generation = generation_service_pb2_grpc.GenerationServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)
        self.jobs = job_service_pb2_grpc.JobServiceStub(self.channel)

    def unary(
        self,
        method: grpc.UnaryUnaryMultiCallable[RequestT, ResponseT],
        call: Unary[RequestT, ResponseT, ResultT],
    ) -> ResultT:
        """One answer to one request."""
        return self._attempted(partial(method, call.request), call)

    def streamed(
        self,
        method: grpc.StreamUnaryMultiCallable[RequestT, ResponseT],
        call: Unary[Sequence[RequestT], ResponseT, ResultT],
        sent: Callable[[int], object] | None,
    ) -> ResultT:
        """One answer to many requests. `sent` is told how many have been sent, in a thread of grpc's."""

        def requests() -> Iterator[RequestT]:
            for count, request in enumerate(call.request, 1):
                yield request
                if sent is not None:
                    sent(count)

        return self._attempted(lambda **options: method(requests(), **options), call)

    def _attempted(self, send: Callable[..., ResponseT], call: Unary[Any, ResponseT, ResultT]) -> ResultT:
        trace_id = transport.new_trace_id()
        attempts = Attempts(self.config.retry, self.throttle, call.timeout_s)
        while True:
            try:
                response = send(
                    timeout=attempts.remaining_s(),
                    metadata=transport.call_metadata(self.config, trace_id),
                )
            except grpc.RpcError as rpc_error:
                error = self.error(rpc_error, trace_id)
                if not call.retries or error.job_id:  # it has become a job, and is tried again as that
                    raise error from rpc_error
                wait_s = attempts.failed(error)
            else:
                attempts.succeeded()
                return call.decode(response, trace_id)
            time.sleep(wait_s)

    def error(self, rpc_error: grpc.RpcError, trace_id: str) -> LlmosError:
        return from_status(
            rpc_error.code(),
            rpc_error.details() or "",
            [(entry.key, entry.value) for entry in rpc_error.trailing_metadata() or ()],
            target=self.config.target,
            trace_id=trace_id,
        )
