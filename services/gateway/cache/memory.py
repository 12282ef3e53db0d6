"""Answers in this process's memory."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import NamedTuple

from services.mesh.clock import Clock

ENTRY_OVERHEAD_BYTES = 320
"""What an entry costs beside its key and value: its place in the order, its tuple and its time. A test
measures it."""


class _Entry(NamedTuple):
    value: bytes
    expires_s: float
    size_bytes: int


class MemoryCache:
    """A `ResponseCache`. What was not used for longest is displaced first."""

    def __init__(self, clock: Clock, *, max_bytes: int, max_entry_bytes: int, ttl_s: float) -> None:
        """`max_bytes` is memory as it is used, `max_entry_bytes` one value alone."""
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_entry_bytes = max_entry_bytes
        self._ttl_s = ttl_s
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    async def get(self, key: bytes) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock.monotonic() >= entry.expires_s:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.value

    async def put(self, key: bytes, value: bytes) -> None:
        size_bytes = sys.getsizeof(key) + sys.getsizeof(value) + ENTRY_OVERHEAD_BYTES
        self._drop(key)
        if len(value) > self._max_entry_bytes or size_bytes > self._max_bytes:
            return
        self._entries[key] = _Entry(value, self._clock.monotonic() + self._ttl_s, size_bytes)
        self._held_bytes += size_bytes
        while self._held_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._held_bytes -= entry.size_bytes
