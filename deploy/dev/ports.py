"""Ports: which the development mesh uses, whether they are free, and free ones for tests."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping
from pathlib import Path

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


def free_ports(names: list[str]) -> dict[str, int]:
    """A free port for each name, outside the range from which outgoing connections are given theirs.

    Another process may still take one between this call and its use: whoever starts a server there tries
    again with others. Servers that can bind port 0 and tell should do that instead.
    """
    highest = _lowest_ephemeral() - 1
    chosen: dict[str, int] = {}
    for _ in range(10_000):
        if len(chosen) == len(names):
            return chosen
        port = random.randint(LOWEST_FREE, highest)
        if port not in chosen.values() and is_free(port):
            chosen[names[len(chosen)]] = port
    raise CannotStart(f"No free port was found between {LOWEST_FREE} and {highest}.")


def _lowest_ephemeral() -> int:
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 32_768
    return lowest if lowest > LOWEST_FREE + 1000 else 32_768
