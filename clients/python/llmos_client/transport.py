"""The wire: options and credentials of a channel, and the metadata that each call carries."""

from __future__ import annotations

import secrets
import sys
from typing import Any

import grpc

from llmos_client.config import ClientConfig
from llmos_client.version import __version__

# The server allows a ping every 5 s and sends its own every 20 s; faster clients are disconnected.
KEEPALIVE_TIME_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 10_000
MAX_RECEIVE_BYTES = 16 * 1024 * 1024

CallMetadata = tuple[tuple[str, str | bytes], ...]


def channel_options() -> list[tuple[str, Any]]:
    return [
        ("grpc.primary_user_agent", f"llmos-client-python/{__version__}"),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # `retry` decides on retries; gRPC's own would multiply them.
        ("grpc.enable_retries", 0),
    ]


def channel_credentials(config: ClientConfig) -> grpc.ChannelCredentials | None:
    """None for plaintext."""
    if config.tls is None:
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=config.tls.ca,
        private_key=config.tls.key,
        certificate_chain=config.tls.cert,
    )


def call_metadata(config: ClientConfig, trace_id: str) -> CallMetadata:
    """The credential, and W3C trace context with a fresh parent span."""
    trace = ("traceparent", f"00-{trace_id}-{_nonzero_hex(8)}-01")
    if config.api_key is None:
        return (trace,)
    return (("authorization", f"Bearer {config.api_key}"), trace)


def new_trace_id() -> str:
    """32 hex digits: of the span that is open here, where the program uses OpenTelemetry; else random."""
    telemetry = sys.modules.get("opentelemetry.trace")
    if telemetry is not None:
        context = telemetry.get_current_span().get_span_context()
        if context.is_valid:
            return f"{context.trace_id:032x}"
    return _nonzero_hex(16)


def _nonzero_hex(n_bytes: int) -> str:
    while True:
        text = secrets.token_hex(n_bytes)
        if text.strip("0"):
            return text
