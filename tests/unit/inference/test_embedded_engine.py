"""The engine's process is harmed, and what the service sees of it. A tiny model, real processes.

What the parent does by itself is tested beside a scripted child, in `test_engine_parent`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from services.inference.backends.embedded import EmbeddedEngine
from services.inference.engine.port import GenerationRequest, Sampling
from services.inference.settings import child_environment
from services.mesh.clock import SystemClock
from services.mesh.errors import EngineFault, NoReplica, ReplicaLost
from tests.framework.engines import (
    START_TIMEOUT_S,
    TIMEOUTS,
    answer,
    begin,
    drain,
    embedded_config,
    embedded_engine,
    gather_answers,
    idle,
    signal_child,
    text_request,
    wait_unhealthy,
)
from tests.framework.models import TINY_MODEL_ID, prompt_that_raises
from tests.framework.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

PARENT = Path(__file__).parents[2] / "framework" / "engine_parent.py"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tiny_model: Path) -> AsyncIterator[EmbeddedEngine]:
    engine = embedded_engine(tiny_model, TINY_MODEL_ID)
    await engine.start()
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(shared: EmbeddedEngine) -> EmbeddedEngine:
    await shared.wait_healthy(START_TIMEOUT_S)
    await eventually(lambda: idle(shared), what="the engine is idle")
    return shared


def long(text: str = "a long story") -> GenerationRequest:
    return text_request(TINY_MODEL_ID, text, max_tokens=4000, ignore_eos=True)


def gone(process: psutil.Process) -> bool:
    """Where nobody reaps orphans, what is left of one is a zombie."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_r09_a_killed_child_is_seen_at_once_and_replaced(engine: EmbeddedEngine) -> None:
    running = [asyncio.create_task(drain(await begin(engine, long(f"{n}")))) for n in range(4)]
    clock = SystemClock()
    killed_s = clock.monotonic()
    child = signal_child(engine, signal.SIGKILL)
    await wait_unhealthy(engine, timeout_s=5)
    assert clock.monotonic() - killed_s < 5
    for task in running:
        with pytest.raises(ReplicaLost):
            await task
    assert clock.monotonic() - killed_s < 5
    with pytest.raises(NoReplica) as refused:
        await answer(engine, text_request(TINY_MODEL_ID, "now"))
    assert refused.value.retryable
    await engine.wait_healthy(START_TIMEOUT_S)
    assert engine.child_pid != child.pid
    assert (await answer(engine, text_request(TINY_MODEL_ID, "again", max_tokens=5))).finished


async def test_r09_a_child_that_is_stopped_for_a_moment_goes_on(engine: EmbeddedEngine) -> None:
    restarts = engine.load().restarts
    request = text_request(TINY_MODEL_ID, "hold", max_tokens=1500, ignore_eos=True)
    running = asyncio.create_task(drain(await begin(engine, request)))
    child = signal_child(engine, signal.SIGSTOP)
    await wait_unhealthy(engine, timeout_s=5)
    child.send_signal(signal.SIGCONT)
    assert (await running).usage.completion_tokens == 1500
    await engine.wait_healthy(5)
    assert engine.load().restarts == restarts


async def test_r17_a_request_that_raises_in_the_model_ends_alone(
    engine: EmbeddedEngine, tiny_model: Path
) -> None:
    restarts = engine.load().restarts
    good = [text_request(TINY_MODEL_ID, f"good {n}", max_tokens=20) for n in range(3)]
    alone = [(await answer(engine, request)).tokens for request in good]
    tasks = [asyncio.create_task(answer(engine, request)) for request in good]
    with pytest.raises(EngineFault) as fault:
        await answer(engine, text_request(TINY_MODEL_ID, prompt_that_raises(tiny_model)))
    assert "index" not in fault.value.message
    assert [(await task).tokens for task in tasks] == alone
    assert engine.load().restarts == restarts


async def test_r20_batched_equals_solo(engine: EmbeddedEngine) -> None:
    requests = [
        text_request(
            TINY_MODEL_ID,
            f"Number {n} begins " * (1 + 7 * n),
            max_tokens=30 + n,
            ignore_eos=True,
            sampling=Sampling(seed=n, temperature=0.0 if n % 2 else 0.9, top_p=0.95),
        )
        for n in range(8)
    ]
    alone = [(await answer(engine, request)).tokens for request in requests]
    together = await gather_answers(engine, requests)
    assert [whole.tokens for whole in together] == alone
    other_seed = replace(requests[0], sampling=Sampling(seed=99, temperature=0.9, top_p=0.95))
    assert (await answer(engine, other_seed)).tokens != alone[0]


async def test_r09_a_hung_step_is_ended(tiny_model: Path) -> None:
    """One step computes a prompt of 4,000 tokens at once, and may only take a moment."""
    timeouts = replace(TIMEOUTS, step_timeout_s=0.05, ping_interval_s=0.02)
    engine = embedded_engine(tiny_model, TINY_MODEL_ID, timeouts=timeouts, max_prefill_tokens=4096)
    await engine.start()
    try:
        await engine.wait_healthy(START_TIMEOUT_S)
        with pytest.raises(ReplicaLost):
            await answer(engine, text_request(TINY_MODEL_ID, "word " * 4000, max_tokens=5))
    finally:
        await engine.stop()


async def test_a_model_that_cannot_be_loaded_is_told_and_tried_again(tmp_path: Path) -> None:
    engine = embedded_engine(tmp_path / "nothing", "nothing", restart_backoff_max_s=0.05)
    await engine.start()
    try:
        await eventually(lambda: "config.json" in engine.health().detail, timeout_s=START_TIMEOUT_S)
        await eventually(lambda: engine.load().restarts >= 1, timeout_s=START_TIMEOUT_S)
        with pytest.raises(NoReplica):
            await engine.wait_healthy(0.05)
    finally:
        await engine.stop()


@pytest.mark.parametrize("phase", ["loading", "serving"])
async def test_no_child_outlives_its_parent(tiny_model: Path, phase: str) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, str(PARENT), str(tiny_model), phase, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert parent.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await parent.stdout.readline()
        child = psutil.Process(int(line))
        assert child.is_running()
    finally:
        parent.kill()
        await parent.wait()
    await eventually(lambda: gone(child), what="the child is gone")


async def test_the_parent_stays_small(tiny_model: Path) -> None:
    """The service's process imports neither torch nor numpy, and gives the child none of its settings."""
    code = "import sys; import services.inference.app; print(sorted({'torch','numpy'} & set(sys.modules)))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=PARENT.parents[2]
    )
    output, _ = await process.communicate()
    assert output.strip() == b"[]"


async def test_r32_the_child_gets_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOS_GATEWAY_SECRET", "canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = child_environment()
    assert "canary" not in environment.values()
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert embedded_config(Path("x"), "x").environment.keys().isdisjoint({"LLMOS_GATEWAY_SECRET"})
