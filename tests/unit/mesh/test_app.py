"""What `services.mesh.app` does with any service: settings, start, drain, exit code."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.mesh.settings import describe
from tests.framework.tiny_service import TinySettings


async def spawn(tmp: Path, *args: str, **environment: str) -> asyncio.subprocess.Process:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LLMOS_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.framework.tiny_service",
        *args,
        env=clean | {"LLMOS_TINY_STATE_DIR": str(tmp / "state")} | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def line_with(stream: asyncio.StreamReader | None, text: str) -> str:
    assert stream is not None
    async with asyncio.timeout(20):
        while line := (await stream.readline()).decode():
            if text in line:
                return line
    raise AssertionError(f"the process ended without a line with {text!r}")


async def end(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_check_prints_the_settings_and_starts_nothing(tmp_path: Path) -> None:
    code, out, _ = await end(await spawn(tmp_path, "--check"))
    assert code == 0
    assert "LLMOS_TINY_LISTEN_HOST = 127.0.0.1" in out
    assert not (tmp_path / "state").exists()


async def test_settings_that_are_not_usable_are_named(tmp_path: Path) -> None:
    process = await spawn(tmp_path, LLMOS_TINY_GRPC_PORT="a door", LLMOS_TINY_LOG_LEVEL="loud")
    code, _, err = await end(process)
    assert code == 2
    assert "LLMOS_TINY_GRPC_PORT: Input should be a valid integer" in err
    assert "LLMOS_TINY_LOG_LEVEL" in err
    assert "Traceback" not in err


async def test_r33_beyond_loopback_it_needs_tls(tmp_path: Path) -> None:
    code, _, err = await end(await spawn(tmp_path, LLMOS_TINY_LISTEN_HOST="0.0.0.0"))
    assert code == 2
    assert "configure TLS" in err


async def test_a_service_that_cannot_start_says_what_to_do(tmp_path: Path) -> None:
    code, _, err = await end(await spawn(tmp_path, LLMOS_TINY_REFUSE="make the keys first"))
    assert code == 1
    assert "make the keys first" in err
    assert "Traceback" not in err


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    code, out, err = await end(await spawn(tmp_path, LLMOS_TINY_GRPC_PORT=str(port)))
    listener.close()
    assert code == 1
    assert f"127.0.0.1:{port}" in err
    assert "two stopped\none stopped" in out


async def test_it_starts_tells_its_ports_and_drains_in_order(tmp_path: Path) -> None:
    process = await spawn(tmp_path, LLMOS_TINY_DRAIN_DELAY_S="0.3")
    await line_with(process.stderr, "listens")
    ports = json.loads((tmp_path / "state" / "ports.json").read_text())
    assert ports["pid"] == process.pid
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{ports['grpc']}") as channel,
        grpc.aio.insecure_channel(f"127.0.0.1:{ports['probe']}") as probe,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        answer = await health_pb2_grpc.HealthStub(probe).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        code, out, _ = await end(process)
    assert code == 0
    assert out.split("\n")[:4] == ["one started", "two started", "two stopped", "one stopped"]


def test_secrets_are_hidden(tmp_path: Path) -> None:
    from pydantic import SecretStr

    class WithSecret(TinySettings):
        password: SecretStr = SecretStr("hunter2")

    shown = "\n".join(describe(WithSecret(state_dir=tmp_path)))
    assert "PASSWORD = (hidden)" in shown
    assert "hunter2" not in shown
