"""How a process is put together, started, drained and stopped.

A service's `app.py` builds an `App`; `run` does the rest. Start: components in their order, then edges,
then ready. Drain, on SIGTERM or SIGINT:

1. health says NOT_SERVING, so that routers look elsewhere
2. a short delay, in which calls are still accepted
3. edges stop accepting and running calls finish, at most `drain_grace_s`; then they are cancelled
4. components stop, in reverse order

A second signal skips the waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import uvloop
from google.protobuf.internal import api_implementation
from pydantic import ValidationError

from services.mesh import logs, settings
from services.mesh.clock import Clock, SystemClock
from services.mesh.health import Health
from services.mesh.server import GrpcServer
from services.mesh.settings import ServiceSettings
from services.mesh.telemetry import Telemetry

logger = logging.getLogger(__name__)

GC_YOUNG_OBJECTS = 10_000
"""After so many new objects the young ones are looked at; Python's own 700 are less than two requests."""

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


class Component(Protocol):
    """A part with a life: a store, a relay, an engine."""

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Must end in bounded time, whatever the state of the world."""


class Closing:
    """What only has to be closed, as a component."""

    def __init__(self, close: Callable[[], Awaitable[Any]]) -> None:
        self._close = close

    async def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        await self._close()


class Edge(Protocol):
    """A listener besides gRPC, such as HTTP."""

    ports: dict[str, int]

    async def start(self) -> None: ...

    async def drain(self, grace_s: float) -> None: ...


@dataclass
class App:
    """A service, put together and not yet started."""

    settings: ServiceSettings
    clock: Clock
    health: Health
    server: GrpcServer
    components: Sequence[Component] = ()
    edges: Sequence[Edge] = ()
    after_start: Sequence[Callable[[], Awaitable[None]]] = field(default=())
    """Called when the edges are open: for parts that become ready later and say so to `health`."""

    async def serve(self, stop: asyncio.Event, hurry: asyncio.Event) -> None:
        """Runs until `stop`, then drains; `hurry` ends the waiting."""
        async with contextlib.AsyncExitStack() as stack:
            telemetry = Telemetry(self.settings)
            for component in (telemetry, *self.components):
                # Pushed first: one that fails half-way through its start is stopped as well.
                stack.push_async_callback(component.stop)
                await component.start()
            await self.server.start()
            stack.push_async_callback(self.server.close_probes)
            for edge in self.edges:
                await edge.start()
            # What lives as long as the process is not looked at again and again for garbage: with it,
            # collecting took a sixth of what a request costs.
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_YOUNG_OBJECTS)
            await self.health.started()
            ports = dict(self.server.ports) | telemetry.ports
            for edge in self.edges:
                ports |= edge.ports
            _write_ports(self.settings, ports)
            logger.info(
                "%s listens: %s", self.settings.name, ", ".join(f"{k} {v}" for k, v in sorted(ports.items()))
            )
            for hook in self.after_start:
                await hook()
            await stop.wait()
            await self._drain(hurry)
        logger.info("%s stopped", self.settings.name)

    async def _drain(self, hurry: asyncio.Event) -> None:
        logger.info("%s drains", self.settings.name)
        await self.health.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hurry.wait(), self.settings.drain_delay_s)
        grace_s = 0.0 if hurry.is_set() else self.settings.drain_grace_s
        draining = asyncio.gather(self.server.drain(grace_s), *(edge.drain(grace_s) for edge in self.edges))
        hurrying = asyncio.ensure_future(hurry.wait())
        waited: list[asyncio.Future[Any]] = [draining, hurrying]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await asyncio.gather(self.server.drain(0), *(edge.drain(0) for edge in self.edges))
        hurrying.cancel()
        await draining


def _write_ports(config: ServiceSettings, ports: dict[str, int]) -> None:
    """Tells which ports were taken: whoever asked for port 0 reads it here."""
    path = config.state_dir / "ports.json"
    fresh = path.with_name(f".ports.{os.getpid()}")
    fresh.write_text(json.dumps({"pid": os.getpid(), **ports}))
    fresh.replace(path)


S = TypeVar("S", bound=ServiceSettings)


def run(kind: type[S], build: Callable[[S, Clock], Awaitable[App]], argv: Sequence[str] | None = None) -> int:
    """A service's main. Returns the exit code: 0 after a drain, 1 failed, 2 wrong settings or usage."""
    parser = argparse.ArgumentParser(
        prog=f"python -m services.{kind.service}",
        description=f"The {kind.service} service of llmos. Settings come from the environment.",
    )
    parser.add_argument("--check", action="store_true", help="check and print the settings, then end")
    args = parser.parse_args(argv)
    try:
        config = kind()
    except ValidationError as error:
        for line in _complaints(kind, error):
            print(line, file=sys.stderr)  # noqa: T201
        return EXIT_USAGE
    if args.check:
        print("\n".join(settings.describe(config)))  # noqa: T201
        return EXIT_OK
    logs.configure(config)
    if api_implementation.Type() != "upb":
        logger.error("protobuf runs on %s instead of upb; reinstall protobuf", api_implementation.Type())
        return EXIT_FAILED
    for line in settings.describe(config):
        logger.info("setting %s", line)
    return uvloop.run(_main(config, build))


def _complaints(kind: type[ServiceSettings], error: ValidationError) -> list[str]:
    prefix = kind.model_config.get("env_prefix") or ""
    lines = [f"{kind.service}: the settings are not usable:"]
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"][:1])
        variable = (prefix + name).upper() if name else "settings"
        text = (
            "is required: set it"
            if problem["type"] == "missing"
            else problem["msg"].removeprefix("Value error, ")
        )
        lines.append(f"  {variable}: {text}")
    return lines


async def _main(config: S, build: Callable[[S, Clock], Awaitable[App]]) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        app = await build(config, SystemClock())
        await app.serve(stop, hurry)
    except StartError as error:
        logger.error("%s cannot start: %s", config.service, error)  # noqa: TRY400
        return EXIT_FAILED
    except OSError as error:
        logger.error("%s cannot go on: %s", config.service, error)  # noqa: TRY400
        return EXIT_FAILED
    return EXIT_OK


class StartError(Exception):
    """A service cannot start; the message says what to do."""
