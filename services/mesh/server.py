"""The serving side of gRPC: one place for its limits, its keepalive and its way of stopping."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any, cast
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from services.mesh import status, validation
from services.mesh.context import RequestContext
from services.mesh.errors import LlmosError
from services.mesh.health import Health
from services.mesh.interceptors import REQUEST_ID_KEY, Call, Chain, new_request_id
from services.mesh.running import RunningCalls
from services.mesh.settings import ServiceSettings
from services.mesh.source_address import NO_PROXIES, TrustedProxies
from services.mesh.stalling import writing
from services.mesh.tls import TlsFiles

logger = logging.getLogger(__name__)

HEALTH = "grpc.health.v1.Health"
INFRASTRUCTURE = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Health and reflection: open to everyone, outside of the chain."""

MAX_SEND_BYTES = 64 * 1024 * 1024
STOP_MARGIN_S = 10.0
"""grpc's own grace is so much longer than ours, which awaits the `finally` of what it cancels."""
MAX_INFRASTRUCTURE_STREAMS = 256

KEEPALIVE_TIME_MS = 20_000
"""Clients of the mesh ping at this pace (`channel`); servers allow a faster one and ping as often."""


def server_options(settings: ServiceSettings) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # What is sent is our own, and bounded where it is made; the policy is larger than any request.
        ("grpc.max_send_message_length", MAX_SEND_BYTES),
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        # What is too large is refused soon: gRPC would hold the refusal back for up to a second.
        ("grpc.http.tarpit_min_duration_ms", 0),
        ("grpc.http.tarpit_max_duration_ms", 20),
        ("grpc.max_concurrent_streams", min(settings.max_concurrent_calls + 64, 2**31 - 1)),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 3),
        # An aged connection is closed gently, so that clients look for new replicas.
        ("grpc.max_connection_age_ms", 30 * 60_000),
        ("grpc.max_connection_age_grace_ms", int(settings.max_call_s * 1000)),
        ("grpc.server_handshake_timeout_ms", 8_000),
        # Two processes on one port would split its calls.
        ("grpc.so_reuseport", 0),
    ]


class GrpcServer:
    """A gRPC edge. `add` services, `start`, later `drain`."""

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        chain: Chain,
        running: RunningCalls,
        health: Health,
        validate: bool = True,
        proxies: TrustedProxies = NO_PROXIES,
    ) -> None:
        """`validate=False` leaves the rules of the protos to a service that records refusals itself;
        `proxies` are believed about whom they call for."""
        self._settings = settings
        self._health = health
        self._running = running
        self._names: list[str] = [HEALTH, reflection.SERVICE_NAME]
        self._tls = TlsFiles.of(settings)
        self._handlers = _ChainHandlers(
            chain, write_timeout_s=settings.write_timeout_s, validate=validate, proxies=proxies
        )
        self._server = grpc.aio.server(options=server_options(settings))
        self._server.add_generic_rpc_handlers((self._handlers,))
        self._stopping: asyncio.Task[None] | None = None
        self._collecting = cast("grpc.aio.Server", _Collecting(self._handlers))
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, self._collecting)
        self._probes: grpc.aio.Server | None = None
        self.ports: dict[str, int] = {}

    async def add(self, register: Callable[[Any, Any], None], servicer: object, service_name: str) -> None:
        """`register` is the generated `add_…_to_server`."""
        register(servicer, self._collecting)
        self._names.append(service_name)
        await self._health.add_service(service_name)

    async def start(self) -> None:
        """Opens the listeners. Raises OSError with a sentence where a port is taken."""
        reflected = reflection.aio.ReflectionServicer(self._names)
        register: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        register(reflected, self._collecting)
        host = self._settings.listen_host
        self.ports["grpc"] = _bind(self._server, host, self._settings.grpc_port, self._tls)
        if self._settings.probe_port is not None:
            self._probes = grpc.aio.server(maximum_concurrent_rpcs=16)
            health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._probes)
            self.ports["probe"] = _bind(self._probes, host, self._settings.probe_port, None)
            await self._probes.start()
        await self._server.start()

    async def drain(self, grace_s: float) -> None:
        """Stops accepting (clients are told by GOAWAY), lets running calls finish, cancels the rest.

        Called again, it shortens the grace.
        """
        if self._stopping is None:
            # Once only: stopping a server that has stopped crashes grpc 1.85. Ours is the sooner grace.
            self._stopping = asyncio.create_task(self._server.stop(grace_s + STOP_MARGIN_S))
        cancelled = await self._running.drain(grace_s)
        if cancelled:
            logger.warning("cancelled %d calls that outlasted the drain's grace of %g s", cancelled, grace_s)
        self._handlers.cancel_infrastructure()
        await asyncio.shield(self._stopping)

    async def close_probes(self) -> None:
        if self._probes is not None:
            await self._probes.stop(0)


