"""Time, injected: nothing else in the tree reads a clock or sleeps."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol


class Clock(Protocol):
    """What domain code may know of time."""

    def now(self) -> datetime:
        """The wall clock: aware, in UTC. May jump."""

    def monotonic(self) -> float:
        """Seconds since some start. Never goes back."""

    async def sleep(self, duration_s: float) -> None:
        """Waits so many seconds."""


async def wait_at_most(clock: Clock, event: asyncio.Event, duration_s: float) -> None:
    """Returns when the event is set, or after so many seconds."""
    waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(clock.sleep(duration_s))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


class SystemClock:
    """The machine's own time."""

    now = staticmethod(partial(datetime.now, UTC))
    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(asyncio.sleep)


class ManualClock:
    """Time that moves when told to. Sleepers wake in order of their due time."""

    def __init__(self, start: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed_s = 0.0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed_s)

    def monotonic(self) -> float:
        return self._elapsed_s

    async def sleep(self, duration_s: float) -> None:
        if duration_s <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed_s + duration_s, next(self._order), future))
        await future

    @property
    def sleepers(self) -> int:
        """How many wait now; lets a test know that a loop has come to rest."""
        return sum(1 for _, _, future in self._sleepers if not future.done())

    async def advance(self, duration_s: float) -> None:
        """Moves time on, and gives everything that falls due a chance to run."""
        for _ in range(3):  # tasks that were just made begin to sleep now, not later
            await asyncio.sleep(0)
        end_s = self._elapsed_s + duration_s
        while self._sleepers and self._sleepers[0][0] <= end_s:
            due_s, _, future = heapq.heappop(self._sleepers)
            self._elapsed_s = max(self._elapsed_s, due_s)
            if not future.done():
                future.set_result(None)
            for _ in range(3):
                await asyncio.sleep(0)
        self._elapsed_s = end_s
        for _ in range(3):
            await asyncio.sleep(0)
