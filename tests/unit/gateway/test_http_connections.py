"""A connection's requests are served by one task, one after another, for as long as both last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from services.gateway.http_exchange import Exchange, Receive, Scope, Send
from services.mesh.clock import SystemClock
from services.mesh.deadlines import Deadline
from services.mesh.errors import DeadlineExceeded
from tests.framework.gateway_http import LIMITS
from tests.framework.http_connections import TIMEOUT_S, answer, connection, request

IDLE_S = 1
ALLOWED_S = {"/late": 0.001, "/long": 1.3 * IDLE_S}
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
        elif scope["path"] in ALLOWED_S:
            try:
                with Deadline(self.deadlines, task, ALLOWED_S[scope["path"]]):
                    await asyncio.Event().wait()
            except DeadlineExceeded:
                await exchange.respond(504, b"late")
        else:
            await exchange.respond(200, _outside.get().encode())


@asynccontextmanager
async def connected(app: App) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """What is set outside must not be seen by whoever serves."""
    token = _outside.set("something")
    async with connection(app, replace(LIMITS, idle_timeout_s=IDLE_S)) as streams:
        yield streams
    _outside.reset(token)


async def said(reader: asyncio.StreamReader) -> bytes:
    return (await answer(reader))[1]


async def test_one_task_serves_them_all_and_ends_with_the_connection() -> None:
    app = App()
    async with connected(app) as (reader, writer):
        for _ in range(5):
            writer.write(request("/"))
            assert await said(reader) == b"nothing"
        assert len(set(app.tasks)) == 1
        assert not app.tasks[0].done()
    await asyncio.wait_for(app.tasks[0], TIMEOUT_S)


async def test_requests_that_came_together_leave_one_task_at_most() -> None:
    app = App()
    async with connected(app) as (reader, writer):
        for _ in range(3):
            writer.write(request("/") * 4)
            for _ in range(4):
                assert await said(reader) == b"nothing"
        writer.write(request("/"))
        assert await said(reader) == b"nothing"
        waiting = app.tasks[-1]
        await asyncio.wait_for(asyncio.gather(*(set(app.tasks) - {waiting})), TIMEOUT_S)
    await asyncio.wait_for(waiting, TIMEOUT_S)
    assert len(app.tasks) == 13


async def test_who_was_cancelled_takes_no_more_and_another_does() -> None:
    app = App()
    async with connected(app) as (reader, writer):
        for path, text in (("/", b"nothing"), ("/cancelled", b"cancelled"), ("/", b"nothing")):
            writer.write(request(path))
            assert await said(reader) == text
        first, second, third = app.tasks
        assert first is second
        assert third is not first
        assert first.done()


async def test_a_deadline_that_passed_is_no_reason_to_end() -> None:
    app = App()
    async with connected(app) as (reader, writer):
        for path, text in (("/late", b"late"), ("/", b"nothing"), ("/late", b"late"), ("/", b"nothing")):
            writer.write(request(path))
            assert await said(reader) == text
        assert len(set(app.tasks)) == 1


async def test_it_is_closed_when_it_was_idle_for_long_enough_since_the_last_answer() -> None:
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    async with connected(App()) as (reader, writer):
        while loop.time() < begun_s + 1.2 * IDLE_S:
            writer.write(request("/"))
            last_s = loop.time()
            await said(reader)
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
        assert loop.time() - last_s >= 0.99 * IDLE_S


async def test_it_is_closed_too_where_the_body_came_after_the_answer() -> None:
    loop = asyncio.get_running_loop()
    async with connected(App()) as (reader, writer):
        writer.write(request("/unread").replace(b"content-length: 0", b"content-length: 4"))
        assert await said(reader) == b"unread"
        writer.write(b"body")
        sent_s = loop.time()
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
        assert loop.time() - sent_s >= 0.99 * IDLE_S


async def test_a_request_that_came_with_the_rest_of_one_answered_early_may_take_longer_than_a_pause() -> None:
    async with connected(App()) as (reader, writer):
        writer.write(request("/unread").replace(b"content-length: 0", b"content-length: 4"))
        assert await said(reader) == b"unread"
        writer.write(b"body" + request("/long"))
        assert await said(reader) == b"late"
