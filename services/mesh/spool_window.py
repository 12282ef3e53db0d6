"""The stretch of a spool's file that comes next, as memory: written to without asking the disk.

What stands in the mapped memory of a file is with the system and survives the process, as if it had been
written by a call. A store into it waits for no disk if its page has room there and may be written to. So the
spool's thread first writes zeros, which takes the room and is told what is wrong, and then touches each page.
The system takes a page's permission back when it writes the page out, so a window is good for a moment, and
then renewed. A disk that fails says so by OSError when a window is made or renewed, and not by a signal: no
page is touched there that was not just written.
"""

from __future__ import annotations

import ctypes
import mmap
import os

WINDOW_BYTES = 256 << 10


class Window:
    """See the module. Behind what is written there are zeros up to its end."""

    def __init__(self, fd: int, offset: int) -> None:
        """Begins at an offset of a file that is open for reading and writing, at its end."""
        self._fd = fd
        self._first = offset - offset % mmap.ALLOCATIONGRANULARITY
        self._take(offset)
        self._memory = mmap.mmap(fd, WINDOW_BYTES, offset=self._first)
        self._touch(offset)

    def renew(self, offset: int) -> bool:
        """Makes it good again from an offset on; False where most of it is behind."""
        if offset - self._first > WINDOW_BYTES // 2:
            return False
        self._take(offset)
        self._touch(offset)
        return True

    def write(self, offset: int, data: bytes) -> bool:
        """All of it, or nothing where it does not fit in."""
        start = offset - self._first
        end = start + len(data)
        if end > WINDOW_BYTES:
            return False
        self._memory[start:end] = data
        return True

    def _take(self, offset: int) -> None:
        size = self._first + WINDOW_BYTES - offset
        if os.pwrite(self._fd, bytes(size), offset) < size:
            raise OSError("the disk has no room for the spool's next events")

    def _touch(self, offset: int) -> None:
        """By a call that leaves the interpreter's lock to others."""
        start = offset - self._first
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        ctypes.memset(address + start, 0, WINDOW_BYTES - start)
