"""Bodies that are on their way: their own number and bytes, beside the places of calls that run.

A call whose body is here in full never comes by: what others dribble cannot keep it from being answered. One
that has to wait for its body gives its place up meanwhile. Where more wait than may, the one that has waited
for the longest is refused: whoever sends at an honest pace is newer than those who dribble, also where both
are of one tenant or address.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from types import TracebackType

from services.mesh.errors import ConcurrencyLimit
from services.mesh.running import RunningCalls


class Receiving:
    """The bodies that are awaited, of all connections."""

    def __init__(self, running: RunningCalls, *, max_bodies: int, max_bytes: int) -> None:
        self._running = running
        self._max_bodies = max_bodies
        self._max_bytes = max_bytes
        self._bodies: OrderedDict[ReceivingBody, None] = OrderedDict()
        """From the oldest to the newest."""
        self.size = 0
        """What they hold, in bytes."""

    def __len__(self) -> int:
        return len(self._bodies)

    def body(self) -> ReceivingBody:
        """One more, to be read in its block by the task that serves the call."""
        return ReceivingBody(self)

    def enter(self, body: ReceivingBody) -> None:
        if len(self._bodies) >= self._max_bodies:
            self._refuse_oldest()
        self._bodies[body] = None
        self._running.step_aside()

    def leave(self, body: ReceivingBody, *, to_work: bool) -> None:
        """Raises ConcurrencyLimit where `to_work` and there is no place."""
        self._forget(body)
        self._running.come_back(to_work=to_work)

    def grow(self, body: ReceivingBody, size: int) -> None:
        self.size += size - body.size
        body.size = size
        while self.size > self._max_bytes:
            self._refuse_oldest()

    def _refuse_oldest(self) -> None:
        oldest = next(iter(self._bodies))
        self._forget(oldest)
        oldest.refuse()

    def _forget(self, body: ReceivingBody) -> None:
        """Safe to repeat."""
        self._bodies.pop(body, None)
        self.size -= body.size
        body.size = 0


class ReceivingBody:
    """One body, as a block. Raises ConcurrencyLimit where it has to go for a newer one, or where all places
    are taken when it is here."""

    __slots__ = ("_receiving", "_refused", "_task", "size")

    def __init__(self, receiving: Receiving) -> None:
        self._receiving = receiving
        self._task: asyncio.Task[object] | None = None
        self._refused = False
        self.size = 0
        """What is held of it, in bytes."""

    def holds(self, size: int) -> None:
        """So many bytes of it are held now."""
        if size != self.size:
            self._receiving.grow(self, size)

    def refuse(self) -> None:
        """For a newer one."""
        if self._task is asyncio.current_task():
            raise _refusal()
        self._refused = True
        if self._task is not None:
            self._task.cancel()

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._receiving.enter(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._receiving.leave(self, to_work=error is None)
        if self._refused and self._task is not None and isinstance(error, asyncio.CancelledError):
            self._task.uncancel()
            raise _refusal() from None


def _refusal() -> ConcurrencyLimit:
    return ConcurrencyLimit(
        "More requests are on their way than the server may hold, and this one took the longest to arrive.",
        hint="Send requests faster, or fewer at once.",
    )
