"""Who waits for news of a job, and the newest partial result of those that are watched: in memory only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.mesh.errors import ConcurrencyLimit
from services.mesh.jobs import Sealed

MAX_PARTIAL_BYTES = 64 * 1024
"""A larger one is left out: gateways cut them at 16 KiB of text."""


@dataclass(eq=False)
class Watcher:
    """One who waits."""

    wants_partial: bool
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    partial: Sealed | None = None


class Watchers:
    """At most `max_watchers` at a time."""

    def __init__(self, max_watchers: int) -> None:
        self._max = max_watchers
        self._count = 0
        self._of: dict[str, set[Watcher]] = {}

    @contextmanager
    def watching(self, job_id: str, *, wants_partial: bool) -> Iterator[Watcher]:
        """Raises ConcurrencyLimit where too many do."""
        if self._count >= self._max:
            raise ConcurrencyLimit(f"{self._max} watch jobs, which is the limit.")
        watcher = Watcher(wants_partial)
        self._of.setdefault(job_id, set()).add(watcher)
        self._count += 1
        try:
            yield watcher
        finally:
            self._count -= 1
            self._of[job_id].discard(watcher)
            if not self._of[job_id]:
                del self._of[job_id]

    def is_watched(self, job_id: str) -> bool:
        """Whether somebody would read a partial result."""
        return any(watcher.wants_partial for watcher in self._of.get(job_id, ()))

    def changed(self, job_ids: Iterable[str]) -> None:
        if self._of:
            for job_id in job_ids:
                for watcher in self._of.get(job_id, ()):
                    watcher.changed.set()

    def partial(self, job_id: str, sealed: Sealed) -> None:
        """The newest one replaces the one before."""
        if len(sealed.ciphertext) <= MAX_PARTIAL_BYTES:
            for watcher in self._of.get(job_id, ()):
                watcher.partial = sealed
