"""A subject that works in a process of its own and is asked through pipes, one JSON line each way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from deploy.dev.environment import ROOT
from deploy.dev.processes import GUARD
from tests.bench.subject import send
from tests.bench.work import CannotMeasure, Stream, Work

LINE_BYTES = 16 * 1024 * 1024
TIMEOUT_S = 300.0


class Piped:
    """A `Subject`: the worker and the pipes to it. It answers static batches; the times are the worker's."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        """`command`: of Python, from `-m` on."""
        self.name = name
        self._command, self._env = command, env
        self._process: asyncio.subprocess.Process | None = None
        self.chosen: dict[str, Any] = {}
        """What the worker says of itself first."""

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            # Ends with this process, even while it is stopped.
            *(sys.executable, "-I", "-S", str(GUARD), str(os.getpid())),
            *(sys.executable, *self._command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=dict(os.environ) | dict(self._env),
            limit=LINE_BYTES,
        )
        self.chosen = await self._receive()

    def prompts(self, work: Work) -> Sequence[Any]:
        """As the worker wants them."""
        return work.prompts

    async def answer(self, work: Work) -> list[Stream]:
        assert self._process is not None
        assert self._process.stdin is not None
        request = json.dumps({"prompts": self.prompts(work), "max_tokens": work.max_tokens})
        self._process.stdin.write(request.encode() + b"\n")
        found = await self._receive()
        first_s, last_s = found["first_s"], found["last_s"]
        return [Stream(first_s, last_s, len(ids), tuple(ids)) for ids in found["token_ids"]]

    async def _receive(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), TIMEOUT_S)
        except TimeoutError:
            line = b""
        if not line:
            raise CannotMeasure(f"{self.name} gave no answer within {TIMEOUT_S:.0f} s, or has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def processes(self) -> Mapping[str, psutil.Process]:
        return {} if self._process is None else {self.name: psutil.Process(self._process.pid)}

    def rest(self) -> None:
        send(self.processes(), signal.SIGSTOP)

    def wake(self) -> None:
        send(self.processes(), signal.SIGCONT)

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
