"""One raw HTTP connection to an ASGI application behind our own listener."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import ASGIApp

from services.gateway.http_protocol import HttpLimits
from services.gateway.http_receiving import Receiving
from services.gateway.http_server import HttpServer
from services.mesh.running import RunningCalls
from tests.framework.gateway_http import LIMITS

TIMEOUT_S = 10


@asynccontextmanager
async def connection(
    app: ASGIApp, limits: HttpLimits = LIMITS
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Listens for as long as the block lasts."""
    running = RunningCalls(10)
    server = HttpServer(
        app,
        host="127.0.0.1",
        port=0,
        running=running,
        receiving=Receiving(running, max_bodies=10, max_bytes=1 << 20),
        limits=limits,
    )
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["http"])
    try:
        yield reader, writer
    finally:
        writer.close()
        await server.drain(1)


def request(path: str, body: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Head and body of the next one."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)).decode()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
    return head, await asyncio.wait_for(reader.readexactly(int(fields["content-length"])), TIMEOUT_S)
