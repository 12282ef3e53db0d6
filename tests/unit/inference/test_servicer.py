"""What the gRPC edge of inference adds to the engine: the tenant, sequence numbers, the watch on the load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from llmos.gateway.v1 import generation_pb2
from llmos.inference.v1 import fleet_service_pb2, inference_service_pb2

from services.inference.backends.echo import EchoConfig, EchoEngine, token_id
from services.inference.servicer import FleetServicer, InferenceServicer
from services.mesh import context
from services.mesh.clock import ManualClock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.errors import Internal
from services.mesh.interceptors import Chain
from services.mesh.running import RunningCalls
from tests.framework.engines import begin, text_request

METHOD = "/llmos.inference.v1.InferenceService/Generate"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def engine(clock: ManualClock) -> AsyncIterator[EchoEngine]:
    engine = EchoEngine(EchoConfig(max_running=4, max_waiting=2, directives=True, recovery_s=5), clock)
    await engine.start()
    yield engine
    await engine.stop()


async def generate(engine: EchoEngine, clock: ManualClock, caller: Caller, **fields: Any) -> list[Any]:
    spec = generation_pb2.GenerationSpec(model="echo", prompt={"text": "one two three four"})
    message = inference_service_pb2.GenerateRequest(request_id="req_1", spec=spec, **fields)
    token = context.enter(RequestContext("req_1", METHOD, caller=caller))
    try:
        servicer = InferenceServicer(
            engine, clock, replica="r", chain=Chain({}), running=RunningCalls(1), max_request_bytes=1
        )
        return [event async for event in servicer.Generate(message, _NO_CONTEXT)]
    finally:
        context.leave(token)


ALICE = Caller(Identity("acme", "alice"), "service:gateway")
_NO_CONTEXT: Any = None


async def test_a_stream_goes_on_under_the_next_number(engine: EchoEngine, clock: ManualClock) -> None:
    delivered = [{"token_ids": [token_id("one"), token_id(" two")]}]
    events = await generate(engine, clock, ALICE, delivered=delivered, after_seq=5)
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert [delta.seq for delta in deltas] == [6 + index for index in range(len(deltas))]
    assert "".join(delta.text for delta in deltas) == " three four"
    assert events[-1].finished.usage.completion_tokens == 4


async def test_nothing_is_generated_for_nobody(engine: EchoEngine, clock: ManualClock) -> None:
    with pytest.raises(Internal, match="identity"):
        await generate(engine, clock, Caller(None, "service:gateway"))


async def test_the_load_is_told_at_once_at_changes_and_as_a_heartbeat(
    engine: EchoEngine, clock: ManualClock
) -> None:
    request = fleet_service_pb2.WatchLoadRequest(min_interval_ms=200, heartbeat_ms=1000)
    watch = FleetServicer(engine, clock).WatchLoad(request, _NO_CONTEXT)
    first = await anext(watch)
    assert (first.serving, first.running, first.waiting, first.restarts) == (True, 0, 0, 0)
    assert (first.max_running, first.max_waiting, first.model) == (4, 2, "echo")
    assert (first.numerics_id, first.exact_replay) == ("echo-1", True)

    following = asyncio.ensure_future(anext(watch))
    await clock.advance(0.9)
    assert not following.done()
    await clock.advance(0.1)
    assert await following == first  # a heartbeat

    following = asyncio.ensure_future(anext(watch))
    stream = await begin(engine, text_request("echo", "[[hang_after=1]] a b", n=2))
    await clock.advance(0.1)
    assert not following.done()
    await clock.advance(0.1)
    second = await following
    assert (second.running, second.kv_pages_used) == (2, 2)
    assert second.kv_pages > 2

    following = asyncio.ensure_future(anext(watch))
    with pytest.raises(Exception, match="lost"):
        await begin(engine, text_request("echo", "[[crash]] a"))
    await clock.advance(0.2)
    third = await following
    assert (third.serving, third.running) == (False, 0)
    await stream.aclose()
    await watch.aclose()  # type: ignore[attr-defined]


async def test_a_heartbeat_keeps_to_the_shortest_interval(clock: ManualClock, engine: EchoEngine) -> None:
    request = fleet_service_pb2.WatchLoadRequest(min_interval_ms=500, heartbeat_ms=100)
    watch = FleetServicer(engine, clock).WatchLoad(request, _NO_CONTEXT)
    await anext(watch)
    following = asyncio.ensure_future(anext(watch))
    await clock.advance(0.4)
    assert not following.done()
    await clock.advance(0.1)
    assert (await following).serving
    await watch.aclose()  # type: ignore[attr-defined]
