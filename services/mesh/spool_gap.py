"""The exact count of what a spool could not write, kept until it is written as an event itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from msgspec.structs import replace

from services.mesh.clock import Clock
from services.mesh.events import SpoolGap
from services.mesh.spool_frames import Gap

logger = logging.getLogger(__name__)

AppendGap = Callable[[SpoolGap], asyncio.Future[bool] | None]
"""Appends the event and, in the same transaction, resets what is remembered. None where there is no room."""


class GapCounter:
    """Counts, remembers the count over a crash, and records it once there is room."""

    def __init__(
        self, *, refuses: bool, clock: Clock, remember: Callable[[Gap], Awaitable[None]], append: AppendGap
    ) -> None:
        self._refuses = refuses
        self._clock = clock
        self._remember = remember
        self._append = append
        self._gap = Gap()
        self._is_new = False
        self._writing: asyncio.Task[None] | None = None
        self.total = 0
        """Events dropped or refused in this life."""

    def load(self, gap: Gap) -> None:
        """What a former life left."""
        self._gap = gap

    def count(self) -> None:
        """An event is not written."""
        now_s = self._clock.now().timestamp()
        if not self._gap:
            verb = "refusing" if self._refuses else "dropping"
            logger.error("the audit spool is full or its disk fails; %s events", verb)
        self._gap = merge(self._gap, Gap(int(not self._refuses), int(self._refuses), now_s, now_s))
        self._is_new = True
        self.total += 1
        self.remember()

    def remember(self) -> None:
        """Writes the count down, where that is not done."""
        if self._is_new and self._writing is None:
            self._writing = asyncio.create_task(self._write())

    def record(self) -> None:
        """Appends the count as an event, where there is one and there is room."""
        gap = self._gap
        if not gap:
            return
        first, last = (datetime.fromtimestamp(s, UTC) for s in (gap.first_s, gap.last_s))
        future = self._append(SpoolGap(gap.dropped, gap.refused, first, last))
        if future is None:
            return
        self._gap = Gap()

        def done(future: asyncio.Future[bool]) -> None:
            if not future.result():
                self._gap = merge(gap, self._gap)
                self._is_new = True

        future.add_done_callback(done)

    async def stop(self) -> None:
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=1.0)

    async def _write(self) -> None:
        try:
            while self._is_new:
                self._is_new = False
                await self._remember(replace(self._gap))
        except OSError:
            self._is_new = True
        finally:
            self._writing = None


def merge(earlier: Gap, later: Gap) -> Gap:
    """Both gaps as one."""
    if not earlier or not later:
        return earlier or later
    return Gap(
        earlier.dropped + later.dropped,
        earlier.refused + later.refused,
        min(earlier.first_s, later.first_s),
        max(earlier.last_s, later.last_s),
    )
