"""A real inference service with the echo backend in this process, over gRPC, and the gateway's port to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from llmos.inference.v1 import fleet_service_pb2_grpc, inference_service_pb2_grpc

from services.gateway.generation import EngineEvent, Prompt
from services.gateway.replica.clients import GrpcInference
from services.inference.access import GENERATE_MANY, WATCHES
from services.inference.backends.echo import EchoConfig, EchoEngine
from services.inference.servicer import CARRY_S, FleetServicer, InferenceServicer
from services.inference.settings import InferenceSettings
from services.mesh.channel import Channel, TokenSource
from services.mesh.clock import Clock, SystemClock
from services.mesh.context import Caller, Identity
from services.mesh.health import Health
from services.mesh.interceptors import Authenticator, server_chain
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.tokens import Audience
from tests.framework.gateway_fakes import events_of, generation
from tests.framework.waiting import eventually


@dataclass
class EchoReplica:
    """The replica, and how a gateway sees it."""

    port: GrpcInference
    server: GrpcServer
    running: RunningCalls
    engine: EchoEngine

    @property
    def model(self) -> str:
        return self.engine.models()[0].id

    async def events(self, text: str, request_id: str = "req_1", *, whole: bool = False) -> list[EngineEvent]:
        """All that comes of a prompt."""
        request = generation(model=self.model, prompt=Prompt(text=text))
        return await events_of(self.port, request, request_id, whole=whole)

    async def watched(self) -> None:
        """Returns when the deltas of what begins now come by the watch."""
        await self.events("a", "req_0")
        await eventually(lambda: self.port.is_watching, timeout_s=5)

    async def carried(self) -> None:
        """Returns when what begins now, and is not read along, goes in the stream of all."""
        await self.events("a", "req_0", whole=True)
        await eventually(lambda: self.port.is_carrying, timeout_s=5)


@asynccontextmanager
async def echo_replica(
    folder: Path,
    *,
    config: EchoConfig | None = None,
    max_call_s: float = 30.0,
    authenticator: Authenticator | None = None,
    tokens: TokenSource | None = None,
    max_calls: int = 64,
    clock: Clock | None = None,
) -> AsyncIterator[EchoReplica]:
    clock = clock or SystemClock()
    settings = InferenceSettings(grpc_port=0, metrics_port=0, state_dir=folder)
    running = RunningCalls(max_calls)
    health = Health()

    async def anybody(method: str, metadata: object, source: str) -> Caller:
        return Caller(Identity("acme", "app"), "service:gateway")

    chain = server_chain(
        clock=clock,
        running=running,
        authenticator=authenticator or anybody,
        watch_methods=WATCHES,
        longer_s={GENERATE_MANY: CARRY_S},
        max_call_s=max_call_s,
        adopt_request_id=True,
    )
    engine = EchoEngine(config or EchoConfig(directives=True), clock)
    await engine.start()
    server = GrpcServer(settings, chain=chain, running=running, health=health)
    await server.add(
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server,
        InferenceServicer(
            engine,
            clock,
            replica="replica-0",
            chain=chain,
            running=running,
            max_request_bytes=settings.max_message_bytes,
        ),
        "llmos.inference.v1.InferenceService",
    )
    await server.add(
        fleet_service_pb2_grpc.add_FleetServiceServicer_to_server,
        FleetServicer(engine, clock),
        "llmos.inference.v1.FleetService",
    )
    await server.start()
    await health.started()
    channel = Channel(
        f"127.0.0.1:{server.ports['grpc']}", clock=clock, tokens=tokens, audience=Audience.INFERENCE
    )
    port = GrpcInference(channel, clock)
    try:
        yield EchoReplica(port, server, running, engine)
    finally:
        await port.close()
        await channel.close()
        await server.drain(0)
        await engine.stop()
