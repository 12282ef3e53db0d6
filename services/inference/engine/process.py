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
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._logs = asyncio.create_task(self._forward_output(), name="engine-output")

    @classmethod
    async def spawn(cls, environment: Mapping[str, str]) -> EngineProcess:
        """Starts the child. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                CHILD_MODULE,
                str(theirs.fileno()),
                str(os.getpid()),
                cwd=ROOT,
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

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
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    async def close(self) -> str:
        """Ends the child and tells how it ended. The end of the socket asks it to; SIGKILL makes it."""
        self._writer.close()
        try:
            async with asyncio.timeout(EXIT_GRACE_S):
                status = await self._process.wait()
        except TimeoutError:
            self.kill()
            status = await self._process.wait()
        finally:
            # A grandchild may hold the pipe; its output is not waited for.
            self.kill()
            await asyncio.wait((self._logs,), timeout=EXIT_GRACE_S)
            self._logs.cancel()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    async def _forward_output(self) -> None:
        """What the child prints, line by line, into our log."""
        stream = self._process.stdout
        if stream is None:
            return
        rest = b""
        while chunk := await stream.read(MAX_LOG_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._log(line)
            if len(rest) > MAX_LOG_LINE_BYTES:
                self._log(rest)
                rest = b""
        self._log(rest)

    def _log(self, line: bytes) -> None:
        if line.strip():
            level = _LEVELS.get(line.split(b" ", 1)[0], logging.INFO)
            child_logger.log(level, "%s", line.decode(errors="replace").rstrip())
