"""Random bytes for ids and seeds, fetched from the system in blocks: asking each time would be a twentieth of
what a request costs."""

from __future__ import annotations

import os

BLOCK_BYTES = 4096


class RandomBytes:
    """Bytes of the system's cryptographic generator; each is given out once. Not for several threads."""

    def __init__(self) -> None:
        self._block = b""
        self._used = 0
        os.register_at_fork(after_in_child=self._forget)

    def take(self, count: int) -> bytes:
        """`count` bytes, at most BLOCK_BYTES."""
        end = self._used + count
        if end > len(self._block):
            self._block, self._used, end = os.urandom(BLOCK_BYTES), 0, count
        taken = self._block[self._used : end]
        self._used = end
        return taken

    def _forget(self) -> None:
        """The child of a fork must not give out what its parent gives out."""
        self._block, self._used = b"", 0


_bytes = RandomBytes()


def random_bytes(count: int) -> bytes:
    """As `RandomBytes.take`, for this process."""
    return _bytes.take(count)
