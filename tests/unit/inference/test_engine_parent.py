"""The parent's side of the engine's process, beside a child that plays a script."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.inference.backends.embedded import EmbeddedEngine
from services.inference.engine import process
from services.inference.engine.frames import EngineState
from services.inference.engine.port import Delta, GenerationRequest
from services.mesh.clock import SystemClock
from services.mesh.errors import DeadlineExceeded, ReplicaLost
from tests.framework import scripted_child
from tests.framework.engines import (
    START_TIMEOUT_S,
    TIMEOUTS,
    answer,
    embedded_config,
    signal_child,
    text_request,
    wait_unhealthy,
)
from tests.framework.scripted_child import CACHED_TOKENS, KV_PAGES, MODEL_ID, PROMPT_TOKENS

Seen = list[tuple[EngineState, EngineState]]


@pytest.fixture
def seen() -> Seen:
    """The states that the engine's observer was given."""
    return []


@pytest.fixture
async def engine(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> AsyncIterator[EmbeddedEngine]:
    monkeypatch.setattr(process, "CHILD_MODULE", scripted_child.__name__)
    config = embedded_config(Path("unused"), MODEL_ID)
    engine = EmbeddedEngine(config, SystemClock(), lambda before, now: seen.append((before, now)))
    await engine.start()
    await engine.wait_healthy(START_TIMEOUT_S)
    yield engine
    await engine.stop()


def say(script: str, **fields: object) -> GenerationRequest:
    return text_request(MODEL_ID, script, **fields)


async def test_cached_tokens_are_told_at_the_start_and_at_the_end(engine: EmbeddedEngine) -> None:
    whole = await answer(engine, say("answer"))
    assert whole.started is not None
    assert whole.finished is not None
    assert (whole.started.prompt_tokens, whole.started.cached_prompt_tokens) == (PROMPT_TOKENS, CACHED_TOKENS)
    assert whole.finished.usage.cached_prompt_tokens == CACHED_TOKENS


async def test_the_state_of_the_engine_is_its_load(engine: EmbeddedEngine) -> None:
    await answer(engine, say("answer"))
    load = engine.load()
    assert (load.running, load.waiting, load.waiting_tokens) == (0, 0, 7)
    assert (load.kv_pages_used, load.kv_pages) == (2, KV_PAGES)
    assert (load.max_running, load.max_waiting) == (8, 4)
    assert load.step_s == pytest.approx(0.02)
    await answer(engine, say("answer"))
    assert 0.02 < engine.load().step_s < 0.03  # a mean that moves


async def test_a_new_process_begins_with_an_empty_state(engine: EmbeddedEngine, seen: Seen) -> None:
    await answer(engine, say("answer"))
    await answer(engine, say("answer"))
    signal_child(engine, signal.SIGKILL)
    await wait_unhealthy(engine, timeout_s=5)
    assert engine.load().kv_pages == 0
    await engine.wait_healthy(START_TIMEOUT_S)
    await answer(engine, say("answer"))
    gained = [now.prefix_tokens - before.prefix_tokens for before, now in seen]
    assert sum(gained) == 3 * PROMPT_TOKENS
    assert min(gained) == 0


async def test_r09_no_call_outlives_its_deadline_while_the_child_is_stopped(engine: EmbeddedEngine) -> None:
    clock = SystemClock()
    child = signal_child(engine, signal.SIGSTOP)
    begun_s = clock.monotonic()
    with pytest.raises(DeadlineExceeded):
        await answer(engine, say("answer", timeout_s=0.5))
    assert 0.5 <= clock.monotonic() - begun_s < 1.5
    child.send_signal(signal.SIGCONT)
    assert (await answer(engine, say("answer"))).finished
    assert engine.load().restarts == 0


async def test_r09_what_runs_at_a_stopped_child_is_told_that_it_is_lost(engine: EmbeddedEngine) -> None:
    running = asyncio.create_task(answer(engine, say("hang")))
    await asyncio.sleep(0)
    signal_child(engine, signal.SIGSTOP)
    await wait_unhealthy(engine, timeout_s=5)
    assert not running.done()
    with pytest.raises(ReplicaLost) as lost:
        async with asyncio.timeout(TIMEOUTS.ping_kill_s + 5):
            await running
    assert lost.value.retryable
    await engine.wait_healthy(START_TIMEOUT_S)
    assert (await answer(engine, say("answer"))).finished
    assert engine.load().restarts == 1


async def test_what_was_said_before_the_deadline_is_not_lost(engine: EmbeddedEngine) -> None:
    events = engine.generate(say("answer", timeout_s=30))
    assert [type(event) is Delta async for event in events] == [False, True, False]
