"""What the subjects of `make bench-gateway` have in common: the load before them, the echo behind them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from deploy.dev.environment import ROOT
from deploy.dev.ports import HOST, PortReservations
from deploy.dev.processes import Process
from tests.bench.gateway_load import MODEL, Job, Target
from tests.bench.subject import send
from tests.bench.work import CannotMeasure

START_TIMEOUT_S = 120.0


class Load:
    """The process that sends requests."""

    def __init__(self, log_file: Path) -> None:
        self._log_file = log_file
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.bench.gateway_load"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
            )

    async def run(self, job: Job) -> dict[str, Any]:
        """Raises CannotMeasure where a request fails."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(job.line())
        line = await self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._log_file.read_text()[-2000:]}
        if "error" in answer:
            raise CannotMeasure(f"{job.target.protocol} {job.target.address}: {answer['error']}")
        return answer

    async def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


class Subject:
    """A gateway that runs. Who derives from it says what is asked, and what stands behind it."""

    name: str
    process: Process
    light_model = MODEL
    """What is asked for where as little as can be shall stand behind."""

    async def start(self) -> None:
        """Returns when it answers. Raises CannotMeasure."""
        raise NotImplementedError

    async def target(self) -> Target:
        raise NotImplementedError

    async def behind(self) -> Target:
        """The upstream, asked directly."""
        raise NotImplementedError

    def processes(self) -> dict[str, psutil.Process]:
        if not self.process.running:
            return {}
        first = psutil.Process(self.process.pid)
        return {str(each.pid): each for each in (first, *first.children(recursive=True))}

    def rest(self) -> None:
        """Takes no CPU until `wake`."""
        send(self.processes(), signal.SIGSTOP)

    def wake(self) -> None:
        send(self.processes(), signal.SIGCONT)

    async def stop(self) -> None:
        self.wake()
        await self.process.stop(10)


class Upstream:
    """An echo behind the gateways of others."""

    def __init__(self, protocol: str, ports: PortReservations, folder: Path) -> None:
        port = ports.take([f"upstream {protocol}"])[f"upstream {protocol}"]
        self.target = Target(protocol, f"{HOST}:{port}")
        self._process = Process(
            f"upstream-{protocol}",
            [sys.executable, "-m", "tests.bench.gateway_upstream", protocol, str(port)],
            env=os.environ,
            cwd=ROOT,
            log_file=folder / f"upstream-{protocol}.log",
        )

    async def start(self) -> None:
        self._process.start()
        await listening(self._process, self.target.address)

    async def stop(self) -> None:
        self._process.end_group()


async def listening(process: Process, address: str) -> None:
    """Returns when somebody accepts connections there. Raises CannotMeasure."""
    host, _, port = address.rpartition(":")
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.running:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            return
        await asyncio.sleep(0.05)
    raise CannotMeasure(f"{process.name} does not start. Its last lines:\n{process.tail(15)}")
