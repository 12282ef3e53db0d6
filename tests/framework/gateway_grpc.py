"""The gateway's gRPC edge over fakes, behind the real chain and server, on a free port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from llmos.gateway.v1 import (
    generation_service_pb2_grpc,
    job_service_pb2_grpc,
    model_service_pb2_grpc,
    policy_service_pb2_grpc,
)

from services.gateway.app import add_pending
from services.gateway.policy_view import PolicyView
from services.gateway.request import RequestParser
from services.gateway.servicer import GenerationServicer, ModelServicer, PolicyServicer
from services.gateway.settings import GatewaySettings
from services.mesh.health import Health
from services.mesh.server import GrpcServer
from services.mesh.source_address import TrustedProxies
from tests.framework.gateway_fakes import MAX_TOKENS_LIMIT, Bench
from tests.framework.gateway_http import KEY, chain_of
from tests.framework.gateway_jobs import JobBench

AUTH = (("authorization", f"Bearer {KEY}"),)


@asynccontextmanager
async def serving(
    bench: Bench, folder: Path, *, max_call_s: float = 30, jobs: JobBench | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a running edge."""
    settings = GatewaySettings(
        grpc_port=0, metrics_port=0, http_port=0, state_dir=folder, service_secret_file=folder / "secret"
    )
    running = bench.running
    health = Health()
    server = GrpcServer(
        settings,
        chain=chain_of(bench, max_call_s=max_call_s),
        running=running,
        health=health,
        validate=False,
        proxies=TrustedProxies(bench.proxies),
    )
    parser = RequestParser(max_tokens_limit=MAX_TOKENS_LIMIT)
    built = (jobs or JobBench(bench)).jobs
    await server.add(
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server,
        GenerationServicer(parser, bench.completions, built.parser, built.retries),
        "llmos.gateway.v1.GenerationService",
    )
    await server.add(
        model_service_pb2_grpc.add_ModelServiceServicer_to_server,
        ModelServicer(parser, bench.models),
        "llmos.gateway.v1.ModelService",
    )
    view = PolicyView(
        bench.authorisation,
        bench.models,
        bench.limits,
        bench.clock,
        max_request_bytes=settings.max_message_bytes,
        max_tokens=MAX_TOKENS_LIMIT,
    )
    await server.add(
        policy_service_pb2_grpc.add_PolicyServiceServicer_to_server,
        PolicyServicer(view),
        "llmos.gateway.v1.PolicyService",
    )
    await server.add(
        job_service_pb2_grpc.add_JobServiceServicer_to_server,
        built.servicer,
        "llmos.gateway.v1.JobService",
    )
    await add_pending(server)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
            yield channel
    finally:
        await server.drain(0)
