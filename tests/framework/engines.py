"""Engines for tests, and what tests do with them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from services.inference.backends.embedded import EmbeddedConfig, EmbeddedEngine
from services.inference.engine.port import (
    Delta,
    Engine,
    EngineEvent,
    Finished,
    GenerationRequest,
    Prompt,
    Sampling,
    Started,
    TokenLogprob,
)
from services.inference.engine.watchdog import Timeouts
from services.inference.settings import child_environment
from services.mesh.clock import SystemClock

START_TIMEOUT_S = 120.0
TIMEOUTS = Timeouts(
    load_timeout_s=START_TIMEOUT_S,
    step_timeout_s=30,
    ping_interval_s=0.2,
    ping_timeout_s=2,
    ping_kill_s=5,
)


def embedded_config(model_path: Path, model_id: str, **changes: object) -> EmbeddedConfig:
    """An engine in a child process over a folder of safetensors."""
    config = EmbeddedConfig(
        model_id=model_id,
        model_path=model_path,
        # Where the native library is built once for all tests.
        models_dir=Path(__file__).parents[2] / ".state",
        kernels="auto",
        instruction_set="auto",
        device="cpu",
        dtype="float32",
        threads=1,
        max_running=8,
        max_waiting=4,
        max_output_tokens=4096,
        max_prefill_tokens=256,
        step_target_ms=100,
        prompt_lookup_tokens=6,
        kv_cache_bytes=0,
        prefix_cache=True,
        timeouts=TIMEOUTS,
        restart_backoff_min_s=0.05,
        restart_backoff_max_s=1,
        environment=child_environment(),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def embedded_engine(model_path: Path, model_id: str, **changes: object) -> EmbeddedEngine:
    return EmbeddedEngine(embedded_config(model_path, model_id, **changes), SystemClock())


@dataclass
class Answer:
    """A whole stream, put together."""

    started: Started | None = None
    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    deltas: int = 0
    finished: Finished | None = None

    def add(self, event: EngineEvent) -> None:
        match event:
            case Started():
                assert self.started is None
                assert not self.deltas
                self.started = event
            case Delta(choice, text, token_ids, logprobs):
                assert self.started is not None
                assert self.finished is None
                self.deltas += 1
                self.texts[choice] = self.texts.get(choice, "") + text
                self.token_ids.setdefault(choice, []).extend(token_ids)
                self.logprobs.setdefault(choice, []).extend(logprobs)
            case Finished():
                assert self.finished is None
                self.finished = event

    @property
    def tokens(self) -> list[list[int]]:
        """The ids of each choice, in order of choice."""
        return [self.token_ids[choice] for choice in sorted(self.token_ids)]


async def answer(engine: Engine, request: GenerationRequest) -> Answer:
    """Runs a request to its end. Raises what the engine raises."""
    whole = Answer()
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            whole.add(event)
    return whole


async def begin(engine: Engine, request: GenerationRequest) -> AsyncGenerator[EngineEvent, None]:
    """A request that has given its first token; the caller closes it."""
    events = engine.generate(request)
    async for event in events:
        if isinstance(event, Delta):
            return events
    raise AssertionError("the stream ended before its first token")


def idle(engine: Engine) -> bool:
    """Whether nothing runs or waits."""
    load = engine.load()
    return (load.running, load.waiting) == (0, 0)


async def drain(events: AsyncGenerator[EngineEvent, None]) -> Finished:
    """Reads on to the end."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Finished):
                return event
    raise AssertionError("the stream ended without Finished")


async def wait_unhealthy(engine: Engine, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        async for health in engine.health_changes():
            if not health.serving:
                return


def text_request(model: str, text: str, *, seed: int = 0, **fields: object) -> GenerationRequest:
    """A request for raw text; greedy unless `sampling` says otherwise."""
    defaults: dict[str, object] = {"sampling": Sampling(seed=seed, temperature=0.0)}
    return GenerationRequest("req_test", model, Prompt(text=text), **(defaults | fields))  # type: ignore[arg-type]


def signal_child(engine: EmbeddedEngine, number: signal.Signals) -> psutil.Process:
    """Harms the engine's process; returns it."""
    assert engine.child_pid is not None
    process = psutil.Process(engine.child_pid)
    process.send_signal(number)
    return process


async def gather_answers(engine: Engine, requests: Iterable[GenerationRequest]) -> list[Answer]:
    """All at once."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(answer(engine, request)) for request in requests]
    return [task.result() for task in tasks]
