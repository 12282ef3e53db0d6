"""Deadlines, cancelled streams and the concurrency limit, through the whole mesh (rows 1, 2 and 11)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import httpx
import pytest
from llmos.common.v1 import error_reason_pb2

from deploy.dev.broker import Broker
from tests.conftest import MeshFactory
from tests.framework.calls import OUTCOME, Caller, Streamed, cancel_sse_after_first_token, reason_of
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

STREAMS = 1000
AT_ONCE = 50


@pytest.fixture
def fast_mesh(make_mesh: MeshFactory, broker: Broker) -> MeshHarness:
    return make_mesh(broker)


async def metric(client: httpx.AsyncClient, mesh: MeshHarness, name: str, metric_name: str) -> float:
    """The sum over all labels; 0 where nothing was recorded yet. A watch is nobody's request."""
    text = (await client.get(mesh.metrics_url(name))).text
    lines = [
        line
        for line in text.splitlines()
        if line.startswith((metric_name + " ", metric_name + "{")) and "/Watch" not in line
    ]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def at_work(client: httpx.AsyncClient, mesh: MeshHarness) -> dict[str, float]:
    return {
        "engine": await metric(client, mesh, "inference", "llmos_engine_sequences_running"),
        "inference": await metric(client, mesh, "inference", "llmos_calls_running"),
        "gateway": await metric(client, mesh, "gateway", "llmos_calls_running"),
    }


async def test_r01_a_deadline_ends_the_work_on_every_hop(fast_mesh: MeshHarness) -> None:
    await fast_mesh.start()
    caller = Caller(fast_mesh)
    assert (await caller.stream("warm up")).finished
    async with httpx.AsyncClient() as client:
        begun_s = time.monotonic()
        streamed = await caller.stream("[[first_ms=10000]] late", timeout_s=0.5)
        took_s = time.monotonic() - begun_s
        assert streamed.error is not None
        assert streamed.error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert took_s < 0.6
        await eventually(
            lambda: idle(client, fast_mesh), timeout_s=0.2, what="the engine's work is cancelled"
        )
    records = await eventually(lambda: ended_with_deadline(caller), what="the outcome is stored")
    assert records == [OUTCOME.OUTCOME_CANCELLED]


async def ended_with_deadline(caller: Caller) -> list[int]:
    return [
        record.ended.outcome
        for record in (await caller.records()).values()
        if record.ended.error_reason == error_reason_pb2.ERROR_REASON_DEADLINE_EXCEEDED
    ]


async def idle(client: httpx.AsyncClient, mesh: MeshHarness) -> bool:
    return not any((await at_work(client, mesh)).values())


async def test_r01_without_a_deadline_the_servers_cap_holds(fast_mesh: MeshHarness) -> None:
    fast_mesh.configure("gateway", max_call_s=0.5)
    await fast_mesh.start()
    streamed = await Caller(fast_mesh).stream("[[first_ms=10000]] late", timeout_s=None)
    assert streamed.error is not None
    assert reason_of(streamed.error) == "DEADLINE_EXCEEDED"
    async with httpx.AsyncClient() as client:
        await eventually(lambda: idle(client, fast_mesh), timeout_s=1, what="the engine's work is cancelled")


@pytest.mark.slow
@pytest.mark.parametrize("edge", ["grpc", "sse"])
async def test_r02_a_thousand_cancelled_streams_leave_nothing_behind(
    fast_mesh: MeshHarness, edge: str
) -> None:
    fast_mesh.configure("inference", max_running=AT_ONCE, max_waiting=AT_ONCE)
    await fast_mesh.start()
    caller = Caller(fast_mesh)
    limit = asyncio.Semaphore(AT_ONCE)
    prompt = "[[tokens=4000]][[delay_ms=20]] again and again"

    async def one() -> str:
        async with limit:
            if edge == "sse":
                return await cancel_sse_after_first_token(fast_mesh, prompt)
            return await cancel_after_first_token(caller.begin(prompt))

    ids = set(await asyncio.gather(*(one() for _ in range(STREAMS))))
    assert len(ids) == STREAMS
    async with httpx.AsyncClient() as client:
        await eventually(lambda: idle(client, fast_mesh), timeout_s=1, what="slots and calls at baseline")
    outcomes = await caller.outcomes(ids)
    assert set(outcomes.values()) == {OUTCOME.OUTCOME_CANCELLED}
    assert len(outcomes) == STREAMS


async def cancel_after_first_token(call: Any) -> str:
    request_id = ""
    async for response in call:
        if response.WhichOneof("event") == "started":
            request_id = response.started.request_id
        else:
            break
    call.cancel()
    return request_id


@pytest.mark.slow
async def test_r11_never_more_than_the_limit_at_work(fast_mesh: MeshHarness) -> None:
    fast_mesh.configure("gateway", max_concurrent_generations=2)
    await fast_mesh.start()
    caller = Caller(fast_mesh)
    async with httpx.AsyncClient() as client:
        for _ in range(100):
            begun = [asyncio.Event() for _ in range(10)]
            calls = [
                asyncio.create_task(caller.stream("[[hang_after=1]] at work", first=first)) for first in begun
            ]
            # Nobody who is at work ends by himself: so the rest is refused although nothing else happens.
            refused = [await stream for stream in await first_done(calls, 8)]
            assert {reason_of(stream.error) for stream in refused if stream.error} == {"CONCURRENCY_LIMIT"}
            assert {stream.error.code() for stream in refused if stream.error} == {
                grpc.StatusCode.RESOURCE_EXHAUSTED
            }
            await eventually(
                lambda begun=begun: sum(first.is_set() for first in begun) == 2, what="two at work"
            )
            assert (await at_work(client, fast_mesh))["engine"] == 2
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await eventually(lambda: idle(client, fast_mesh), what="the places are free again")


async def first_done(calls: list[asyncio.Task[Streamed]], count: int) -> list[asyncio.Task[Streamed]]:
    """The first calls that end; exactly so many."""
    done: set[asyncio.Task[Streamed]] = set()
    async with asyncio.timeout(10):
        while len(done) < count:
            pending = [call for call in calls if call not in done]
            done |= (await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))[0]
    assert len(done) == count
    return list(done)
