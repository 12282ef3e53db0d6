"""Watches the engine's process: is it there, does it run, does it get on.

Three clocks. Loading has a limit. A process that answers no ping is stopped or starved: health goes false
soon, and it is killed later. A process that answers pings while its loop brings no step is hung: killed.
When this process itself was asleep (stopped, or starved of CPU), what it did not hear in that time is not
held against the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from services.inference.engine import frames
from services.inference.engine.health_state import HealthState
from services.mesh.clock import Clock

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """All in seconds."""

    load_timeout_s: float
    step_timeout_s: float
    """Without a step while there is work: hung."""
    ping_interval_s: float
    ping_timeout_s: float
    """Without an answer: not healthy."""
    ping_kill_s: float
    """Without an answer: killed."""


class Watched(Protocol):
    """What is watched."""

    def post(self, frame: frames.Frame) -> None: ...

    def kill(self) -> None: ...


class Watchdog:
    """Of one life of the child. An async context manager around the reading of its reports."""

    def __init__(
        self,
        process: Watched,
        timeouts: Timeouts,
        clock: Clock,
        health: HealthState,
        *,
        busy: Callable[[], bool],
    ) -> None:
        self._process = process
        self._timeouts = timeouts
        self._clock = clock
        self._health = health
        self._busy = busy
        self._ready = False
        now_s = clock.monotonic()
        self._begun_s = self._heard_s = self._progress_s = now_s
        self.verdict = ""
        """Why the child was killed; empty where it was not."""
        self._task: asyncio.Task[None] | None = None

    def heard(self, report: frames.Report) -> None:
        """Called for each report."""
        now_s = self._clock.monotonic()
        self._heard_s = now_s
        if isinstance(report, frames.Ready):
            self._ready = True
        if not isinstance(report, frames.Pong):
            self._progress_s = now_s
        if self._ready and not self.verdict:
            self._health.set(serving=True, detail="serving")

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch(), name="engine-watchdog")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        interval_s = self._timeouts.ping_interval_s
        checked_s = self._clock.monotonic()
        while not self.verdict:
            self._process.post(frames.Ping())
            await self._clock.sleep(interval_s)
            now_s = self._clock.monotonic()
            asleep_s = now_s - checked_s - interval_s
            checked_s = now_s
            if asleep_s > interval_s:
                logger.warning("this process did not run for %.1f s", asleep_s)
                self._begun_s += asleep_s
                self._heard_s += asleep_s
                self._progress_s += asleep_s
            if not self._busy():
                self._progress_s = now_s
            self._judge(now_s)

    def _judge(self, now_s: float) -> None:
        limits = self._timeouts
        silent_s = now_s - self._heard_s
        if not self._ready:
            if now_s - self._begun_s > limits.load_timeout_s:
                self._kill(f"the model was not loaded within {limits.load_timeout_s:g} s")
        elif silent_s > limits.ping_kill_s:
            self._kill(f"the engine's process did not answer for {limits.ping_kill_s:g} s")
        elif now_s - self._progress_s > limits.step_timeout_s:
            self._kill(f"the engine made no step for {limits.step_timeout_s:g} s")
        elif silent_s > limits.ping_timeout_s:
            detail = "the engine's process does not answer"
            if self._health.set(serving=False, detail=detail):
                logger.warning("%s", detail)

    def _kill(self, verdict: str) -> None:
        self.verdict = verdict
        self._health.set(serving=False, detail=verdict)
        self._process.kill()
