"""Futures of those who wait for the spool's disk, bounded in time."""

from __future__ import annotations

import asyncio
from collections import deque
from enum import StrEnum

from services.mesh.errors import AuditUnavailable


class Mode(StrEnum):
    """What happens when an event cannot be written."""

    STRICT = "strict"
    PERMISSIVE = "permissive"


class Waiting:
    """Makes and settles them."""

    def __init__(self, *, refuses: bool, timeout_s: float, what: str = "request") -> None:
        """`refuses`: what could not be written is an error for those who wait, and not merely counted.
        `what` they handed over, for the error's sentence."""
        self._what = what
        self._refuses = refuses
        self._timeout_s = timeout_s
        self._expiring: deque[tuple[float, asyncio.Future[None], bool]] = deque()
        """By the event loop's time, in order; one timer for all of them, since nearly all are settled long
        before."""
        self._expiry: asyncio.TimerHandle | None = None

    def begin(self, *, otherwise: bool) -> asyncio.Future[None]:
        """To be settled; where a hanging disk does not tell in time, it is with `otherwise`."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()
        expiring = self._expiring
        while expiring and expiring[0][1].done():
            expiring.popleft()
        at_s = loop.time() + self._timeout_s
        expiring.append((at_s, waiting, otherwise))
        if self._expiry is None:
            self._expiry = loop.call_at(at_s, self._expire, loop)
        return waiting

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._expiry = None
        expiring, now_s = self._expiring, loop.time()
        while expiring and (expiring[0][1].done() or expiring[0][0] <= now_s):
            _, waiting, otherwise = expiring.popleft()
            self.settle(waiting, otherwise)
        if expiring:
            self._expiry = loop.call_at(expiring[0][0], self._expire, loop)

    def settle(self, waiting: asyncio.Future[None], written: bool) -> None:
        """Says whether the event was written. Repeating it changes nothing."""
        if waiting.done():
            return
        if written or not self._refuses:
            waiting.set_result(None)
        else:
            refuse(waiting, AuditUnavailable(f"The audit log cannot take the {self._what}."))

    def turned_away(self) -> asyncio.Future[None]:
        """For what there is no room for."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.settle(waiting, written=False)
        return waiting


def refuse(waiting: asyncio.Future[None], error: Exception) -> None:
    """Ends it with an error, if it has not ended."""
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # so that one whom nobody waits for any more does not complain


def failed(error: Exception) -> asyncio.Future[None]:
    """One that ended before it began."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    refuse(future, error)
    return future
