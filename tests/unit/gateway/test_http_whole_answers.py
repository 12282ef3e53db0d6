"""Answers that are written in one piece: whole, in order, and with the headers that they have."""

from __future__ import annotations

import asyncio

from services.gateway.http_exchange import Exchange, Receive, Scope, Send
from services.mesh.clock import SystemClock
from tests.framework.http_connections import TIMEOUT_S, answer, connection, request

LARGE_BYTES = 1 << 20


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says the path, so many times that no buffer holds it; `/broken` has a header of several lines."""
    path = scope["path"]
    said = {"x-path": path if path != "/broken" else "a\r\nx-more: b"}
    exchange = Exchange(scope, receive, send, request_id="req_1", clock=SystemClock(), response_metadata=said)
    body = await exchange.body(1000)
    await exchange.respond(200, path[-1].encode() * LARGE_BYTES + body)


async def test_large_answers_to_requests_that_came_together_are_whole_and_in_order() -> None:
    async with connection(app) as (reader, writer):
        writer.write(b"".join(request(f"/{number}", b"body %d" % number) for number in range(5)))
        for number in range(5):
            head, body = await answer(reader)
            assert head.startswith("HTTP/1.1 200 OK\r\n")
            assert f"\r\nx-path: /{number}\r\n" in head
            assert body == b"%d" % number * LARGE_BYTES + b"body %d" % number


async def test_a_body_that_comes_after_its_head() -> None:
    async with connection(app) as (reader, writer):
        whole = request("/1", b"later").replace(b"host: x", b"host: x\r\nexpect: 100-continue")
        writer.write(whole.removesuffix(b"later"))
        asked = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)
        assert asked == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"later")
        assert (await answer(reader))[1].endswith(b"later")


async def test_a_header_never_becomes_several() -> None:
    async with connection(app) as (reader, writer):
        writer.write(request("/broken"))
        head, _ = await answer(reader)
        assert head.startswith("HTTP/1.1 500 ")
        assert "x-more" not in head


async def test_a_caller_that_closes_the_connection_gets_it_closed() -> None:
    async with connection(app) as (reader, writer):
        writer.write(request("/1").replace(b"host: x", b"host: x\r\nconnection: close"))
        head, body = await answer(reader)
        assert "\r\nconnection: close\r\n" in head
        assert len(body) == LARGE_BYTES
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
