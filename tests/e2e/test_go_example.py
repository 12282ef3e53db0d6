"""The example in Go: built as its folder says, against a scripted gateway and against the whole mesh."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from llmos_client import AsyncClient, ClientOptions

from deploy.dev.broker import Broker
from deploy.dev.environment import ROOT
from tests.conftest import MeshFactory
from tests.framework import scripted_gateway as script
from tests.framework.mesh import MeshHarness
from tests.framework.scripted_gateway import (
    Fail,
    Hang,
    ScriptedGateway,
    delta,
    finished,
    moved,
    started,
)
from tests.framework.waiting import eventually

SOURCES = ROOT / "clients" / "examples" / "go"
DEADLINE_S = 30.0
BUILD_TIMEOUT_S = 300.0

pytestmark = pytest.mark.skipif(shutil.which("go") is None, reason="Go is not on PATH")


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built program. It is built in a copy, so that two runs do not disturb each other."""
    root = tmp_path_factory.mktemp("go")
    folder = root / "clients" / "examples" / "go"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("bin", "gen"))
    (root / "protos").symlink_to(ROOT / "protos")
    done = subprocess.run(
        ["./build.sh"],
        cwd=folder,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "bin" / "llmos-stream"


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway() as server:
        yield server


def run(
    example: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
    return subprocess.run(
        [example, *arguments],
        env=own | (environment or {}),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_the_answer_is_on_stdout_the_facts_on_stderr(example: Path, gateway: ScriptedGateway) -> None:
    gateway.will(script.models("a"))
    gateway.will(started(), delta(1, "Blue"), moved(), delta(2, " sky"), finished())
    done = run(
        example,
        *("-target", gateway.target, "-temperature", "0", "-max-tokens", "9", "why?"),
        environment={"LLMOS_API_KEY": "llmos_secret"},
    )
    assert (done.returncode, done.stdout) == (0, "Blue sky\n")
    assert done.stderr == "usage   3 tokens of prompt, 2 of answer; ended by LENGTH\nrequest req_1\n"
    call = gateway.calls[1]
    assert call.metadata["authorization"] == "Bearer llmos_secret"
    assert (call.request.spec.model, call.request.spec.max_tokens) == ("a", 9)
    assert call.request.spec.sampling.HasField("temperature")


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ((started(), delta(1, "a"), delta(3, "c"), finished()), "delta 3 came after delta 1"),
        ((started(), delta(1, "a")), "without Finished"),
        ((delta(1, "a"), finished()), "instead of Started"),
        (
            (
                Fail(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "RATE_LIMIT",
                    message="Too much.",
                    hint="Wait.",
                    retry_after_s=1.5,
                    violations=(("spec.n", "too big"),),
                ),
            ),
            "error: Too much. Wait. (RATE_LIMIT) Try again in 1.5s. [request req_failed]\n"
            "  spec.n: too big\n",
        ),
    ],
    ids=["gap", "no-finished", "no-started", "refused"],
)
def test_what_is_not_whole_fails(
    example: Path, gateway: ScriptedGateway, steps: tuple[object, ...], told: str
) -> None:
    gateway.will(*steps)
    done = run(example, "-target", gateway.target, "-model", "a", "q")
    assert done.returncode == 1
    assert told in done.stderr


def test_wrong_use_is_2(example: Path, tmp_path: Path) -> None:
    for arguments in (
        [],
        ["-nothing", "q"],
        ["-api-key-file", str(tmp_path / "no"), "q"],
        ["-ca", "no", "q"],
    ):
        assert run(example, *arguments).returncode == 2, arguments
    done = run(example, "-target", "192.0.2.1:1", "q", environment={"LLMOS_API_KEY": "llmos_secret"})
    assert done.returncode == 2
    assert "unencrypted" in done.stderr
    assert "llmos_secret" not in done.stderr


def test_ctrl_c_cancels_the_work(example: Path, gateway: ScriptedGateway) -> None:
    gateway.will(started(), delta(1, "begun"), Hang)
    process = subprocess.Popen(
        [example, "-target", gateway.target, "-model", "a", "q"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.read(5) == b"begun"
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 130
    process.stdout.close()
    assert gateway.calls[0].ended.wait(DEADLINE_S)
    assert not gateway.calls[0].answered


async def started_mesh(mesh: MeshHarness) -> dict[str, str]:
    """Returns what a client is told, when the gateway has found its replica."""
    await mesh.start("auth", "inference", "gateway")
    certs = mesh.plan.certs
    tls = ClientOptions(
        tls_ca_file=certs / "ca.crt" if certs else None,
        tls_cert_file=certs / "client.crt" if certs else None,
        tls_key_file=certs / "client.key" if certs else None,
    )
    async with AsyncClient(mesh.target(), api_key_file=mesh.state.admin_key, **tls) as client:

        async def ready() -> bool:
            return any(model.ready for model in await client.models())

        await eventually(ready, timeout_s=DEADLINE_S, what="the model is ready")
    return mesh.plan.client_environment()


async def test_it_talks_to_the_mesh(example: Path, mesh: MeshHarness) -> None:
    environment = await started_mesh(mesh)
    done = await asyncio.to_thread(run, example, "one two three", environment=environment)
    assert (done.returncode, done.stdout) == (0, "one two three\n"), done.stderr
    assert "request req_" in done.stderr
    del environment["LLMOS_API_KEY_FILE"]
    done = await asyncio.to_thread(run, example, "one", environment=environment)
    assert done.returncode == 1
    assert "CREDENTIAL_MISSING" in done.stderr


async def test_it_talks_to_the_mesh_over_mtls(example: Path, make_mesh: MeshFactory, broker: Broker) -> None:
    mesh = make_mesh(broker, tls=True)
    environment = await started_mesh(mesh)
    done = await asyncio.to_thread(run, example, "one two", environment=environment)
    assert (done.returncode, done.stdout) == (0, "one two\n"), done.stderr
    without = {name: value for name, value in environment.items() if "_TLS_CERT" not in name}
    without = {name: value for name, value in without.items() if "_TLS_KEY" not in name}
    done = await asyncio.to_thread(run, example, "-timeout", "5s", "one", environment=without)
    assert done.returncode == 1
    assert done.stdout == ""
