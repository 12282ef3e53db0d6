"""The command `llmos`, imported once and forked for each call: starting it anew takes most of a test's time.

Run as a program it is the process that forks. It makes no channel itself, so that a fork has all of grpc to
begin with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60


class WarmCommand:
    """Use as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def __call__(
        self, *arguments: str, environment: dict[str, str], folder: Path, given: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs it with pipes' manners: no terminal anywhere."""
        with tempfile.TemporaryDirectory() as name:
            files = [str(Path(name) / stream) for stream in ("stdin", "stdout", "stderr")]
            Path(files[0]).write_text(given)
            wanted = {
                "arguments": arguments,
                "environment": environment,
                "folder": str(folder),
                "files": files,
            }
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(wanted) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            out, err = (Path(file).read_text() for file in files[1:])
        return subprocess.CompletedProcess(arguments, code, out, err)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def _serve() -> None:
    from llmos_client.cli import main

    for line in iter(sys.stdin.readline, ""):
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_run(main, wanted))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(main: Any, wanted: dict[str, Any]) -> int:
    import signal

    signal.alarm(DEADLINE_S)
    for descriptor, file in enumerate(wanted["files"]):
        opened = os.open(file, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(wanted["environment"], GRPC_VERBOSITY="NONE")
    os.chdir(wanted["folder"])
    sys.argv = ["llmos", *wanted["arguments"]]
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    _serve()
