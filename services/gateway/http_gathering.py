"""Writes together what belongs together: each write is a call of the system's, and wakes the reader. The head
of a stream waits for what opens it; its events wait for each other where they come in a burst, none longer
than GATHER_S, and what comes after a pause is written at once."""

from __future__ import annotations

import asyncio
from typing import Any

GATHER_S = 0.004
"""Between two writes."""
MAX_GATHERED_BYTES = 16 * 1024


class GatheringTransport:
    """A transport that can do so; all else is the inner one's."""

    __slots__ = (
        *("_inner", "_loop", "_pending", "_pending_bytes", "_timer", "_written_s"),
        *("holds", "is_closing", "on"),
    )

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self.is_closing = inner.is_closing
        self._loop = loop
        self.on = False
        """Whether writes may wait."""
        self.holds = False
        """Whether the next write waits for the one after it, which has to follow."""
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._written_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, data: bytes) -> None:
        if self.holds:
            self.holds = False
            self._pending.append(data)
            self._pending_bytes += len(data)
            return
        if not self.on:
            self._flush(data)
            return
        now_s = self._loop.time()
        if now_s - self._written_s >= GATHER_S or self._pending_bytes + len(data) > MAX_GATHERED_BYTES:
            self._written_s = now_s
            self._flush(data)
            return
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._timer is None:
            self._timer = self._loop.call_at(self._written_s + GATHER_S, self._on_time)

    def close(self) -> None:
        self._flush(b"")
        self._inner.close()

    def abort(self) -> None:
        self._pending.clear()
        self._pending_bytes = 0
        self._inner.abort()

    def get_write_buffer_size(self) -> int:
        return self._inner.get_write_buffer_size() + self._pending_bytes

    def _on_time(self) -> None:
        self._timer = None
        self._written_s = self._loop.time()
        self._flush(b"")

    def _flush(self, data: bytes) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pending:
            data = b"".join((*self._pending, data))
            self._pending.clear()
            self._pending_bytes = 0
        if data and not self.is_closing():
            self._inner.write(data)
