"""The calling side of gRPC inside the mesh: one place for its limits, keepalive, retries and for what
every call carries along.

Each call takes with it: the request id, the trace context, this service's own token for the audience, the
identity of the caller that it is made for, and what is left of the deadline. Errors arrive as the tree's
classes. When a certificate is replaced on disk, the next call opens a connection with it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any, Protocol

import grpc
from llmos.common.v1 import identity_pb2

from services.mesh import context as request_context
from services.mesh import errors, status, telemetry
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.interceptors import REQUEST_ID_KEY
from services.mesh.outgoing import OutgoingExchange, OutgoingStream
from services.mesh.server import KEEPALIVE_TIME_MS
from services.mesh.tls import TlsFiles

IDENTITY_KEY = "llmos-identity-bin"
TLS_CHECK_INTERVAL_S = 1.0
MAX_PACKED = 2048
"""Callers whose identity is remembered in its form on the wire."""
WINDOW_BYTES = 64 * 1024
"""What the other side may send of a stream before it is read here."""
DEFAULT_TIMEOUT_S = 30.0
"""Of a call that is made outside of a request and names no timeout."""

_RETRY = {
    "maxAttempts": 3,
    "initialBackoff": "0.05s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_SERVICE_CONFIG = {
    # Generation is moved to another replica by the gateway, never repeated blindly at the same one.
    "methodConfig": [
        {
            "name": [
                {"service": "llmos.inference.v1.InferenceService", "method": "Generate"},
                {"service": "llmos.inference.v1.InferenceService", "method": "GenerateWhole"},
                {"service": "llmos.inference.v1.InferenceService", "method": "WatchDeltas"},
                {"service": "llmos.inference.v1.InferenceService", "method": "GenerateMany"},
            ]
        },
        {"name": [{}], "retryPolicy": _RETRY},
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}


class TokenSource(Protocol):
    """Gives this service's own token for an audience."""

    async def token(self, audience: str) -> str: ...


def channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_http_proxy", 0),
        # Else the window follows what the busiest stream takes, and one whose reader stalls fills it too.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ]


