"""When the engine's process is called unhealthy, and when it is killed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.inference.engine import frames
from services.inference.engine.health_state import HealthState
from services.inference.engine.port import ModelInfo
from services.inference.engine.watchdog import Timeouts, Watchdog
from services.mesh.clock import ManualClock

TIMEOUTS = Timeouts(
    load_timeout_s=100, step_timeout_s=20, ping_interval_s=1, ping_timeout_s=3, ping_kill_s=10
)
READY = frames.Ready(ModelInfo("m"), 8)
STEP = frames.StepReport((), 1, 0)


class Scene:
    """A watchdog over a child that does what the test says."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.health = HealthState("loading")
        self.busy = False
        self.answers = True
        self.killed = False
        self.watchdog = Watchdog(self, TIMEOUTS, self.clock, self.health, busy=lambda: self.busy)

    def post(self, frame: frames.Frame) -> None:
        if isinstance(frame, frames.Ping) and self.answers:
            self.watchdog.heard(frames.Pong())

    def kill(self) -> None:
        self.killed = True

    async def pass_seconds(self, duration_s: int) -> None:
        for _ in range(duration_s):
            await self.clock.advance(1)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    async with scene.watchdog:
        await scene.clock.advance(0)
        yield scene


async def test_loading_has_a_limit_and_only_that(scene: Scene) -> None:
    scene.answers = False
    await scene.pass_seconds(99)
    assert not scene.killed
    await scene.pass_seconds(2)
    assert scene.killed
    assert "not loaded within 100 s" in scene.watchdog.verdict


async def test_an_idle_engine_that_answers_is_left_alone(scene: Scene) -> None:
    scene.watchdog.heard(READY)
    await scene.pass_seconds(1000)
    assert not scene.killed
    assert scene.health.value.serving


async def test_r09_silence_is_told_soon_and_ended_later(scene: Scene) -> None:
    scene.watchdog.heard(READY)
    scene.answers = False
    await scene.pass_seconds(3)
    assert scene.health.value.serving
    await scene.pass_seconds(1)
    assert not scene.health.value.serving
    assert not scene.killed
    await scene.pass_seconds(7)
    assert scene.killed
    scene.watchdog.heard(frames.Pong())
    assert not scene.health.value.serving, "a verdict stands"


async def test_an_engine_that_answers_again_is_healthy_again(scene: Scene) -> None:
    scene.watchdog.heard(READY)
    scene.answers = False
    await scene.pass_seconds(5)
    assert not scene.health.value.serving
    scene.answers = True
    await scene.pass_seconds(1)
    assert scene.health.value.serving
    assert not scene.killed


async def test_r09_a_hung_step_is_ended_although_the_process_answers(scene: Scene) -> None:
    scene.watchdog.heard(READY)
    scene.busy = True
    for _ in range(5):
        await scene.pass_seconds(15)
        scene.watchdog.heard(STEP)
    assert not scene.killed
    await scene.pass_seconds(22)
    assert scene.killed
    assert "no step" in scene.watchdog.verdict


async def test_idle_time_is_not_held_against_the_first_step(scene: Scene) -> None:
    scene.watchdog.heard(READY)
    await scene.pass_seconds(500)
    scene.busy = True
    await scene.pass_seconds(15)
    assert not scene.killed


async def test_r09_our_own_sleep_is_not_held_against_the_child(scene: Scene) -> None:
    scene.watchdog.heard(READY)
    scene.busy = True
    await scene.pass_seconds(5)
    scene.answers = False
    # This process was stopped for 30 s: its timers fire late, all at once.
    await scene.clock.advance(0.5)
    scene.clock._elapsed_s += 30
    await scene.clock.advance(1)
    assert not scene.killed
    scene.answers = True
    await scene.pass_seconds(5)
    assert scene.health.value.serving
