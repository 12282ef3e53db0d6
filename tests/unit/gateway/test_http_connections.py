"""A connection's requests are served by one task, one after another, for as long as both last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from services.gateway.http_exchange import Exchange, Receive, Scope, Send
from services.gateway.http_receiving import Receiving
from services.gateway.http_server import HttpServer
from services.mesh.clock import SystemClock
from services.mesh.deadlines import Deadline
from services.mesh.errors import DeadlineExceeded
from services.mesh.running import RunningCalls
from tests.framework.gateway_http import LIMITS

TIMEOUT_S = 10
IDLE_S = 1
_outside: ContextVar[str] = ContextVar("outside", default="nothing")


class App:
    """Notes who serves. `/cancelled`, and `/late` by its deadline, is cancelled and answers all the same;
    `/unread` answers before it has read the body."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[Any]] = []
        self.deadlines = Deadline.blocks()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        exchange = Exchange(scope, receive, send, request_id="req_1", clock=SystemClock())
        if scope["path"] == "/unread":
            await exchange.respond(200, b"unread")
            return
        await exchange.body(1000)
        if scope["path"] == "/cancelled":
            task.cancel()
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                await exchange.respond(200, b"cancelled")
        elif scope["path"] == "/late":
            try:
                with Deadline(self.deadlines, task, 0.001):
                    await asyncio.Event().wait()
            except DeadlineExceeded:
                await exchange.respond(504, b"late")
        else:
            await exchange.respond(200, _outside.get().encode())


@asynccontextmanager
async def connection(app: App) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    running = RunningCalls(10)
    server = HttpServer(
        app,
        host="127.0.0.1",
        port=0,
        running=running,
        receiving=Receiving(running, max_bodies=10, max_bytes=1 << 20),
        limits=replace(LIMITS, idle_timeout_s=IDLE_S),
    )
    token = _outside.set("something")
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["http"])
    try:
        yield reader, writer
    finally:
        writer.close()
        _outside.reset(token)
        await server.drain(1)


def request(path: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode()


async def answer(reader: asyncio.StreamReader) -> bytes:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)).decode()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
    return await asyncio.wait_for(reader.readexactly(int(fields["content-length"])), TIMEOUT_S)


async def test_one_task_serves_them_all_and_ends_with_the_connection() -> None:
    app = App()
    async with connection(app) as (reader, writer):
        for _ in range(5):
            writer.write(request("/"))
            assert await answer(reader) == b"nothing"
        assert len(set(app.tasks)) == 1
        assert not app.tasks[0].done()
    await asyncio.wait_for(app.tasks[0], TIMEOUT_S)


async def test_requests_that_came_together_leave_one_task_at_most() -> None:
    app = App()
    async with connection(app) as (reader, writer):
        for _ in range(3):
            writer.write(request("/") * 4)
            for _ in range(4):
                assert await answer(reader) == b"nothing"
        writer.write(request("/"))
        assert await answer(reader) == b"nothing"
        waiting = app.tasks[-1]
        await asyncio.wait_for(asyncio.gather(*(set(app.tasks) - {waiting})), TIMEOUT_S)
    await asyncio.wait_for(waiting, TIMEOUT_S)
    assert len(app.tasks) == 13


async def test_who_was_cancelled_takes_no_more_and_another_does() -> None:
    app = App()
    async with connection(app) as (reader, writer):
        for path, said in (("/", b"nothing"), ("/cancelled", b"cancelled"), ("/", b"nothing")):
            writer.write(request(path))
            assert await answer(reader) == said
        first, second, third = app.tasks
        assert first is second
        assert third is not first
        assert first.done()


async def test_a_deadline_that_passed_is_no_reason_to_end() -> None:
    app = App()
    async with connection(app) as (reader, writer):
        for path, said in (("/late", b"late"), ("/", b"nothing"), ("/late", b"late"), ("/", b"nothing")):
            writer.write(request(path))
            assert await answer(reader) == said
        assert len(set(app.tasks)) == 1


async def test_it_is_closed_when_it_was_idle_for_long_enough_since_the_last_answer() -> None:
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    async with connection(App()) as (reader, writer):
        while loop.time() < begun_s + 1.2 * IDLE_S:
            writer.write(request("/"))
            last_s = loop.time()
            await answer(reader)
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
        assert loop.time() - last_s >= 0.99 * IDLE_S


async def test_it_is_closed_too_where_the_body_came_after_the_answer() -> None:
    loop = asyncio.get_running_loop()
    async with connection(App()) as (reader, writer):
        writer.write(request("/unread").replace(b"content-length: 0", b"content-length: 4"))
        assert await answer(reader) == b"unread"
        writer.write(b"body")
        sent_s = loop.time()
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
        assert loop.time() - sent_s >= 0.99 * IDLE_S
