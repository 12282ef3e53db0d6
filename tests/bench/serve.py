"""`transformers serve` over its own HTTP: with continuous batching or without, whichever is the faster."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil

from deploy.dev.environment import ROOT
from deploy.dev.ports import HOST
from deploy.dev.processes import Process
from tests.bench.generate import OFFLINE
from tests.bench.generate_worker import NEVER
from tests.bench.subject import send
from tests.bench.work import CannotMeasure, Stream, Work

LIBRARIES = ROOT / ".tools" / "bench"
"""What `transformers serve` needs beyond dev; `make bench-engine` installs it."""
START_TIMEOUT_S = 180.0
TIMEOUT_S = 300.0


class Serve:
    """A `Subject`."""

    def __init__(
        self, folder: Path, dtype: str, device: str, *, port: int, log_file: Path, batching: bool
    ) -> None:
        self.name = "serve batching" if batching else "serve"
        self._folder = folder
        self._url = f"http://{HOST}:{port}"
        self._process = Process(
            self.name,
            [
                *(sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)),
                *("--host", HOST, "--port", str(port), "--dtype", dtype, "--device", device),
                *("--log-level", "error"),
                *(["--continuous-batching"] if batching else []),
            ],
            env=dict(os.environ) | OFFLINE | {"PYTHONPATH": str(LIBRARIES)},
            cwd=ROOT,
            log_file=log_file,
        )
        self._client: httpx.AsyncClient | None = None

    async def start(self) -> None:
        if not LIBRARIES.is_dir():
            raise CannotMeasure(f"{LIBRARIES} is missing: `make bench-engine` installs it")
        self._process.start()
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(
            base_url=self._url, timeout=TIMEOUT_S, limits=limits, trust_env=False
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.running:
            with contextlib.suppress(httpx.HTTPError):
                if (await self._client.get("/health", timeout=5)).status_code == 200:
                    return
            await asyncio.sleep(0.25)
        raise CannotMeasure(f"`transformers serve` does not start. Its last lines:\n{self._process.tail(15)}")

    async def answer(self, work: Work) -> list[Stream]:
        due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._stream(prompt, work.max_tokens, due_s)) for prompt in work.prompts
            ]
        return [task.result() for task in tasks]

    async def _stream(self, prompt: str, max_tokens: int, due_s: float) -> Stream:
        assert self._client is not None
        config = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": NEVER, "pad_token_id": 0}
        body = {
            "model": str(self._folder),
            "prompt": prompt,
            "stream": True,
            "max_tokens": max_tokens,
            "generation_config": json.dumps(config),
        }
        first_s = last_s = 0.0
        tokens = 0
        text: list[str] = []
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise CannotMeasure(f"`transformers serve` refused: {(await response.aread())[:500]!r}")
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise CannotMeasure(f"`transformers serve` failed: {event['error']}")
                    last_s = time.perf_counter() - due_s
                    piece = event["choices"][0].get("text") or ""
                    if piece:
                        first_s = first_s or last_s
                        text.append(piece)
                    if event.get("usage"):
                        tokens = event["usage"]["completion_tokens"]
        except httpx.HTTPError as error:
            raise CannotMeasure(f"`transformers serve` failed: {error!r}") from error
        return Stream(first_s, last_s, tokens, text="".join(text))

    def processes(self) -> Mapping[str, psutil.Process]:
        if not self._process.running:
            return {}
        return {"serve": psutil.Process(self._process.pid), "client": psutil.Process()}

    def _own(self) -> Mapping[str, psutil.Process]:
        return {name: process for name, process in self.processes().items() if name != "client"}

    def rest(self) -> None:
        send(self._own(), signal.SIGSTOP)

    def wake(self) -> None:
        send(self._own(), signal.SIGCONT)

    async def stop(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        self._process.end_group()
