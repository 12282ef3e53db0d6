"""The leases of jobs at work: prolonged by heartbeats, which also tell who is to stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from services.gateway.jobs.ports import Beat, SchedulePort, Seals, Standing
from services.gateway.jobs.working.ports import Attempt, Payloads
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError

logger = logging.getLogger(__name__)

TICK_S = 1.0
"""Jobs that somebody watches tell of themselves so often."""
MAX_BEATS = 64
"""In one message."""
MAX_PARTIAL_CHARS = 4096
"""At most four bytes each: 16 KiB."""


@dataclass(slots=True)
class Held:
    """A job at work, and what this gateway knows of its lease."""

    attempt: Attempt
    work: asyncio.Task[object]
    lease_end_s: float
    """On the monotonic clock; never later than in the schedule, since it is counted from before the
    question."""
    beaten_s: float | None = None
    watched: bool = False
    cancel: bool = False
    """Its tenant wants it ended."""
    lost: bool = False
    """The schedule has given it to somebody else, or has ended it."""


class Leases:
    """Sends the heartbeats of what it is given."""

    def __init__(
        self, schedule: SchedulePort, seals: Seals, payloads: Payloads, clock: Clock, *, lease_s: float
    ) -> None:
        self._schedule = schedule
        self._seals = seals
        self._payloads = payloads
        self._clock = clock
        self.lease_s = lease_s

    async def beat_for_ever(self, held: Iterable[Held]) -> None:
        """`held` is looked at anew each time."""
        while True:
            await self._clock.sleep(min(TICK_S, self.lease_s / 3))
            now_s = self._clock.monotonic()
            due = [each for each in held if not each.lost and now_s >= self._due_s(each)]
            for first in range(0, len(due), MAX_BEATS):
                await self._beat(due[first : first + MAX_BEATS])
            self._stop_what_is_over(held)

    def _due_s(self, each: Held) -> float:
        """A third of the lease after the last; whether somebody watches, the first one tells, so that comes
        soon."""
        if each.beaten_s is None:
            return 0.0
        return each.beaten_s + (0.0 if each.watched else self.lease_s / 3)

    async def _beat(self, due: list[Held]) -> None:
        asked_s = self._clock.monotonic()
        try:
            found = await self._schedule.heartbeat([self._told(each) for each in due], lease_s=self.lease_s)
        except LlmosError as error:
            logger.warning("the heartbeats of %d jobs were not taken: %s", len(due), error.reason)
            return
        for each, standing in zip(due, found, strict=True):
            each.beaten_s = asked_s
            self._take(each, standing, asked_s)

    def _take(self, each: Held, standing: Standing, asked_s: float) -> None:
        each.watched, each.cancel = standing.watched, each.cancel or standing.cancel
        if standing.held:
            each.lease_end_s = asked_s + self.lease_s
        else:
            each.lost = True
        if each.lost or each.cancel:
            each.work.cancel()

    def _stop_what_is_over(self, held: Iterable[Held]) -> None:
        """By our own clock: somebody else may run it by now."""
        now_s = self._clock.monotonic()
        for each in held:
            if now_s >= each.lease_end_s and not each.work.done():
                logger.warning("the lease of job %s ended unheard", each.attempt.job.job_id)
                each.work.cancel()

    def _told(self, each: Held) -> Beat:
        attempt, partial = each.attempt, None
        if each.watched and attempt.texts:
            room = MAX_PARTIAL_CHARS // len(attempt.texts)
            texts = [_begin_of(pieces, room) for pieces in attempt.texts]
            partial = self._seals.seal(self._payloads.partial(texts), attempt.job, "partial")
        return Beat(attempt.job.job_id, attempt.claim.fence, attempt.progress_tokens, partial)


def _begin_of(pieces: Iterable[str], max_chars: int) -> str:
    """The first `max_chars` characters of them together."""
    found, length = [], 0
    for piece in pieces:
        if length >= max_chars:
            break
        found.append(piece)
        length += len(piece)
    return "".join(found)[:max_chars]
