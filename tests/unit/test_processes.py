"""Child processes: their output, their end, and that none outlives the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy.dev.processes import Process
from tests.framework.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
SLEEPER = "import time; print('up', flush=True); time.sleep(60)"


def process(tmp_path: Path, code: str, name: str = "child") -> Process:
    return Process(
        name,
        [sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"]},
        cwd=tmp_path,
        log_file=tmp_path / "child.log",
    )


async def test_keeps_the_output_and_the_exit_code(tmp_path: Path) -> None:
    child = process(tmp_path, "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)")
    child.start()
    assert await child.wait_ended(10) == 3
    child.end_group()
    assert set(child.tail().splitlines()) == {"one", "two"}
    assert "one" in child.log_file.read_text()
    assert not child.running


async def test_stops_with_sigterm_and_then_sigkill(tmp_path: Path) -> None:
    polite = process(tmp_path, SLEEPER)
    polite.start()
    await eventually(lambda: "up" in polite.tail())
    assert await polite.stop(10) == -signal.SIGTERM

    deaf = process(tmp_path, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER)
    deaf.start()
    await eventually(lambda: "up" in deaf.tail())
    assert await deaf.stop(0.1) == -signal.SIGKILL


async def test_can_be_started_again(tmp_path: Path) -> None:
    child = process(tmp_path, SLEEPER)
    child.start()
    first = child.pid
    child.kill()
    assert child.exit_code == -signal.SIGKILL
    child.start()
    assert child.running
    assert child.pid != first
    child.end_group()


async def test_ends_what_is_left_of_the_group(tmp_path: Path) -> None:
    grandchild = f"subprocess.Popen([sys.executable, '-c', {SLEEPER!r}])"
    child = process(tmp_path, f"import subprocess, sys; print('pid', {grandchild}.pid, flush=True)")
    child.start()
    await child.wait_ended(10)
    await eventually(lambda: "pid" in child.tail())
    pid = int(child.tail().split("pid ")[1].split()[0])
    assert psutil.pid_exists(pid)
    child.end_group()
    await eventually(lambda: not _runs(pid))


async def test_none_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib, time
from deploy.dev.processes import Process
child = Process("child", [sys.executable, "-c", {SLEEPER!r}], env={{}}, cwd=pathlib.Path("/"),
                log_file=pathlib.Path({str(tmp_path)!r}) / "log")
child.start()
print(child.pid, flush=True)
time.sleep(60)
"""
    supervisor = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert supervisor.stdout is not None
    pid = int(supervisor.stdout.readline())
    assert _runs(pid)
    supervisor.kill()
    supervisor.communicate(timeout=10)
    await eventually(lambda: not _runs(pid))


def test_is_started_once(tmp_path: Path) -> None:
    child = process(tmp_path, SLEEPER)
    child.start()
    with pytest.raises(RuntimeError, match="runs already"):
        child.start()
    child.end_group()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
