"""Parts of the mesh die and come back: no stream notices, and each request has exactly one outcome."""

from __future__ import annotations

import asyncio
import signal
import time

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.dev.broker import Broker
from tests.conftest import MeshFactory
from tests.framework.calls import OUTCOME, Caller, Streamed
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

LONG = "[[tokens=200]][[delay_ms=30]] word by word"


async def running_streams(caller: Caller, count: int, text: str = LONG) -> list[asyncio.Task[Streamed]]:
    """Streams that have all said something."""
    firsts = [asyncio.Event() for _ in range(count)]
    tasks = [asyncio.create_task(caller.stream(text, first=first)) for first in firsts]
    async with asyncio.timeout(20):
        await asyncio.gather(*(first.wait() for first in firsts))
    return tasks


def assert_whole(streams: list[Streamed]) -> set[str]:
    """All finished, nothing doubled or lost. Returns their request ids."""
    for stream in streams:
        assert stream.error is None, stream.error
        assert stream.finished
        assert stream.unbroken
    return {stream.request_id for stream in streams}


async def test_no_stream_notices_the_death_of_logging_and_of_the_broker(
    make_mesh: MeshFactory, own_broker: Broker
) -> None:
    mesh = make_mesh(own_broker)
    mesh.configure("inference", max_running=16)
    await mesh.start()
    caller = Caller(mesh)
    streams = await running_streams(caller, 10)
    mesh.kill("logging")
    own_broker.kill()
    ids = assert_whole(await asyncio.gather(*streams))
    ids |= assert_whole([await caller.stream("and a new one while both are away")])
    own_broker.start()
    await own_broker.wait_ready()
    await mesh.start("logging")
    outcomes = await caller.outcomes(ids, timeout_s=60)
    assert set(outcomes.values()) == {OUTCOME.OUTCOME_SUCCEEDED}


@pytest.mark.parametrize("victim", ["auth", "logging", "inference", "gateway"])
async def test_r07_a_drain_cuts_no_stream(make_mesh: MeshFactory, broker: Broker, victim: str) -> None:
    mesh = make_mesh(broker, replicas=("inference", "inference-1"))
    for name in ("inference", "inference-1"):
        mesh.configure(name, max_running=64)
    mesh.configure("gateway", drain_delay_s=1, probe_interval_s=0.2)
    await mesh.start("auth", "logging", "inference", "inference-1", "gateway")
    caller = Caller(mesh)
    streams = await running_streams(caller, 50, "[[tokens=60]][[delay_ms=50]] word by word")
    watch = health_pb2_grpc.HealthStub(mesh.channel(victim)).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    mesh.processes[victim].signal(signal.SIGTERM)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    # The listener is still open: health is told first.
    late = [await caller.stream("a new call") for _ in range(5)]
    whole = await asyncio.gather(*streams)
    ids = assert_whole([*whole, *late])
    assert await mesh.processes[victim].wait_ended(30) == 0
    if victim in {"gateway", "logging"}:
        await mesh.start(victim)
    outcomes = await caller.outcomes(ids)
    assert set(outcomes.values()) == {OUTCOME.OUTCOME_SUCCEEDED}


@pytest.mark.slow
async def test_r09_a_killed_engine_is_told_by_health_and_comes_back(mesh: MeshHarness) -> None:
    """With the real model: the engine is a process of its own."""
    mesh.configure("inference", backend="embedded")
    await mesh.start("auth", "logging", "gateway", wait=False)
    await mesh.start("inference", wait=False)
    await mesh.wait_ready("inference", timeout_s=180)
    await mesh.wait_ready("gateway")
    caller = Caller(mesh)
    model = {"model": "smollm2-135m-instruct"}
    first = asyncio.Event()
    running = asyncio.create_task(
        caller.stream("Once upon a time", first=first, max_tokens=500, ignore_eos=True, **model)
    )
    await asyncio.wait_for(first.wait(), 30)
    children = mesh.children("inference")
    assert children
    killed_s = time.monotonic()
    for child in children:
        child.kill()
    await mesh.wait_not_serving("inference", timeout_s=5)
    cut = await asyncio.wait_for(running, 5)
    assert time.monotonic() - killed_s < 5
    assert cut.error is not None
    assert cut.error.code() is grpc.StatusCode.UNAVAILABLE
    assert cut.unbroken
    await mesh.wait_ready("inference", timeout_s=120)
    again = await eventually(lambda: answered(caller), timeout_s=30, what="a request is served again")
    assert again.finished
    assert not psutil.pid_exists(children[0].pid) or children[0].status() == psutil.STATUS_ZOMBIE


async def answered(caller: Caller) -> Streamed | None:
    stream = await caller.stream("Say hello", model="smollm2-135m-instruct", max_tokens=8)
    return stream if stream.finished else None
