"""Any part of the mesh as real processes: started, killed, frozen and restarted by a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc.aio
import psutil

from deploy.dev import readiness
from deploy.dev.broker import Broker
from deploy.dev.certs import CertificateAuthority
from deploy.dev.environment import ROOT, Plan, service_of
from deploy.dev.ports import HOST, PortReservations
from deploy.dev.processes import TAIL_LINES, Process
from deploy.dev.state import CannotStart, State
from tests.framework.forks import COLLECT, STACKS, Forks
from tests.framework.waiting import eventually

ALL = ("auth", "logging", "inference", "gateway")
READY_TIMEOUT_S = 120.0
STOP_GRACE_S = 45.0
STACKS_TIMEOUT_S = 5.0
PORTS = {"gateway": ("", " metrics", " http")}
DEFAULTS = {
    # Deterministic, and told by directives in the prompt to be slow or to fail (docs/inference.md).
    "LLMOS_INFERENCE_BACKEND": "echo",
    "LLMOS_INFERENCE_ECHO_DIRECTIVES": "true",
    # All tests come from one address, and many send wrong credentials on purpose; test_brute_force is strict.
    "LLMOS_GATEWAY_FREE_FAILURES": "1000000",
    "LLMOS_AUTH_FREE_FAILURES": "1000000",
    # Each request reaches an engine, however often it is asked; test_response_cache is about the others.
    "LLMOS_GATEWAY_CACHE_MAX_BYTES": "0",
}


class MeshHarness:
    """One mesh with its own state folder, ports and topics; the broker is shared by the run.

    A process goes by the name of its service, or of a further replica: `inference-1`, `gateway-1`. Ports are
    fixed when a name is first used, so that others can be told of it before it starts, and after a restart
    find it again.
    """

    def __init__(
        self,
        folder: Path,
        broker: Broker | None,
        reservations: PortReservations,
        *,
        tls: bool = False,
        replicas: Iterable[str] = ("inference",),
        measured: bool = False,
        forks: Forks | None = None,
    ) -> None:
        """`replicas` are the inference processes that gateways are told of. `measured`: coverage is recorded
        in the processes, where it is in this one; it slows them down. `forks`: services start from these,
        unless coverage is recorded."""
        self.broker = broker
        self.state = State(folder)
        self.state.prepare()
        self.authority = CertificateAuthority(folder / "certs") if tls else None
        self._reservations = reservations
        self._ports: dict[str, int] = {}
        self._measured = measured
        self._forks = None if self._recording else forks
        self._plan = Plan(
            state=self.state,
            ports=self._ports,
            bootstrap=broker.bootstrap if broker else f"{HOST}:1",
            models=Path(os.environ.get("LLMOS_MODELS_DIR") or ROOT / ".state" / "models"),
            certs=self.authority.folder if self.authority else None,
            replicas=tuple(replicas),
            topic_prefix=f"test-{secrets.token_hex(4)}",
            settings=DEFAULTS,
        )
        self._own_settings: dict[str, dict[str, str]] = {}
        self._channels: list[grpc.aio.Channel] = []
        self.processes: dict[str, Process] = {}
        for name in {*ALL, *self._plan.replicas}:
            self._reserve(name)
        if self.authority:
            self.authority.ensure("client")

    # -- what is started, and how ---------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Targets, environment and topics of this mesh."""
        return self._plan

    def configure(self, name: str, **settings: object) -> None:
        """Settings of a process for its next start: `configure("gateway", drain_grace_s=5)`; None unsets."""
        own = self._own_settings.setdefault(name, {})
        for setting, value in settings.items():
            variable = f"LLMOS_{service_of(name).upper()}_{setting.upper()}"
            own[variable] = "" if value is None else str(value)

    def reroute(self, **changes: Any) -> None:
        """Changes the plan for later starts, for instance `bootstrap=proxy.target`."""
        self._plan = replace(self._plan, **changes)

    async def start(self, *names: str, wait: bool = True, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Starts processes, all four services where none is named; `wait`: until each is ready.

        The first start of the embedded engine on a machine converts its model, which takes longer than the
        default `timeout_s`.

        Raises:
            CannotStart: one ended, or is not ready in time; the message has its last lines.
        """
        if self._forks is not None:
            self._forks.prepare(map(service_of, names or ALL))
        for name in names or ALL:
            self.spawn(name)
        if wait:
            await asyncio.gather(*(self.wait_ready(name, timeout_s) for name in names or ALL))

    def spawn(self, name: str) -> Process:
        """Starts one process and does not wait."""
        self._reserve(name)
        if self.authority:
            self.authority.ensure(service_of(name))
        env = self._plan.environment(name) | self._own_settings.get(name, {})
        if not self._measured:
            env = {key: value for key, value in env.items() if not key.startswith("COVERAGE_")}
        process = Process(
            name,
            self._plan.command(name),
            env=env,
            cwd=ROOT,
            log_file=self.state.logs / f"{name}.log",
            launch=self._forks and partial(self._forks.start, service_of(name), env),
        )
        self.processes[name] = process
        process.start()
        return process

    async def wait_ready(self, name: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Returns when its health is SERVING. Raises CannotStart; the logs have everybody's stacks then."""
        try:
            await readiness.wait_ready(self.processes[name], self.target(name), self._plan.certs, timeout_s)
        except CannotStart:
            await self._write_stacks()
            raise

    async def _write_stacks(self) -> None:
        """It may be another process than the one that is waited for that hangs."""
        running = [process for process in self.processes.values() if self._forks and process.running]
        for process in running:
            process.signal(STACKS)
        with contextlib.suppress(AssertionError):  # one that is frozen writes none
            await eventually(lambda: all(map(_has_stacks, running)), timeout_s=STACKS_TIMEOUT_S)

    async def wait_not_serving(self, name: str, timeout_s: float = 10.0) -> None:
        """Returns when its health is not SERVING, or nobody answers; raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            await readiness.wait_health(self.target(name), self._plan.certs, serving=False)

    # -- what is done to it ---------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """SIGKILL to the process alone, as a crash: its children have to notice by themselves."""
        self.processes[name].kill()

    async def stop(self, name: str, grace_s: float = STOP_GRACE_S) -> int | None:
        """SIGTERM; returns the exit code, 0 after a drain."""
        return await self.processes[name].stop(grace_s)

    async def restart(self, name: str) -> None:
        """Starts it again, on the same ports and state; where it runs, it is stopped first. Waits for it."""
        process = self.processes.get(name)
        if process is not None and process.running:
            await self.stop(name)
        await self.start(name)

    def freeze(self, name: str) -> None:
        """SIGSTOP to the process alone."""
        self.processes[name].signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.processes[name].signal(signal.SIGCONT)

    def collect_garbage(self, name: str) -> None:
        """Asks the process to, and does not wait. Only where services are forked."""
        if self._forks is None:
            raise RuntimeError(f"{name} was not forked, so that it cannot be asked")
        self.processes[name].signal(COLLECT)

    @property
    def forked(self) -> bool:
        return self._forks is not None

    def children(self, name: str) -> list[psutil.Process]:
        """The processes that it has started: the engine of an inference replica."""
        return psutil.Process(self.processes[name].pid).children(recursive=True)

    # -- how it is used -------------------------------------------------------------------------------------

    def target(self, name: str = "gateway") -> str:
        """Where it answers gRPC."""
        return self._plan.target(name)

    def http_url(self, name: str = "gateway") -> str:
        return f"{'https' if self.authority else 'http'}://{HOST}:{self._ports[f'{name} http']}"

    def metrics_url(self, name: str) -> str:
        return f"http://{HOST}:{self._ports[f'{name} metrics']}/metrics"

    @property
    def admin_key(self) -> str:
        """The administrator's key, which auth wrote at its first start."""
        return self.state.admin_key.read_text().strip()

    def bearer(self, key: str | None = None) -> list[tuple[str, str]]:
        """Metadata for a call, with the administrator's key where none is given."""
        return [("authorization", f"Bearer {key or self.admin_key}")]

    def channel(self, name: str = "gateway") -> grpc.aio.Channel:
        """A channel with no credential of a caller; it is closed at the end. Of the loop that runs now."""
        channel = readiness.open_channel(self.target(name), self._plan.certs)
        self._channels.append(channel)
        return channel

    def log(self, name: str) -> str:
        """All that the process has said, over all its lives."""
        with contextlib.suppress(FileNotFoundError):
            return (self.state.logs / f"{name}.log").read_text(errors="replace")
        return ""

    # -- its end --------------------------------------------------------------------------------------------

    async def close_channels(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    async def close(self) -> None:
        """Stops the processes in order, so that they can write what they have measured, and ends the rest."""
        try:
            await self.close_channels()
            if self._recording:
                order = sorted(self.processes, key=lambda name: name.startswith("logging"))
                await asyncio.gather(*(self.processes[name].stop(10) for name in order))
        finally:
            self.end()

    def end(self) -> None:
        """Ends every process and whatever it has left behind."""
        for process in self.processes.values():
            process.end_group()

    @property
    def _recording(self) -> bool:
        return self._measured and any(name.startswith("COVERAGE_") for name in os.environ)

    def _reserve(self, name: str) -> None:
        parts = PORTS.get(service_of(name), ("", " metrics"))
        missing = [name + part for part in parts if name + part not in self._ports]
        self._ports |= self._reservations.take(missing)

    async def __aenter__(self) -> MeshHarness:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _has_stacks(process: Process) -> bool:
    return "(most recent call first)" in process.tail(TAIL_LINES)


__all__ = ["ALL", "CannotStart", "MeshHarness"]
