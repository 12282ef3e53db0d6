"""The composition root of the inference service."""

from __future__ import annotations

import asyncio
import contextlib

from llmos.inference.v1 import fleet_service_pb2_grpc, inference_service_pb2_grpc

from services.inference.access import GENERATE_MANY, WATCHES, GatewayOnly
from services.inference.backends.echo import EchoConfig, EchoEngine
from services.inference.backends.embedded import EmbeddedConfig, EmbeddedEngine
from services.inference.engine.port import Engine
from services.inference.engine.watchdog import Timeouts
from services.inference.servicer import CARRY_S, FleetServicer, InferenceServicer
from services.inference.settings import InferenceSettings, child_environment
from services.inference.telemetry import MeasuredEngine, StepInstruments
from services.mesh.app import App, Closing
from services.mesh.auth_client import GrpcJwks, own_tokens
from services.mesh.channel import Channel
from services.mesh.clock import Clock
from services.mesh.health import Health
from services.mesh.interceptors import server_chain
from services.mesh.jwks import KEYS, FirstKeys, JwksCache
from services.mesh.revocation import RevocationList
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.tls import TlsFiles
from services.mesh.tokens import Audience, ServiceAuthenticator, Verifier
from services.mesh.watch_client import GrpcWatches
from services.mesh.watching import REVOCATIONS, watch_revocations

ENGINE = "engine"


class _EngineHealth:
    """Tells health what the engine says of itself, as a component."""

    def __init__(self, engine: Engine, health: Health) -> None:
        self._engine = engine
        self._health = health
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name="engine-health")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        async for state in self._engine.health_changes():
            await self._health.set_part(ENGINE, state.serving)


def build_engine(settings: InferenceSettings, clock: Clock) -> Engine:
    """The backend that the settings name."""
    if settings.backend == "echo":
        config = EchoConfig(
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_output_tokens=settings.max_output_tokens,
            delay_s=settings.echo_delay_ms / 1000,
            directives=settings.echo_directives,
            recovery_s=settings.echo_recovery_s,
        )
        return EchoEngine(config, clock)
    timeouts = Timeouts(
        load_timeout_s=settings.load_timeout_s,
        step_timeout_s=settings.step_timeout_s,
        ping_interval_s=settings.ping_interval_s,
        ping_timeout_s=settings.ping_timeout_s,
        ping_kill_s=settings.ping_kill_s,
    )
    return EmbeddedEngine(
        EmbeddedConfig(
            model_id=settings.served_model_id,
            model_path=settings.model_path,
            models_dir=settings.models_path,
            kernels=settings.kernels,
            instruction_set=settings.instruction_set,
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.threads,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_output_tokens=settings.max_output_tokens,
            max_prefill_tokens=settings.max_prefill_tokens,
            step_target_ms=settings.step_target_ms,
            prompt_lookup_tokens=settings.prompt_lookup_tokens,
            kv_cache_bytes=settings.kv_cache_bytes,
            prefix_cache=settings.prefix_cache,
            timeouts=timeouts,
            restart_backoff_min_s=settings.restart_backoff_min_s,
            restart_backoff_max_s=settings.restart_backoff_max_s,
            environment=child_environment(),
        ),
        clock,
        StepInstruments().record,
    )


async def build(settings: InferenceSettings, clock: Clock) -> App:
    """Puts the service together."""
    tls = TlsFiles.of(settings)
    anonymous = Channel(settings.auth_target, clock=clock, tls=tls)
    tokens = own_tokens(settings, anonymous, clock)
    auth = Channel(settings.auth_target, clock=clock, tls=tls, tokens=tokens, audience=Audience.AUTH)
    jwks = JwksCache(GrpcJwks(anonymous), clock, refresh_interval_s=settings.jwks_refresh_s)
    revoked = RevocationList(clock)
    verifier = Verifier(
        jwks, issuer=settings.issuer, audience=Audience.INFERENCE, clock=clock, revoked=revoked.check
    )
    engine = MeasuredEngine(build_engine(settings, clock), clock)

    running = RunningCalls(settings.max_concurrent_calls)
    health = Health(parts=[ENGINE, KEYS, REVOCATIONS])
    chain = server_chain(
        clock=clock,
        running=running,
        authenticator=GatewayOnly(ServiceAuthenticator(verifier, revoked.check_identity)),
        watch_methods=WATCHES,
        longer_s={GENERATE_MANY: CARRY_S},
        max_call_s=settings.max_call_s,
        adopt_request_id=True,
    )
    server = GrpcServer(settings, chain=chain, running=running, health=health)
    await server.add(
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server,
        InferenceServicer(
            engine,
            clock,
            replica=settings.name,
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
    return App(
        settings=settings,
        clock=clock,
        health=health,
        server=server,
        components=(
            anonymous,
            auth,
            Closing(tokens.close),
            FirstKeys(jwks, health, clock),
            watch_revocations(GrpcWatches(auth).revocations, revoked, health=health, clock=clock),
            engine,
            _EngineHealth(engine, health),
        ),
    )
