"""All of it together: started in an order, watched, drained in an order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.dev import certs, ports, readiness
from deploy.dev.broker import Broker
from deploy.dev.environment import ROOT, Plan
from deploy.dev.processes import Process
from deploy.dev.state import CannotStart, State

READY_TIMEOUT_S = {"auth": 60.0, "logging": 60.0, "inference": 600.0, "gateway": 600.0}
"""inference may have to convert its model first, and the gateway waits for it."""
STOP_GRACE_S = 45.0
"""Longer than a service's own `drain_grace_s`."""
DRAIN_ORDER = ("gateway", "inference", "auth", "logging")
"""The edge first: nothing new comes in, and its streams can still finish on what is below it. Then what
served it. These write audit events while they drain; so logging, which stores them, and Kafka, which carries
them, end last.

What Kafka has not taken by then stays in the spools and is sent at the next start: nothing is lost.
"""


class Mesh:
    """The broker and the four services of one state folder."""

    def __init__(
        self,
        state: State,
        *,
        mesh_ports: Mapping[str, int],
        bootstrap: str | None,
        dist: Path,
        models: Path,
        tls: bool,
        settings: Mapping[str, str],
        say: Callable[[str], None],
        on_line: Callable[[str, str], None] | None,
    ) -> None:
        """`bootstrap` names a Kafka that runs already; None: one is started."""
        self.state = state
        self.ports = dict(mesh_ports)
        self.certs = state.of("certs") if tls else None
        self._say, self._on_line = say, on_line
        self._broker: Broker | None = None
        if bootstrap is None:
            self._broker = Broker(
                state.of("kafka"),
                port=self.ports["kafka"],
                controller_port=self.ports["kafka controller"],
                dist=dist,
                log_file=state.logs / "kafka.log",
                say=say,
            )
        self.plan = Plan(
            state=state,
            ports=self.ports,
            bootstrap=bootstrap or f"{ports.HOST}:{self.ports['kafka']}",
            models=models,
            certs=self.certs,
            # Where OAuth2 clients on this machine discover it.
            issuer=f"{'https' if tls else 'http'}://{ports.HOST}:{self.ports['gateway http']}",
            settings=settings,
        )
        self.services: dict[str, Process] = {}
        self._started_s: dict[str, float] = {}

    async def start(self) -> None:
        """Returns when all are ready.

        Raises:
            CannotStart: something stands in the way; what was started so far still runs, `drain` ends it.
        """
        self.state.lock()
        self.state.prepare()
        ports.require_free(
            {name: port for name, port in self.ports.items() if self._broker or "kafka" not in name}
        )
        if self.certs is not None:
            made = await asyncio.to_thread(certs.ensure_all, self.certs)
            if made:
                self._say(f"Made certificates: {', '.join(made)}")
        if self._broker is not None:
            await asyncio.to_thread(self._broker.prepare)
            self._broker.start()
            self._started_s["kafka"] = time.monotonic()
            self._record()
        for service in ("auth", "inference"):  # inference takes longest
            self._start(service)
        await self._ready("auth")
        if not self.state.admin_key.exists():
            raise CannotStart(
                f"auth has a database but {self.state.admin_key} is missing. Put the key back, or begin anew"
                f" with other keys: rm -r {self.state.of('auth')}"
            )
        if self._broker is not None:
            await self._broker.wait_ready()
            waited_s = time.monotonic() - self._started_s["kafka"]
            self._say(f"kafka      ready after {waited_s:.0f} s on {self._broker.bootstrap}")
        for service in ("logging", "gateway"):
            self._start(service)
        try:
            async with asyncio.TaskGroup() as group:
                for service in ("inference", "logging", "gateway"):
                    group.create_task(self._ready(service))
        except* CannotStart as several:
            raise CannotStart(str(several.exceptions[0])) from None
        self.state.tell_clients(self.plan.client_environment())

    async def wait_crash(self) -> str:
        """Waits until a process ends that should not; returns a sentence about it."""
        processes = [*self.services.values(), *([self._broker.process] if self._broker else [])]
        tasks = {asyncio.ensure_future(process.wait_ended()): process for process in processes}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        process = tasks[done.pop()]
        return (
            f"{process.name} ended with exit code {process.exit_code}; the mesh stops. Its last lines"
            f" ({process.log_file}):\n{process.tail(15)}"
        )

    async def drain(self) -> bool:
        """Stops all in order; returns whether each ended by itself, with exit code 0."""
        clean = True
        for name in DRAIN_ORDER:
            process = self.services.get(name)
            if process is None:
                continue
            if process.running:
                self._say(f"{name:<10} drains")
            code = await process.stop(STOP_GRACE_S)
            if code != 0:
                clean = False
                self._say(f"{name:<10} ended with exit code {code}")
        if self._broker is not None and "kafka" in self._started_s:
            self._say("kafka      stops")
            await self._broker.stop()
        self.state.forget()
        return clean

    def kill(self) -> None:
        """Ends everything at once."""
        for process in [*self.services.values(), *self._broker_process()]:
            process.end_group()
        self.state.forget()

    def _start(self, service: str) -> None:
        process = Process(
            service,
            self.plan.command(service),
            env=self.plan.environment(service),
            cwd=ROOT,
            log_file=self.state.logs / f"{service}.log",
            on_line=self._on_line,
        )
        self.services[service] = process
        self._started_s[service] = time.monotonic()
        process.start()
        self._record()

    async def _ready(self, service: str) -> None:
        began_s = self._started_s[service]
        waiting = asyncio.ensure_future(
            readiness.wait_ready(
                self.services[service], self.plan.target(service), self.certs, READY_TIMEOUT_S[service]
            )
        )
        try:
            while not (await asyncio.wait({waiting}, timeout=10))[0]:
                last_line = self.services[service].tail(1)
                self._say(f"{service:<10} starting, {time.monotonic() - began_s:.0f} s so far: {last_line}")
            await waiting
        finally:
            waiting.cancel()
        self._say(
            f"{service:<10} ready after {time.monotonic() - began_s:.0f} s on {self.plan.target(service)}"
        )

    def _broker_process(self) -> list[Process]:
        with contextlib.suppress(RuntimeError):  # not prepared yet
            return [self._broker.process] if self._broker else []
        return []

    def _record(self) -> None:
        processes = {
            process.name: process.pid for process in [*self._broker_process(), *self.services.values()]
        }
        self.state.record(processes)
