"""Waits until a service says that it serves, by gRPC health and not by guessing."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.dev.certs import CLIENT
from deploy.dev.processes import Process
from deploy.dev.state import CannotStart

RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.enable_http_proxy", 0),
]


def open_channel(target: str, certs: Path | None) -> grpc.aio.Channel:
    """A channel of a person's kind: with the client certificate, where the mesh has TLS."""
    if certs is None:
        return grpc.aio.insecure_channel(target, options=RECONNECT)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=(certs / "ca.crt").read_bytes(),
        private_key=(certs / f"{CLIENT}.key").read_bytes(),
        certificate_chain=(certs / f"{CLIENT}.crt").read_bytes(),
    )
    return grpc.aio.secure_channel(target, credentials, options=RECONNECT)


async def wait_health(target: str, certs: Path | None = None, *, serving: bool = True) -> None:
    """Returns when the server says that it serves, or does not, as asked for; waits without end."""
    want = health_pb2.HealthCheckResponse.SERVING
    while True:
        async with open_channel(target, certs) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know Check only
            watch = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=serving)
            try:
                async for response in watch:
                    if (response.status == want) == serving:
                        return
            except grpc.aio.AioRpcError as error:
                if not serving and error.code() is grpc.StatusCode.UNAVAILABLE:
                    return
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise
            finally:
                watch.cancel()
        # The server closed the connection: it is on its way down, or up again.
        await asyncio.sleep(0.05)


async def wait_ready(process: Process, target: str, certs: Path | None, timeout_s: float) -> None:
    """Returns when the process serves.

    Raises:
        CannotStart: it ended, or does not serve in time.
    """
    serving = asyncio.ensure_future(wait_health(target, certs))
    ended = asyncio.ensure_future(process.wait_ended())
    try:
        done, _ = await asyncio.wait({serving, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if serving in done:
            return await serving
    finally:
        for task in (serving, ended):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    what = (
        f"ended with exit code {process.exit_code}"
        if ended in done
        else f"does not serve after {timeout_s:.0f} s"
    )
    raise CannotStart(f"{process.name} {what}. Its last lines ({process.log_file}):\n{process.tail(15)}")