class _Collecting:
    """A server as generated code sees it. The real one is not told the names of methods beforehand.

    For each name that it is told, grpc.aio keeps a task that waits for a call of it, and with each call it
    waits for all of them anew. The gateway has fifty.
    """

    def __init__(self, handlers: _ChainHandlers) -> None:
        self.add_generic_rpc_handlers = handlers.add

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        """The generic handlers have them all."""


def _bind(server: grpc.aio.Server, host: str, port: int, tls: TlsFiles | None) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is not None:
            bound = server.add_secure_port(address, tls.server_credentials())
        else:
            bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: the port is taken, or may not be used") from error
    return bound


class _ChainHandlers(grpc.GenericRpcHandler):
    """All handlers of a server, each with the chain around it.

    Not an interceptor: that is one more coroutine of grpc.aio's for each call. The wrappers of streams are
    plain coroutines that write, not generators: so a timeout or an error in a link and one in a write surface
    in the same place.
    """

    def __init__(
        self, chain: Chain, *, write_timeout_s: float, validate: bool, proxies: TrustedProxies
    ) -> None:
        self._chain = chain
        self._proxies = proxies
        self._write_timeout_s = write_timeout_s
        self._validate = validate
        self._services: list[grpc.GenericRpcHandler] = []
        self._wrapped_once: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        """By method, of those that were called."""
        self._infrastructure: set[asyncio.Task[Any]] = set()
        self._stopping = False

    def cancel_infrastructure(self) -> None:
        """Ends health watchers and reflection, which would otherwise outlast every drain."""
        self._stopping = True
        for task in tuple(self._infrastructure):
            task.cancel()

    def add(self, services: Sequence[grpc.GenericRpcHandler]) -> None:
        """What generated code calls, for each service."""
        self._services += services

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """What grpc.aio calls, for each call."""
        method = details.method
        known = self._wrapped_once.get(method)
        if known is not None:
            return known
        found = (service.service(details) for service in self._services)
        handler = next((handler for handler in found if handler is not None), None)
        if handler is None:
            return None
        wrapped = self._wrapped_once[method] = self._wrapped(method, handler)
        return wrapped

    def _wrapped(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        arguments = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if method.startswith(INFRASTRUCTURE):
            if handler.unary_stream:
                watch = self._watch(handler.unary_stream)
                return grpc.unary_stream_rpc_method_handler(watch, **arguments)
            if handler.stream_stream:
                watch = self._watch(handler.stream_stream)
                return grpc.stream_stream_rpc_method_handler(watch, **arguments)
            return handler
        # Requests are parsed inside the chain: not at all for those whom it refuses, and broken bytes become
        # an error of ours.
        parse: Callable[[bytes], Any] = handler.request_deserializer or bytes
        single = {"response_serializer": handler.response_serializer}
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(method, handler.unary_unary, parse), **single
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, handler.unary_stream, parse), **single
            )
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, handler.stream_unary, parse), **single
            )
        if handler.stream_stream is None:
            raise TypeError(f"{method} has none of the four arities")
        return grpc.stream_stream_rpc_method_handler(
            self._stream(method, handler.stream_stream, parse), **single
        )

    def _unary(
        self,
        method: str,
        behaviour: Callable[..., Any],
        parse: Callable[[bytes], Any],
    ) -> Callable[..., Any]:
        async def serve(request: Any, servicer_context: Any) -> Any:
            response: Any = None

            async def body() -> None:
                nonlocal response
                response = await behaviour(self._checked(request, parse), servicer_context)

            call = await self._run(method, servicer_context, lambda _: body())
            # With the answer itself: headers of their own would cost one more operation of grpc's.
            servicer_context.set_trailing_metadata(_trailers(call))
            return response

        return serve

    def _stream(
        self,
        method: str,
        behaviour: Callable[..., Any],
        parse: Callable[[bytes], Any],
    ) -> Callable[..., Any]:
        async def serve(request: Any, servicer_context: Any) -> None:
            async def body(call: Call) -> None:
                parsed = self._checked(request, parse)
                if not inspect.isasyncgenfunction(behaviour):
                    await behaviour(parsed, servicer_context)
                    return
                first = True
                async with (
                    writing(servicer_context, self._write_timeout_s) as write,
                    aclosing(behaviour(parsed, servicer_context)) as responses,
                ):
                    async for response in responses:
                        if first:
                            # Not sooner: the first header commits a call, after which it is not retried.
                            await servicer_context.send_initial_metadata(_identifying(call))
                            first = False
                        await write(response)

            call = await self._run(method, servicer_context, body)
            servicer_context.set_trailing_metadata(_trailers(call))

        return serve

    def _watch(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def serve(request: Any, servicer_context: Any) -> None:
            task = asyncio.current_task()
            if task is None or len(self._infrastructure) >= MAX_INFRASTRUCTURE_STREAMS:
                await servicer_context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many watchers.")
                return
            self._infrastructure.add(task)
            try:
                await _forward(behaviour, request, servicer_context)
            except asyncio.CancelledError:
                if self._stopping:
                    await servicer_context.abort(grpc.StatusCode.UNAVAILABLE, "The server is shutting down.")
                raise
            finally:
                self._infrastructure.discard(task)

        return serve

    def _checked(self, request: Any, parse: Callable[[bytes], Any]) -> Any:
        """The request, or each of a stream of them as it is read: parsed and valid. Raises RequestInvalid."""
        if not isinstance(request, bytes):
            return self._each_checked(request, parse)
        parsed = validation.parsed(request, parse)
        if self._validate and isinstance(parsed, Message):
            validation.validate(parsed)
        return parsed

    async def _each_checked(
        self, requests: AsyncIterator[bytes], parse: Callable[[bytes], Any]
    ) -> AsyncIterator[Any]:
        async for request in requests:
            yield self._checked(request, parse)

    async def _run(self, method: str, servicer_context: Any, body: Callable[[Call], Awaitable[None]]) -> Call:
        """Serves a call inside the chain; ends it with its status where that raises."""
        metadata = _joined(servicer_context.invocation_metadata() or ())
        address = self._proxies.source_address(peer_address(servicer_context.peer()), metadata)
        call = Call(
            RequestContext(new_request_id(), method, address),
            metadata,
            servicer_context.time_remaining(),
        )
        try:
            await self._chain.run(call, body)
        except LlmosError as error:
            await _abort(servicer_context, error, call)
        return call


async def _forward(behaviour: Callable[..., Any], request: Any, servicer_context: Any) -> None:
    if not inspect.isasyncgenfunction(behaviour):
        await behaviour(request, servicer_context)
        return
    async with aclosing(behaviour(request, servicer_context)) as responses:
        async for response in responses:
            await servicer_context.write(response)


async def _abort(servicer_context: Any, error: LlmosError, call: Call) -> None:
    details = status.to_status(error, call.context.request_id)
    servicer_context.set_trailing_metadata(
        (
            *_trailers(call),
            (status.DETAILS_KEY, details.SerializeToString()),
        )
    )
    try:
        await servicer_context.abort(status.code_of(error), details.message)
    except grpc.aio.InternalError:
        # The caller has left meanwhile; grpc would log that as an error.
        raise asyncio.CancelledError from None


def _joined(pairs: Iterable[tuple[str, str | bytes]]) -> dict[str, str | bytes]:
    """Metadata by key. A repeated key has its values joined, as HTTP does, so that none of two credentials
    is silently preferred."""
    found: dict[str, str | bytes] = {}
    for key, value in pairs:
        before = found.get(key)
        found[key] = f"{before}, {value}" if isinstance(before, str) and isinstance(value, str) else value
    return found


def _identifying(call: Call) -> tuple[tuple[str, str], ...]:
    pairs = ((REQUEST_ID_KEY, call.context.request_id), ("x-trace-id", call.context.trace_id))
    return tuple(pair for pair in pairs if pair[1])


def _trailers(call: Call) -> tuple[tuple[str, str], ...]:
    return (*_identifying(call), *call.context.response_metadata.items())


@lru_cache(maxsize=1024)
def peer_address(peer: str) -> str:
    """The address in gRPC's notation of a peer, such as `ipv4:127.0.0.1:4711`, without the port."""
    kind, _, rest = unquote(peer).partition(":")
    if kind == "ipv6":
        return rest.rpartition(":")[0].strip("[]")
    if kind == "ipv4":
        return rest.rpartition(":")[0]
    return kind
