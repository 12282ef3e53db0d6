"""The parent's end of the engine's process: start it, talk frames with it, take its output, end it.

The process is started anew (never forked from this one with its threads), in a session of its own, so that a
Ctrl-C at the terminal reaches the service only. It gets one socket and an environment without our settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import services
from services.inference.engine import frames

child_logger = logging.getLogger("services.inference.engine.child")

CHILD_MODULE = "services.inference.engine.child"
ROOT = Path(next(iter(services.__path__))).resolve().parent
"""Where `python -m services…` works."""
MAX_LOG_LINE_BYTES = 8192
EXIT_GRACE_S = 2.0
_LEVELS = {b"WARNING": logging.WARNING, b"ERROR": logging.ERROR, b"CRITICAL": logging.ERROR}


class EngineProcess:
    """One life of the child."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        output: asyncio.Task[None],
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._output = output

    @classmethod
    async def spawn(cls, environment: Mapping[str, str]) -> EngineProcess:
        """Starts the child. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        output, their_output = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs, their_output:
            try:
                process = _start(theirs, their_output, environment)
            except BaseException:
                ours.close()
                output.close()
                raise
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        forward = asyncio.create_task(_forward(output), name="engine-output")
        return cls(process, reader, writer, forward)

    @property
    def pid(self) -> int:
        return self._process.pid

    def post(self, frame: frames.Frame) -> None:
        """Sends without waiting. Nothing happens where the child is gone: `receive` tells that."""
        if not self._writer.is_closing():
            self._writer.write(frames.encode(frame))

    async def receive(self) -> frames.Report | None:
        """The next report; None when the child is gone. Raises FrameError."""
        try:
            header = await self._reader.readexactly(frames.HEADER.size)
            body = await self._reader.readexactly(frames.body_bytes(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return frames.decode_report(body)

    def kill(self) -> None:
        self._process.kill()

    async def close(self) -> str:
        """Ends the child and tells how it ended. The end of the socket asks it to; SIGKILL makes it."""
        self._writer.close()
        try:
            status = await asyncio.to_thread(self._process.wait, EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            status = await asyncio.to_thread(self._process.wait)
        finally:
            self.kill()
            # A grandchild may hold the other end; its output is not waited for.
            await asyncio.wait((self._output,), timeout=EXIT_GRACE_S)
            self._output.cancel()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _start(
    link: socket.socket, output: socket.socket, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """By vfork, in milliseconds. asyncio's own way forks under uvloop, which runs gRPC's fork handlers."""
    return subprocess.Popen(
        [sys.executable, "-m", CHILD_MODULE, str(link.fileno()), str(os.getpid())],
        cwd=ROOT,
        env=dict(environment),
        pass_fds=(link.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=output.fileno(),
        stderr=output.fileno(),
        start_new_session=True,
    )


async def _forward(output: socket.socket) -> None:
    """What the child prints, line by line, into our log."""
    reader, writer = await asyncio.open_unix_connection(sock=output)
    rest = b""
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        while chunk := await reader.read(MAX_LOG_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                _log(line)
            if len(rest) > MAX_LOG_LINE_BYTES:
                _log(rest)
                rest = b""
    _log(rest)


def _log(line: bytes) -> None:
    if line.strip():
        level = _LEVELS.get(line.split(b" ", 1)[0], logging.INFO)
        child_logger.log(level, "%s", line.decode(errors="replace").rstrip())
