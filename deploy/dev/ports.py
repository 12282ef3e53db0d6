"""Ports: which the development mesh uses, whether they are free, and free ones that stay one's own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from deploy.dev.state import CannotStart

HOST = "127.0.0.1"
DEFAULTS = {
    "gateway": 50050,
    "gateway http": 8080,
    "auth": 50051,
    "inference": 50052,
    "logging": 50053,
    "gateway metrics": 51050,
    "auth metrics": 51051,
    "inference metrics": 51052,
    "logging metrics": 51053,
    "kafka": 50092,
    "kafka controller": 50093,
}
LOWEST_FREE = 20_000


def with_offset(offset: int) -> dict[str, int]:
    """The default ports, each moved by `offset`."""
    return {name: port + offset for name, port in DEFAULTS.items()}


def is_free(port: int) -> bool:
    """Whether nobody listens there. Connections that are fading out (TIME_WAIT) do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def require_free(ports: Mapping[str, int]) -> None:
    """Raises CannotStart with a sentence that names each port in use and who wants it."""
    used = [f"{port} ({name})" for name, port in ports.items() if not is_free(port)]
    if used:
        raise CannotStart(
            f"In use by another program: port {', '.join(used)}. End that program, or use other ports:"
            " `make up ARGS='--port-offset 1000'`."
        )


class PortReservations:
    """Hands out free ports and keeps this user's other meshes and test runs away from them until `release` or
    the end of the process.

    Between the choice of a port and its use lie seconds: a broker's start, a service's restart. Whoever chose
    by looking alone could be given the same one meanwhile. They lie outside the range from which outgoing
    connections are given theirs, which could take one at any moment.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir()) / f"llmos-ports-{os.getuid()}"
        self._held: list[IO[str]] = []

    def take(self, names: Sequence[str]) -> dict[str, int]:
        """A port for each name. Raises CannotStart where none is free, or the folder of the marks is somebody
        else's."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._folder.is_symlink() or self._folder.stat().st_uid != os.getuid():
            raise CannotStart(
                f"{self._folder} is not yours: remove it, or set TMPDIR to a folder of your own."
            )
        return {name: self._take_one() for name in names}

    def release(self) -> None:
        for mark in self._held:
            mark.close()
        self._held.clear()

    def _take_one(self) -> int:
        highest = _lowest_ephemeral() - 1
        for _ in range(10_000):
            port = random.randint(LOWEST_FREE, highest)
            mark = (self._folder / str(port)).open("w")
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_free(port):
                    self._held.append(mark)
                    return port
            mark.close()
        raise CannotStart(f"No free port was found between {LOWEST_FREE} and {highest}.")


def _lowest_ephemeral() -> int:
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 32_768
    return lowest if lowest > LOWEST_FREE + 1000 else 32_768
