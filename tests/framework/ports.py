"""Ports that no other test run on this machine is given meanwhile."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

from deploy.dev import ports


class PortReservations:
    """Hands out free ports and keeps other runs away from them until `release` or the end of the process.

    A service under test is restarted on its port, so the port must stay its own while nobody listens there.
    They lie outside the range of outgoing connections, which could take one at any moment.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir()) / f"llmos-test-ports-{os.getuid()}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._held: list[IO[str]] = []

    def take(self, names: list[str]) -> dict[str, int]:
        """A port for each name."""
        return {name: self._take_one(name) for name in names}

    def release(self) -> None:
        for file in self._held:
            file.close()
        self._held.clear()

    def _take_one(self, name: str) -> int:
        for _ in range(1000):
            port = ports.free_ports([name])[name]
            file = (self._folder / str(port)).open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            self._held.append(file)
            return port
        raise RuntimeError("no port is left")
