"""Deadlines of what mostly ends by itself long before. One timer watches over all of them: one for each would
be a good part of what a short call costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Generic, TypeVar

from services.mesh.errors import DeadlineExceeded

Key = TypeVar("Key", bound=Hashable)


class Deadlines(Generic[Key]):
    """Says of each key when its time has passed, unless it has ended before."""

    def __init__(self, passed: Callable[[Key], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._passed = passed
        self._ends_s: dict[Key, float] = {}
        """By the event loop's time."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = float("inf")

    def begin(self, key: Key, allowed_s: float) -> None:
        """Its time runs from now on."""
        self._ends_s[key] = end_s = self._loop.time() + allowed_s
        if end_s < self._timer_s:
            self._arm(end_s)

    def end(self, key: Key) -> None:
        """It has ended; after its time has passed this changes nothing."""
        self._ends_s.pop(key, None)

    def close(self) -> None:
        """No time passes any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = None, float("inf")
        self._ends_s.clear()

    def _arm(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = at_s
        self._timer = self._loop.call_at(at_s, self._on_time)

    def _on_time(self) -> None:
        self._timer, self._timer_s = None, float("inf")
        now_s = self._loop.time()
        for key in [key for key, end_s in self._ends_s.items() if end_s <= now_s]:
            del self._ends_s[key]
            self._passed(key)
        if self._ends_s:
            # The timer stays where what it was set for has ended, and finds out here.
            self._arm(min(self._ends_s.values()))


class Deadline:
    """A block that ends with DeadlineExceeded if it takes too long: `asyncio.timeout` with less around it."""

    __slots__ = ("_cancelling", "_deadlines", "_has_passed", "_task")

    def __init__(self, deadlines: Deadlines[Deadline], task: asyncio.Task[Any], allowed_s: float) -> None:
        """`deadlines` are those of all such blocks, made by `blocks`; `task` is that which runs the block."""
        self._deadlines = deadlines
        self._task = task
        self._cancelling = task.cancelling()
        self._has_passed = False
        deadlines.begin(self, allowed_s)

    @staticmethod
    def blocks() -> Deadlines[Deadline]:
        return Deadlines(Deadline._pass)

    def __enter__(self) -> None:
        """The time runs already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadlines.end(self)
        if not self._has_passed:
            return
        # Others may have cancelled the task as well: then it is theirs to say why.
        if self._task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            raise DeadlineExceeded("The deadline passed before the answer was complete.") from error

    def _pass(self) -> None:
        self._has_passed = True
        self._task.cancel()
