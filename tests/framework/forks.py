"""Services of a mesh as forks of processes that have imported them: a start without the second of imports.

What runs is what `python -m services.X` runs, in a process of its own with the same environment. Tests of the
local mesh, of the chart and of what `bench` measures start services as everybody does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress

from deploy.dev.environment import PASSED_ON, ROOT
from deploy.dev.processes import GUARD

MAX_MESSAGE_BYTES = 64 * 1024
STATUS = struct.Struct("i")
"""Of a fork's two messages: its process id, and later how it ended."""
COLLECT = signal.SIGUSR2
"""Makes a fork collect its garbage, so that a test sees what is really held."""
STACKS = signal.SIGQUIT
"""Makes a fork write the stacks of its threads and of its tasks into its log, and go on."""
SUPPORTED = sys.platform == "linux"


class Forks:
    """One server for each service that is asked for, until `close`."""

    def __init__(self) -> None:
        self._servers: dict[str, tuple[subprocess.Popen[bytes], socket.socket]] = {}

    def prepare(self, services: Iterable[str]) -> None:
        """Starts the servers of services that have none, and does not wait."""
        for service in services:
            if service in self._servers:
                continue
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            optimised = ["-O"] if sys.flags.optimize else []
            with theirs:
                command = [*optimised, "-m", "tests.framework.fork_server", service, str(theirs.fileno())]
                server = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), sys.executable, *command],
                    cwd=ROOT,
                    env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self._servers[service] = server, ours

    def start(self, service: str, environment: Mapping[str, str]) -> Fork:
        """`environment` is all that it gets. Raises OSError where the server has ended."""
        self.prepare([service])
        link = self._servers[service][1]
        output, their_output = os.pipe()
        status, their_status = socket.socketpair()
        try:
            with their_status:
                message = json.dumps(dict(environment)).encode()
                socket.send_fds(link, [message], [their_output, their_status.fileno()])
        finally:
            os.close(their_output)
        return Fork(output, status)

    def close(self) -> None:
        """Ends the servers, and with them what they have forked."""
        for server, link in self._servers.values():
            link.close()
            server.wait()
        self._servers.clear()


class Fork:
    """A child of a server, with what `Process` needs of a Popen."""

    def __init__(self, output: int, status: socket.socket) -> None:
        self.stdout = os.fdopen(output, "rb")
        self._status = status
        self.returncode: int | None = None
        told = status.recv(STATUS.size)
        if not told:
            raise OSError("the server of forks has ended; its output says why")
        self.pid: int = STATUS.unpack(told)[0]

    def wait(self) -> int:
        with self._status:
            told = self._status.recv(STATUS.size)
        # without a word the server was killed, and the kernel has ended its children
        self.returncode = STATUS.unpack(told)[0] if told else -signal.SIGKILL
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
