"""Reports to the schedule, several at a time: one costs about as much as many, here, at logging and on its
disk."""

from __future__ import annotations

import asyncio

from services.gateway.jobs.ports import AttemptEnd, SchedulePort, Succeeded
from services.mesh.clock import Clock, wait_at_most

GATHER_S = 0.5
"""So long the first one waits for others."""
MAX_TOGETHER = 64
MAX_TOGETHER_BYTES = 1024 * 1024
"""Of results; a larger one goes alone. A message of gRPC holds 4 MiB."""


class Reports:
    """Sends them, one message after the other."""

    def __init__(self, schedule: SchedulePort, clock: Clock) -> None:
        self._schedule = schedule
        self._clock = clock
        self._waiting: list[tuple[AttemptEnd, asyncio.Future[bool]]] = []
        self._hurried = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None

    async def report(self, end: AttemptEnd, *, at_once: bool) -> bool:
        """Whether the schedule has taken it. Unless `at_once`, it may wait for others. Raises what that
        raises."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((end, future))
        if at_once or len(self._waiting) >= MAX_TOGETHER:
            self._hurried.set()
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(), name="jobs-report")
        return await future

    async def stop(self) -> None:
        """Whoever still waits for an answer has been cancelled."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    async def _send(self) -> None:
        try:
            while self._waiting:
                await wait_at_most(self._clock, self._hurried, GATHER_S)
                group = self._next()
                if not group:
                    continue
                try:
                    taken = await self._schedule.report([end for end, _ in group])
                except Exception as error:  # a fault of ours, too, is for whoever waits
                    for _, future in group:
                        if not future.done():
                            future.set_exception(error)
                else:
                    for (_, future), each in zip(group, taken, strict=True):
                        if not future.done():
                            future.set_result(each)
        finally:
            self._sending = None

    def _next(self) -> list[tuple[AttemptEnd, asyncio.Future[bool]]]:
        """As many as go together. Those whom nobody waits for any more are left out."""
        self._waiting = [each for each in self._waiting if not each[1].done()]
        count = size_bytes = 0
        for end, _ in self._waiting[:MAX_TOGETHER]:
            size_bytes += len(end.report.result.ciphertext) if isinstance(end.report, Succeeded) else 0
            if count and size_bytes > MAX_TOGETHER_BYTES:
                break
            count += 1
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        if not self._waiting:
            self._hurried.clear()
        return group
