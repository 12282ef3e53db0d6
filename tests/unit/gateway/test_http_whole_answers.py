"""Answers that are written in one piece: whole, in order, and with the headers that they have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.http_exchange import Exchange, Receive, Scope, Send
from services.gateway.http_receiving import Receiving
from services.gateway.http_server import HttpServer
from services.mesh.clock import SystemClock
from services.mesh.running import RunningCalls
from tests.framework.gateway_http import LIMITS

LARGE_BYTES = 1 << 20
TIMEOUT_S = 10


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says the path, so many times that no buffer holds it; `/broken` has a header of several lines."""
    path = scope["path"]
    said = {"x-path": path if path != "/broken" else "a\r\nx-more: b"}
    exchange = Exchange(scope, receive, send, request_id="req_1", clock=SystemClock(), response_metadata=said)
    body = await exchange.body(1000)
    await exchange.respond(200, path[-1].encode() * LARGE_BYTES + body)


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    running = RunningCalls(10)
    server = HttpServer(
        app,
        host="127.0.0.1",
        port=0,
        running=running,
        receiving=Receiving(running, max_bodies=10, max_bytes=1 << 20),
        limits=LIMITS,
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
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)).decode()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
    return head, await asyncio.wait_for(reader.readexactly(int(fields["content-length"])), TIMEOUT_S)


async def test_large_answers_to_requests_that_came_together_are_whole_and_in_order() -> None:
    async with connection() as (reader, writer):
        writer.write(b"".join(request(f"/{number}", b"body %d" % number) for number in range(5)))
        for number in range(5):
            head, body = await answer(reader)
            assert head.startswith("HTTP/1.1 200 OK\r\n")
            assert f"\r\nx-path: /{number}\r\n" in head
            assert body == b"%d" % number * LARGE_BYTES + b"body %d" % number


async def test_a_body_that_comes_after_its_head() -> None:
    async with connection() as (reader, writer):
        whole = request("/1", b"later").replace(b"host: x", b"host: x\r\nexpect: 100-continue")
        writer.write(whole.removesuffix(b"later"))
        asked = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)
        assert asked == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"later")
        assert (await answer(reader))[1].endswith(b"later")


async def test_a_header_never_becomes_several() -> None:
    async with connection() as (reader, writer):
        writer.write(request("/broken"))
        head, _ = await answer(reader)
        assert head.startswith("HTTP/1.1 500 ")
        assert "x-more" not in head


async def test_a_caller_that_closes_the_connection_gets_it_closed() -> None:
    async with connection() as (reader, writer):
        writer.write(request("/1").replace(b"host: x", b"host: x\r\nconnection: close"))
        head, body = await answer(reader)
        assert "\r\nconnection: close\r\n" in head
        assert len(body) == LARGE_BYTES
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
