"""Refusals of callers whom nobody knows, by source and reason: one event each in an interval, so that a flood
of them fills nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from services.mesh.events import AnonymousRejected


class AnonymousCounts:
    """Beyond `max_keys` it counts by reason alone."""

    OTHER = "other"

    def __init__(self, max_keys: int, interval_s: float, now: datetime) -> None:
        self._max_keys = max_keys
        self._interval_s = interval_s
        self._interval_start = now
        self._counts: dict[tuple[str, str], int] = {}

    def begin(self, now: datetime) -> None:
        """The interval begins now."""
        self._interval_start = now

    def add(self, source_address: str, reason: str, count: int = 1) -> None:
        """Counts refusals."""
        key = (source_address[:64], reason)
        if key not in self._counts and len(self._counts) >= self._max_keys:
            key = (self.OTHER, reason)
        self._counts[key] = self._counts.get(key, 0) + count

    def is_due(self, now: datetime) -> bool:
        """Whether the interval is over."""
        return (now - self._interval_start).total_seconds() >= self._interval_s

    def flush(self, now: datetime, append: Callable[[AnonymousRejected], bool]) -> None:
        """Hands over what was counted; `append` says whether there was room, else it goes with the next
        interval's."""
        counts, self._counts = self._counts, {}
        for (source_address, reason), count in counts.items():
            if not append(AnonymousRejected(source_address, reason, count, self._interval_start, now)):
                self.add(source_address, reason, count)
        if not self._counts:
            self._interval_start = now
