"""How many generations may be at work at once. More are refused at once, never queued: a queue would only
hide the overload until the callers' deadlines pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.mesh.clock import Clock
from services.mesh.errors import ConcurrencyLimit, DeadlineExceeded


class Admission:
    """Hands out at most `max_concurrent` permits."""

    def __init__(self, max_concurrent: int, clock: Clock, *, retry_after_s: float = 1.0) -> None:
        self._max_concurrent = max_concurrent
        self._clock = clock
        self._retry_after_s = retry_after_s
        self._running = 0

    @property
    def running(self) -> int:
        return self._running

    @contextmanager
    def permit(self, deadline_s: float) -> Iterator[None]:
        """A permit, given back at the end of the block, whatever ends it.

        Raises ConcurrencyLimit where none is free, DeadlineExceeded where nothing is left of the caller's
        time (`deadline_s`, on the monotonic clock).
        """
        if self._clock.monotonic() >= deadline_s:
            raise DeadlineExceeded("The deadline passed before the request could begin.")
        if self._running >= self._max_concurrent:
            raise ConcurrencyLimit(
                f"The server generates {self._max_concurrent} answers at once, which is its limit.",
                retry_after_s=self._retry_after_s,
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
