"""The official `openai` packages, for Python and for Node, against the gateway as a real process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from llmos.auth.v1 import admin_service_pb2, admin_service_pb2_grpc, resource_pb2

from deploy.dev.environment import ROOT
from deploy.dev.ports import PortReservations
from tests.framework import openai_cases
from tests.framework.mesh import MeshHarness
from tests.framework.node_packages import NodeUnavailable, installed
from tests.framework.openai_cases import complaints
from tests.framework.waiting import eventually

HERE = Path(__file__).parent
NODE_FOLDER = HERE / "openai_clients"
GUIDE = ROOT / "docs" / "callers.md"
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
async def mesh(
    tmp_path_factory: pytest.TempPathFactory, reservations: PortReservations
) -> AsyncIterator[MeshHarness]:
    """Without a broker: the audit spool keeps what happened."""
    async with MeshHarness(tmp_path_factory.mktemp("openai"), None, reservations) as mesh:
        await mesh.start("auth", "inference", "gateway")
        yield mesh


def node_folder() -> Path:
    """The folder with the package in it; skips where that cannot be had."""
    try:
        return installed(NODE_FOLDER)
    except NodeUnavailable as error:
        pytest.skip(str(error))


async def run(command: list[str], folder: Path, env: dict[str, str], given: str = "") -> str:
    """What it prints. Fails with what it says on stderr."""
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        cwd=folder,
        env=env,
        input=given,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def caller(mesh: MeshHarness) -> dict[str, str]:
    """The environment that the guide's first block makes, of this mesh."""
    own: dict[str, Any] = {
        "LLMOS_URL": mesh.http_url(),
        "LLMOS_TARGET": mesh.target(),
        "LLMOS_API_KEY": mesh.admin_key,
        "LLMOS_MODEL": "echo",
    }
    return {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")} | own


async def test_the_guides_commands_in_a_shell(mesh: MeshHarness, tmp_path: Path) -> None:
    first, *others = blocks("sh")
    for name in ("LLMOS_URL", "LLMOS_TARGET", "LLMOS_API_KEY", "LLMOS_MODEL"):
        assert f"{name}=" in first
    for block in others:
        said = await run(["sh", "-euc", block], tmp_path, caller(mesh))
        assert '_error"' not in said
        # one of the answer of each command
        for word in ("chat.completion", "response.completed", "text_completion", "openapi", "sky"):
            assert word in said


async def test_the_guides_programs_in_python(mesh: MeshHarness, tmp_path: Path) -> None:
    for block in blocks("python"):
        assert "sky" in await run([sys.executable, "-c", block], tmp_path, caller(mesh))


async def test_the_guides_program_in_node(mesh: MeshHarness) -> None:
    folder = node_folder()
    for block in blocks("js"):
        command = ["node", "--input-type=module", "-e", block]
        assert "sky" in await run(command, folder, caller(mesh))


async def keys_of(mesh: MeshHarness) -> dict[str, str]:
    """Keys by the names that cases know."""
    stub = admin_service_pb2_grpc.AdminServiceStub(mesh.channel())
    auditor = resource_pb2.Client(id="auditor", tenant_id="default", roles=["auditor"])
    secret = ""
    for resource in (
        resource_pb2.Resource(client=auditor),
        resource_pb2.Resource(api_key=resource_pb2.ApiKey(client_id="auditor")),
    ):
        request = admin_service_pb2.CreateResourceRequest(resource=resource)
        secret = (await stub.CreateResource(request, metadata=mesh.bearer())).secret
    return {"admin": mesh.admin_key, "bad": "llmos_nonsense", "auditor": secret}


async def running(mesh: MeshHarness) -> float:
    """How many calls the gateway serves now that generate."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(mesh.metrics_url("gateway"))).text
    found = re.findall(r"^llmos_calls_running\{.*GenerationService.*\} ([\d.e+]+)$", text, re.MULTILINE)
    assert found
    return sum(map(float, found))


async def judge(mesh: MeshHarness, cases: list[Any], seen: list[Any]) -> None:
    """Each case as it was expected, and nothing that goes on for a caller who has left."""
    wrong = {one["name"]: complaints(one, each) for one, each in zip(cases, seen, strict=True)}
    told = [f"{name}: {'; '.join(said)}" for name, said in wrong.items() if said]
    assert not told, "\n".join(told)

    async def idle() -> bool:
        return await running(mesh) == 0

    await eventually(idle, timeout_s=5, what="what was abandoned has ended")


@pytest.fixture(scope="module")
async def keys(mesh: MeshHarness) -> dict[str, str]:
    return await keys_of(mesh)


@pytest.fixture
async def engine(mesh: MeshHarness) -> None:
    """There is one, also after cases in which it was lost."""
    request = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
    headers = {"authorization": f"Bearer {mesh.admin_key}"}

    async def answers() -> bool:
        async with httpx.AsyncClient() as http:
            url = f"{mesh.http_url()}/v1/chat/completions"
            return (await http.post(url, json=request, headers=headers)).status_code == 200

    await eventually(answers, timeout_s=10, what="the gateway has its engine")


@pytest.mark.usefixtures("engine")
async def test_the_package_for_python(mesh: MeshHarness, keys: dict[str, str]) -> None:
    cases = openai_cases.cases()
    assert len(cases) >= 60
    await judge(mesh, cases, [await openai_cases.observe(one, mesh.http_url(), keys) for one in cases])


@pytest.mark.usefixtures("engine")
async def test_the_package_for_node(mesh: MeshHarness, keys: dict[str, str]) -> None:
    cases = openai_cases.cases()
    given = json.dumps({"url": mesh.http_url(), "keys": keys, "cases": cases})
    said = await run(["node", "client.mjs"], node_folder(), dict(os.environ), given)
    await judge(mesh, cases, [json.loads(line) for line in said.splitlines()])
