"""Our engine alone: its port, in this process, with its child; no gateway, no gRPC, no audit."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from contextlib import aclosing

import psutil

from services.inference.app import build_engine
from services.inference.engine.port import Delta, Finished, GenerationRequest, Prompt, Sampling
from services.inference.settings import InferenceSettings
from services.mesh.clock import SystemClock
from services.mesh.errors import LlmosError
from tests.bench.subject import send
from tests.bench.work import CannotMeasure, Stream, Work

START_TIMEOUT_S = 300.0


class Alone:
    """A `Subject`."""

    name = "engine alone"

    def __init__(self, settings: InferenceSettings) -> None:
        self.temperature = 0.0
        self._model = settings.served_model_id
        self._engine = build_engine(settings, SystemClock())

    async def start(self) -> None:
        await self._engine.start()
        try:
            await self._engine.wait_healthy(START_TIMEOUT_S)
        except LlmosError as error:
            raise CannotMeasure(f"the engine does not start: {error}") from error

    async def answer(self, work: Work) -> list[Stream]:
        due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._stream(prompt, work.max_tokens, due_s)) for prompt in work.prompts
            ]
        return [task.result() for task in tasks]

    async def _stream(self, prompt: str, max_tokens: int, due_s: float) -> Stream:
        request = GenerationRequest(
            request_id="bench",
            model=self._model,
            prompt=Prompt(text=prompt),
            sampling=Sampling(seed=1, temperature=self.temperature),
            max_tokens=max_tokens,
            ignore_eos=True,
        )
        first_s = last_s = 0.0
        token_ids: list[int] = []
        text: list[str] = []
        try:
            async with aclosing(self._engine.generate(request)) as events:
                async for event in events:
                    last_s = time.perf_counter() - due_s
                    match event:
                        case Delta():
                            first_s = first_s or last_s
                            token_ids += event.token_ids
                            text.append(event.text)
                        case Finished():
                            break
        except LlmosError as error:
            raise CannotMeasure(f"the engine refused: {error}") from error
        return Stream(first_s, last_s, len(token_ids), tuple(token_ids), "".join(text))

    def processes(self) -> Mapping[str, psutil.Process]:
        return self._child() | {"client": psutil.Process()}

    def _child(self) -> dict[str, psutil.Process]:
        pid = getattr(self._engine, "child_pid", None)
        return {} if pid is None else {"engine": psutil.Process(pid)}

    def rest(self) -> None:
        """It waits for work, which takes nothing; this process would miss it if it were stopped."""

    def wake(self) -> None:
        """It is awake."""

    async def stop(self) -> None:
        send(self._child(), signal.SIGCONT)
        await self._engine.stop()