class Channel(grpc.aio.Channel):
    """What generated stubs are made on. Holds one connection, replaced when certificates change."""

    def __init__(
        self,
        target: str,
        *,
        clock: Clock,
        tls: TlsFiles | None = None,
        tokens: TokenSource | None = None,
        audience: str = "",
        max_message_bytes: int = 4 * 1024 * 1024,
    ) -> None:
        """`tokens` and `audience` (such as `llmos-inference`) go together; without, calls are anonymous."""
        self.target = target
        self._clock = clock
        self._tls = tls
        self._tokens = tokens
        self._audience = audience
        self._options = channel_options(max_message_bytes)
        self._tls_version = 0
        self._tls_checked_s = float("-inf")
        self._inner: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def inner(self) -> grpc.aio.Channel:
        """The connection in force, opened where there is none or the certificates are new."""
        if self._tls is not None and self._clock.monotonic() - self._tls_checked_s > TLS_CHECK_INTERVAL_S:
            self.check_certificates()
        if self._inner is None:
            self._inner = self._open()
        return self._inner

    def check_certificates(self) -> None:
        """Makes the next call open a new connection where the certificates have changed on disk."""
        if self._tls is not None:
            self._tls_checked_s = self._clock.monotonic()
            self._tls.load()
            if self._inner is not None and self._tls.version != self._tls_version:
                # Calls that run finish on the old connection.
                closing = asyncio.ensure_future(self._inner.close(grace=600))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
                self._inner = None

    def _open(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self.target, options=self._options)
        credentials = self._tls.channel_credentials()
        self._tls_version = self._tls.version
        return grpc.aio.secure_channel(self.target, credentials, options=self._options)

    async def prepare(self, timeout_s: float | None) -> tuple[list[tuple[str, str | bytes]], float]:
        """The metadata and the timeout of a call that begins now.

        Raises DeadlineExceeded where nothing is left of the request's deadline.
        """
        metadata: list[tuple[str, str | bytes]] = list(telemetry.inject())
        request = request_context.current()
        left_s = DEFAULT_TIMEOUT_S
        if request is not None:
            metadata.append((REQUEST_ID_KEY, request.request_id))
            left_s = request.deadline_s - self._clock.monotonic()
            if left_s <= 0:
                raise errors.DeadlineExceeded("The deadline passed before the answer was complete.")
            if request.caller.identity is not None:
                metadata.append((IDENTITY_KEY, pack_identity(request.caller.identity)))
            if timeout_s is not None:
                left_s = min(left_s, timeout_s)
        elif timeout_s is not None:
            left_s = timeout_s
        if self._tokens is not None:
            metadata.append(("authorization", f"Bearer {await self._tokens.token(self._audience)}"))
        return metadata, left_s

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[..., Any] | None = None,
        response_deserializer: Callable[..., Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """A callable: `await call(request, timeout=None)`."""

        begin: Any = None
        opened: grpc.aio.Channel | None = None

        async def call(request: Any, *, timeout: float | None = None) -> Any:
            nonlocal begin, opened
            metadata, left_s = await self.prepare(timeout)
            inner = self.inner()
            if inner is not opened:
                begin, opened = inner.unary_unary(method, request_serializer, response_deserializer), inner
            return await _mapped(begin(request, timeout=left_s, metadata=metadata))

        return call

    def unary_stream(
        self,
        method: str,
        request_serializer: Callable[..., Any] | None = None,
        response_deserializer: Callable[..., Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """A callable that returns an OutgoingStream."""

        def call(request: Any, *, timeout: float | None = None) -> OutgoingStream:
            async def begin() -> Any:
                metadata, left_s = await self.prepare(timeout)
                multi = self.inner().unary_stream(method, request_serializer, response_deserializer)
                return multi(request, timeout=left_s, metadata=metadata)

            return OutgoingStream(begin)

        return call

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{method}: no service of the mesh takes a stream and answers once")

    def stream_stream(
        self,
        method: str,
        request_serializer: Callable[..., Any] | None = None,
        response_deserializer: Callable[..., Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """A callable that returns an OutgoingExchange."""

        def call(*, timeout: float | None = None) -> OutgoingExchange:
            async def begin() -> Any:
                metadata, left_s = await self.prepare(timeout)
                multi = self.inner().stream_stream(method, request_serializer, response_deserializer)
                return multi(timeout=left_s, metadata=metadata)

            return OutgoingExchange(begin)

        return call

    async def start(self) -> None:
        """As a component: nothing to do, the first call connects."""

    async def stop(self) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        if self._inner is not None:
            await self._inner.close(grace)
        for task in tuple(self._closing):
            task.cancel()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.inner().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.inner().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.inner().channel_ready()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


async def _mapped(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise status.from_rpc_error(error) from error


@lru_cache(maxsize=MAX_PACKED)
def pack_identity(identity: Identity) -> bytes:
    """The bytes of IDENTITY_KEY. What only the edge decides by (`direct_scopes`, `models`, `addresses`) stays
    there."""
    packed = identity_pb2.Identity(
        tenant_id=identity.tenant_id,
        client_id=identity.client_id,
        key_id=identity.key_id,
        scopes=sorted(identity.scopes),
        roles=sorted(identity.roles),
        token_id=identity.token_id,
    )
    if identity.issued_at_s:
        packed.issue_time.seconds = identity.issued_at_s
    return packed.SerializeToString()


def unpack_identity(data: bytes) -> Identity:
    """The identity in IDENTITY_KEY. Raises google.protobuf.message.DecodeError."""
    packed = identity_pb2.Identity.FromString(data)
    return Identity(
        tenant_id=packed.tenant_id,
        client_id=packed.client_id,
        key_id=packed.key_id,
        scopes=frozenset(packed.scopes),
        roles=frozenset(packed.roles),
        token_id=packed.token_id,
        issued_at_s=packed.issue_time.seconds,
    )
