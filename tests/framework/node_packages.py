"""Packages of Node that a test needs: installed once for each lock, beside the other tools."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

from deploy.dev.environment import ROOT

INSTALL_TIMEOUT_S = 120.0
FILES = ("package.json", "package-lock.json")


class NodeUnavailable(Exception):
    """Says in a sentence what is missing; a reason to skip."""


def installed(source: Path) -> Path:
    """A copy of the folder `source` with the packages of its lock in it.

    Raises NodeUnavailable where there is no node or npm, or the packages cannot be had.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NodeUnavailable(f"{program} is not on PATH.")
    digest = hashlib.sha256(b"".join((source / name).read_bytes() for name in FILES)).hexdigest()
    folder = ROOT / ".tools" / "node" / f"{source.name}-{digest[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        done = folder / ".installed"
        if not done.exists():
            _install(source, folder)
            done.touch()
        for file in source.iterdir():
            if file.is_file():
                shutil.copy2(file, folder)
    return folder


def _install(source: Path, folder: Path) -> None:
    for name in FILES:
        shutil.copy2(source / name, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, timeout=INSTALL_TIMEOUT_S, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        raise NodeUnavailable(
            f"The packages of {source.name} cannot be installed ({type(error).__name__})."
        ) from None
