"""Bodies that are on their way: they hold no place of a call, and have a number and a size of their own."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import httpx
import pytest

from services.mesh.events import Outcome
from services.mesh.running import RunningCalls
from tests.framework.gateway_fakes import KEY, Bench, FakeReplica, Gate
from tests.framework.gateway_http import HttpBench, serving
from tests.framework.waiting import eventually

TIMEOUT_S = 10
PLACES = 4
BODY = json.dumps({"model": "echo-1", "messages": [{"role": "user", "content": "Hi"}]}).encode()
GENERATE = "/v1/chat/completions"
TOKEN = "/oauth2/token"


class Sender:
    """A request that is sent by hand, on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def begin(
        cls, stack: AsyncExitStack, http: HttpBench, path: str = GENERATE, *, length: int = len(BODY)
    ) -> Sender:
        """Sends the head, and no byte of the body."""
        sender = cls(*await asyncio.open_connection("127.0.0.1", http.port))
        stack.callback(sender.writer.close)
        # What is at /oauth2/token is for whoever says in the body who it is.
        who = f"authorization: Bearer {KEY}\r\n" if path == GENERATE else ""
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{who}content-length: {length}\r\n\r\n"
        sender.writer.write(head.encode())
        return sender

    async def answer(self) -> tuple[int, bytes]:
        """The status and the body of the answer."""
        async with asyncio.timeout(TIMEOUT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            return int(head.split()[1]), await self.reader.readexactly(int(fields[b"content-length"]))


def bench_of(replica: FakeReplica | None = None) -> Bench:
    bench = Bench([replica or FakeReplica()])
    bench.running = RunningCalls(PLACES)
    return bench


async def dribbling(http: HttpBench, number: int) -> None:
    await eventually(lambda: len(http.receiving) == number, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("path", [GENERATE, TOKEN])
async def test_r14_bodies_that_dribble_take_no_place_from_others(path: str) -> None:
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(serving(bench_of()))
        senders = [await Sender.begin(stack, http, path) for _ in range(2 * PLACES)]
        for sender in senders:
            sender.writer.write(BODY[:1])
        await dribbling(http, 2 * PLACES)
        async with httpx.AsyncClient() as client:
            headers = {"authorization": f"Bearer {KEY}"}
            answer = await client.post(f"{http.url}{GENERATE}", content=BODY, headers=headers)
        assert answer.status_code == 200, answer.text
        if path == GENERATE:
            for sender in senders:
                sender.writer.write(BODY[1:])
                assert (await sender.answer())[0] == 200
        await eventually(lambda: not len(http.receiving) or path == TOKEN, timeout_s=TIMEOUT_S)


async def test_r14_the_oldest_goes_where_more_are_on_their_way_than_may() -> None:
    bench = bench_of()
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(serving(bench, max_receiving=2))
        first = await Sender.begin(stack, http)
        await dribbling(http, 1)
        second = await Sender.begin(stack, http)
        await dribbling(http, 2)
        third = await Sender.begin(stack, http)
        status, body = await first.answer()
        assert (status, json.loads(body)["error"]["code"]) == (429, "concurrency_limit")
        # The rest of its body is not waited for.
        assert await asyncio.wait_for(first.reader.read(), TIMEOUT_S) == b""
        for each in (second, third):
            each.writer.write(BODY)
            assert (await each.answer())[0] == 200
        await dribbling(http, 0)
        await eventually(lambda: not len(bench.running), timeout_s=TIMEOUT_S)
    outcomes = sorted(event.outcome for event in bench.audit.ended)
    assert outcomes == sorted([Outcome.REJECTED, Outcome.SUCCEEDED, Outcome.SUCCEEDED])


async def test_r14_the_oldest_goes_where_they_hold_more_than_they_may() -> None:
    half = 32 * 1024
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(serving(bench_of(), max_receiving_bytes=2 * half))
        large = [await Sender.begin(stack, http, length=10 * half) for _ in range(1)]
        await dribbling(http, 1)
        large[0].writer.write(b" " * half)
        await eventually(lambda: http.receiving.size == half, timeout_s=TIMEOUT_S)
        large.append(await Sender.begin(stack, http, length=10 * half))
        await dribbling(http, 2)
        large[1].writer.write(b" " * (half + 1))
        assert (await large[0].answer())[0] == 429
        await eventually(lambda: http.receiving.size == half + 1, timeout_s=TIMEOUT_S)
        # It is the oldest itself now.
        large[1].writer.write(b" " * half)
        assert (await large[1].answer())[0] == 429
        await dribbling(http, 0)
        assert http.receiving.size == 0


async def test_a_body_that_is_here_needs_a_place() -> None:
    gate = Gate()
    bench = bench_of(FakeReplica([gate]))
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(serving(bench))
        late = await Sender.begin(stack, http)
        await dribbling(http, 1)
        for _ in range(PLACES):
            sender = await Sender.begin(stack, http)
            sender.writer.write(BODY)
        await eventually(lambda: len(bench.replicas[0].requests) == PLACES, timeout_s=TIMEOUT_S)
        late.writer.write(BODY)
        status, body = await late.answer()
        assert (status, json.loads(body)["error"]["code"]) == (429, "concurrency_limit")
        # It may try again on the same connection.
        late.writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await late.answer())[0] == 200


async def test_a_sender_that_leaves_leaves_nothing_behind() -> None:
    bench = bench_of()
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(serving(bench))
        sender = await Sender.begin(stack, http)
        sender.writer.write(BODY[:1])
        await eventually(lambda: http.receiving.size == 1, timeout_s=TIMEOUT_S)
        sender.writer.close()
        await eventually(lambda: not len(bench.running), timeout_s=TIMEOUT_S)
        assert (len(http.receiving), http.receiving.size) == (0, 0)
        assert [event.outcome for event in bench.audit.ended] == [Outcome.CANCELLED]
