"""The smallest service there can be, for tests of what `services.mesh.app` does with any of them."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic_settings import SettingsConfigDict

from services.mesh.app import App, StartError, run
from services.mesh.clock import Clock
from services.mesh.context import Caller
from services.mesh.health import Health
from services.mesh.interceptors import Metadata, server_chain
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.settings import Port, ServiceSettings


class TinySettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="LLMOS_TINY_")
    service = "tiny"

    grpc_port: Port = 0
    metrics_port: Port = 0
    probe_port: Port | None = 0
    state_dir: Path
    service_secret_file: Path = Path("unused")
    refuse: str = ""


async def authenticate(method: str, metadata: Metadata, source: str) -> Caller:
    return Caller()


class Noisy:
    """A component that says when it starts and stops."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def start(self) -> None:
        print(f"{self._name} started", flush=True)

    async def stop(self) -> None:
        print(f"{self._name} stopped", flush=True)


async def build(settings: TinySettings, clock: Clock) -> App:
    if settings.refuse:
        raise StartError(settings.refuse)
    running = RunningCalls(settings.max_concurrent_calls)
    health = Health()
    chain = server_chain(
        clock=clock,
        running=running,
        authenticator=authenticate,
        max_call_s=settings.max_call_s,
        adopt_request_id=False,
    )
    server = GrpcServer(settings, chain=chain, running=running, health=health)
    return App(settings, clock, health, server, components=[Noisy("one"), Noisy("two")])


if __name__ == "__main__":
    sys.exit(run(TinySettings, build))
