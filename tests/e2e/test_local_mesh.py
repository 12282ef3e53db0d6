"""`python -m deploy.dev`: what stands behind `make up`, `make demo`, `make down` and `make chat`."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.dev.broker import Broker
from deploy.dev.environment import ROOT
from deploy.dev.processes import Process
from tests.framework import broker as brokers
from tests.framework.mesh import DEFAULTS
from tests.framework.waiting import eventually

READY = "The mesh is ready."
START_TIMEOUT_S = 120.0


class LocalMesh:
    """The command, in a state folder of its own, on moved ports."""

    def __init__(self, folder: Path, broker: Broker | None) -> None:
        self.state = folder / "state"
        self._folder = folder
        self._env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("LLMOS_") and name != "PYTHONPATH"
        }
        self._env |= DEFAULTS | {"LLMOS_KAFKA_DIST": str(brokers.dist()), "PYTHONUNBUFFERED": "1"}
        if broker is not None:
            self._env["LLMOS_KAFKA_BOOTSTRAP_SERVERS"] = broker.bootstrap
            # One broker, several meshes: each has topics of its own.
            for service in ("GATEWAY", "LOGGING"):
                self._env[f"LLMOS_{service}_KAFKA_TOPIC_PREFIX"] = f"local-{secrets.token_hex(4)}"
        self.started: list[Process] = []

    def command(self, *arguments: str) -> Process:
        process = Process(
            f"deploy.dev {arguments[0]}",
            [sys.executable, "-m", "deploy.dev", "--state", str(self.state), *arguments],
            env=self._env,
            cwd=ROOT,
            log_file=self._folder / f"{len(self.started)}-{arguments[0]}.log",
        )
        self.started.append(process)
        process.start()
        return process

    async def up(self, *arguments: str) -> Process:
        """Returns when it says that it is ready."""
        mesh = self.command("up", "--quiet", "--free-ports", *arguments)
        await eventually(
            lambda: READY in mesh.tail() or not mesh.running, timeout_s=START_TIMEOUT_S, what="ready"
        )
        assert mesh.running, mesh.tail()
        return mesh

    async def client(self, *arguments: str) -> str:
        process = self.command("client", "--", *arguments)
        code = await process.wait_ended(60)
        process.end_group()
        assert code == 0, process.tail()
        return process.tail()

    def processes(self) -> dict[str, psutil.Process]:
        record = json.loads((self.state / "run" / "mesh.json").read_text())
        return {name: psutil.Process(entry["pid"]) for name, entry in record.items()}


@pytest.fixture
def local_mesh(tmp_path: Path, broker: Broker) -> Iterator[LocalMesh]:
    mesh = LocalMesh(tmp_path, broker)
    yield mesh
    for process in mesh.started:
        process.end_group()


def _gone(processes: dict[str, psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != "zombie" for process in processes.values())


async def test_up_answers_refuses_a_second_and_drains_in_order(local_mesh: LocalMesh) -> None:
    mesh = await local_mesh.up()
    processes = local_mesh.processes()
    assert set(processes) == {"mesh", "auth", "logging", "inference", "gateway"}
    assert "echo" in await local_mesh.client("models")

    second = local_mesh.command("up", "--quiet", "--free-ports")
    assert await second.wait_ended(30) == 2
    second.end_group()
    assert "runs already" in second.tail()

    mesh.signal(signal.SIGINT)
    assert await mesh.wait_ended(60) == 0
    mesh.end_group()
    drained = [line.split()[0] for line in mesh.tail().splitlines() if line.endswith("drains")]
    assert drained == ["gateway", "inference", "auth", "logging"]
    assert _gone(processes)


async def test_a_crashed_service_is_named_and_ends_the_mesh(local_mesh: LocalMesh) -> None:
    mesh = await local_mesh.up()
    processes = local_mesh.processes()
    processes["logging"].kill()
    assert await mesh.wait_ended(60) == 1
    mesh.end_group()
    assert "logging ended with exit code -9; the mesh stops." in mesh.tail()
    assert _gone(processes)


async def test_a_killed_mesh_leaves_no_process_and_can_be_started_again(local_mesh: LocalMesh) -> None:
    mesh = await local_mesh.up()
    processes = local_mesh.processes()
    mesh.kill()
    await eventually(lambda: _gone(processes))
    again = await local_mesh.up()
    again.signal(signal.SIGTERM)
    assert await again.wait_ended(60) == 0


async def test_up_with_mtls_and_down_stops_it(local_mesh: LocalMesh) -> None:
    mesh = await local_mesh.up("--tls")
    processes = local_mesh.processes()
    assert "echo" in await local_mesh.client("models")
    down = local_mesh.command("down")
    assert await down.wait_ended(60) == 0
    assert await mesh.wait_ended(10) == 0
    assert _gone(processes)


async def test_demo_shows_the_audit_record_and_starts_its_own_broker(tmp_path: Path) -> None:
    mesh = LocalMesh(tmp_path, None)
    demo = mesh.command("demo")
    try:
        code = await demo.wait_ended(START_TIMEOUT_S)
    finally:
        demo.end_group()
    assert code == 0, demo.tail()
    shown = dict(line.split(maxsplit=1) for line in demo.tail().splitlines() if len(line.split()) > 1)
    assert shown["request_id"] == demo.tail().split("request id  ")[1].split()[0]
    assert shown["trace_id"] == demo.tail().split("trace id    ")[1].split()[0]
    assert shown["outcome"] == "succeeded"
    assert not (tmp_path / "state" / "demo" / "run" / "mesh.json").exists()
