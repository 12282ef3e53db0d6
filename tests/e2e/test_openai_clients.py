"""The official `openai` packages, for Python and for Node, against the gateway as a real process."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deploy.dev.environment import ROOT
from tests.framework.mesh import MeshHarness
from tests.framework.node_packages import NodeUnavailable, installed
from tests.framework.ports import PortReservations

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
