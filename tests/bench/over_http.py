"""What the servers have in common: a process of their own, readiness, streams over HTTP, rest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import psutil

from deploy.dev.environment import ROOT
from deploy.dev.ports import HOST
from deploy.dev.processes import Process
from tests.bench import events
from tests.bench.subject import send
from tests.bench.work import CannotMeasure, Stream, Work

START_TIMEOUT_S = 600.0
TIMEOUT_S = 300.0


class OverHttp(ABC):
    """A `Subject`; who derives from it says what is asked, and what an answer is."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        port: int,
        log_file: Path,
        label: str,
    ) -> None:
        """`label`: of its processes, in the table of CPU seconds."""
        self.name = name
        self._port = port
        self._label = label
        self._process = Process(name, command, env=dict(os.environ) | dict(env), cwd=ROOT, log_file=log_file)

    async def start(self) -> None:
        self._process.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{self._port}", trust_env=False) as client:
            while time.monotonic() < deadline and self._process.running:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health", timeout=5)).status_code == 200:
                        return
                await asyncio.sleep(0.25)
        raise CannotMeasure(f"{self.name} does not start. Its last lines:\n{self._process.tail(15)}")

    async def answer(self, work: Work) -> list[Stream]:
        bodies = [self.body(prompt, work.max_tokens) for prompt in work.prompts]
        due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._timed(body, due_s)) for body in bodies]
        return [task.result() for task in tasks]

    async def ask(self, prompt: str, max_tokens: int, due_s: float) -> Stream:
        """One request; times count from `due_s` of time.perf_counter. Raises CannotMeasure."""
        return await self._timed(self.body(prompt, max_tokens), due_s)

    @abstractmethod
    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Of the request: greedy, past the end of sequence, streaming."""

    @abstractmethod
    async def stream(self, body: Mapping[str, Any], due_s: float) -> Stream:
        """Sends it, and times the answer. Raises CannotMeasure, or what `events.post` raises."""

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Raises CannotMeasure where one is an error."""
        async with aclosing(events.post(HOST, self._port, path, body)) as found:
            async for event in found:
                if "error" in event:
                    raise CannotMeasure(f"{self.name} failed: {event['error']}")
                yield event

    async def _timed(self, body: Mapping[str, Any], due_s: float) -> Stream:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self.stream(body, due_s)
        except events.Refused as error:
            raise CannotMeasure(f"{self.name} refused: {error}") from error
        except (OSError, EOFError, ValueError) as error:
            raise CannotMeasure(f"{self.name} failed: {error!r}") from error

    def processes(self) -> Mapping[str, psutil.Process]:
        own = self._own()
        return own | {"client": psutil.Process()} if own else {}

    def _own(self) -> dict[str, psutil.Process]:
        if not self._process.running:
            return {}
        first = psutil.Process(self._process.pid)
        children = first.children(recursive=True)
        return {self._label: first} | {f"{self._label} {i}": child for i, child in enumerate(children, 2)}

    def rest(self) -> None:
        send(self._own(), signal.SIGSTOP)

    def wake(self) -> None:
        send(self._own(), signal.SIGCONT)

    async def stop(self) -> None:
        self._process.end_group()
