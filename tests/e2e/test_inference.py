"""The inference service as a process, beside auth: who may call it, what it streams, and its health."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from llmos.gateway.v1 import generation_pb2
from llmos.inference.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)

from services.mesh import context
from services.mesh.auth_client import GrpcServiceTokens
from services.mesh.channel import Channel
from services.mesh.clock import SystemClock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.errors import CredentialMissing, DeadlineExceeded, Draining, NotImplementedYet, ReplicaLost
from services.mesh.tokens import Audience, ServiceTokens
from tests.framework.mesh import MeshHarness
from tests.framework.models import TINY_MODEL_ID, make_tiny_model
from tests.framework.waiting import eventually

CLOCK = SystemClock()
GENERATE = "/llmos.inference.v1.InferenceService/Generate"


class Peer:
    """The gateway, as inference sees it."""

    def __init__(self, mesh: MeshHarness) -> None:
        self._auth = Channel(mesh.target("auth"), clock=CLOCK)
        secret = (mesh.state.secrets / "gateway").read_text().strip()
        port = GrpcServiceTokens(self._auth, client_id="service:gateway", client_secret=secret)
        self._tokens = ServiceTokens(port, CLOCK)
        self._channel = Channel(
            mesh.target("inference"), clock=CLOCK, tokens=self._tokens, audience=Audience.INFERENCE
        )
        self.inference = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self.fleet = fleet_service_pb2_grpc.FleetServiceStub(self._channel)

    async def generate(
        self, text: str, model: str = "echo", *, timeout_s: float = 60, **fields: Any
    ) -> AsyncIterator[Any]:
        spec = generation_pb2.GenerationSpec(model=model, prompt={"text": text}, **fields)
        request = inference_service_pb2.GenerateRequest(request_id="req_test", spec=spec)
        caller = Caller(Identity("acme", "app"))
        asked = RequestContext("req_test", GENERATE, deadline_s=CLOCK.monotonic() + timeout_s, caller=caller)
        token = context.enter(asked)
        try:
            call = aiter(self.inference.Generate(request))
            first = await anext(call)  # takes the caller along
        finally:
            context.leave(token)
        yield first
        async for event in call:
            yield event

    async def close(self) -> None:
        await self._tokens.close()
        await self._channel.close()
        await self._auth.close()


@pytest.fixture
async def mesh(make_mesh: Any) -> MeshHarness:
    """auth and inference; no broker is needed."""
    mesh: MeshHarness = make_mesh(None)
    return mesh


@pytest.fixture
async def gateway(mesh: MeshHarness) -> AsyncIterator[Peer]:
    peer = Peer(mesh)
    yield peer
    await peer.close()


async def test_the_gateway_is_served_and_nobody_else(mesh: MeshHarness, gateway: Peer) -> None:
    await mesh.start("auth", "inference")
    events = [event async for event in gateway.generate("one two three")]
    deltas = events[1:-1]  # fewer than tokens where the reader lags
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * len(deltas), "finished"]
    assert [event.delta.seq for event in deltas] == list(range(1, len(deltas) + 1))
    assert sum(len(event.delta.token_ids) for event in deltas) == 3
    assert "".join(event.delta.text for event in events) == "one two three"
    assert events[0].started.replica == "inference-0"

    models = await gateway.fleet.ListModels(fleet_service_pb2.ListModelsRequest())
    assert [(model.id, model.ready) for model in models.models] == [("echo", True)]
    count = await gateway.inference.Tokenize(
        inference_service_pb2.TokenizeRequest(model="echo", prompt={"text": "one two three"})
    )
    assert count.prompt_tokens == 3

    watch = aiter(gateway.fleet.WatchLoad(fleet_service_pb2.WatchLoadRequest(min_interval_ms=10)))
    load = await anext(watch)
    assert (load.serving, load.running, load.model) == (True, 0, "echo")

    with pytest.raises(NotImplementedYet):
        [event async for event in gateway.generate("x", tools=[{"name": "search"}])]

    anonymous = Channel(mesh.target("inference"), clock=CLOCK)
    for call in (
        fleet_service_pb2_grpc.FleetServiceStub(anonymous).ListModels(fleet_service_pb2.ListModelsRequest()),
        inference_service_pb2_grpc.InferenceServiceStub(anonymous).Tokenize(
            inference_service_pb2.TokenizeRequest(model="echo", prompt={"text": "one"})
        ),
    ):
        with pytest.raises(CredentialMissing):
            await call
    await anonymous.close()
    # A watch does not hold up the drain, and ends with a word.
    stopping = asyncio.create_task(mesh.stop("inference"))
    with pytest.raises(Draining):
        _ = [load async for load in watch]
    assert await stopping == 0


async def test_r09_the_engine_child_is_stopped_or_dies_and_the_service_tells_the_truth(
    mesh: MeshHarness, gateway: Peer, tmp_path: Any
) -> None:
    model = await asyncio.to_thread(make_tiny_model, tmp_path / TINY_MODEL_ID)
    mesh.configure("inference", backend="embedded", model_path=model)
    await mesh.start("auth", "inference")
    fields = {"max_tokens": 4000, "ignore_eos": True, "sampling": {"temperature": 0}}

    streams = [gateway.generate(f"story {n}", TINY_MODEL_ID, **fields) for n in range(4)]
    for stream in streams:
        await anext(stream)
    (child,) = mesh.children("inference")
    stopped_s = CLOCK.monotonic()
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        _ = [event async for event in gateway.generate("now", TINY_MODEL_ID, timeout_s=1)]
    assert CLOCK.monotonic() - stopped_s < 2
    await mesh.wait_not_serving("inference", timeout_s=5)
    assert CLOCK.monotonic() - stopped_s < 5
    child.send_signal(signal.SIGCONT)
    await mesh.wait_ready("inference")
    for stream in streams:
        await anext(stream)  # they go on

    child.send_signal(signal.SIGKILL)
    await mesh.wait_not_serving("inference", timeout_s=5)
    for stream in streams:
        with pytest.raises(ReplicaLost):
            async with asyncio.timeout(5):
                [event async for event in stream]
    await mesh.wait_ready("inference")
    events = [event async for event in gateway.generate("again", TINY_MODEL_ID, max_tokens=3)]
    assert events[-1].WhichOneof("event") == "finished"

    (child,) = mesh.children("inference")
    mesh.kill("inference")
    await eventually(lambda: not child.is_running() or child.status() == "zombie", what="the child is gone")


async def test_health_waits_for_the_model(mesh: MeshHarness, tmp_path: Any) -> None:
    """The server answers while there is no model, and says that it does not serve."""
    mesh.configure("inference", backend="embedded", model_path=tmp_path)
    await mesh.start("auth")
    await mesh.start("inference", wait=False)
    await eventually(lambda: "cannot be loaded" in mesh.log("inference"), timeout_s=60)
    await mesh.wait_not_serving("inference")
    channel = mesh.channel("inference")
    await channel.channel_ready()
    assert channel.get_state() == grpc.ChannelConnectivity.READY
    assert await mesh.stop("inference") == 0
