"""Runs the commands of a guide, as its reader would."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tests.framework.mesh import MeshHarness

ROOT = Path(__file__).resolve().parents[2]
COMMANDS_S = 60
PROGRAMS = Path(sys.executable).parent
"""`llmos` and `python`, for who has not activated the environment."""


async def run(mesh: MeshHarness, script: str) -> str:
    """What the commands print."""
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        f"set -e -o pipefail\n{script}",
        env={**os.environ, **mesh.plan.client_environment(), "PATH": f"{PROGRAMS}:{os.environ['PATH']}"},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(COMMANDS_S):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()
