"""The files of a spool: segments of a log, of which the last one is written to.

Each begins with a `Head`, so that those before it are needed for the events that they hold, and for nothing
else: one whose events are all forgotten is removed. A segment appears under its name when its beginning is on
the disk. Errors of the disk are OSError.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from services.mesh.audit_protocol import START, Place
from services.mesh.spool_frames import MAGIC, Damaged, Frame, Group, encode, read
from services.mesh.spool_window import Window

_UNFINISHED = "new"
CHUNK_BYTES = 64 << 10


class Segment:
    """One file, and what is known of it without reading it."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        """So many bytes are frames."""
        self.last: dict[int, int] = {}
        """By epoch: the last sequence that stands here."""
        self.end = START
        """The place of the last event."""

    @property
    def number(self) -> int:
        return int(self.path.stem)

    def note(self, frame: Frame) -> None:
        """A frame stands here."""
        if isinstance(frame, Group):
            self.end = Place(frame.epoch, frame.first + len(frame.events) - 1)
            self.last[frame.epoch] = self.end.sequence

    def frames(self, offset: int = 0) -> Iterator[tuple[Frame, int]]:
        """From an offset on, each with the offset after it. Raises Damaged."""
        with self.path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise Damaged("it does not begin as a spool of this version")
            yield from read(file, max(offset, len(MAGIC)), self.size)


class LastSegment(Segment):
    """The one that is written to. What could not be written, or not synced, is not there: it is cut off at
    once, or where the disk refuses that, too, before anything else is written. Zeros may stand behind the
    frames, where a window was prepared."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path, size)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._is_torn = False
        self._window: Window | None = None
        self.begun_at = size
        """The size with which it began."""

    def append(self, frames: Sequence[Frame], *, sync: bool) -> None:
        """All of them or none; on the disk, where `sync`, else with the system."""
        self._mend()
        size = self.size
        try:
            for frame in frames:
                data = encode(frame)
                _write_all(self._fd, data, size)
                size += len(data)
            if sync:
                os.fdatasync(self._fd)
        except OSError:
            self._is_torn = True
            with contextlib.suppress(OSError):
                self._mend()
            raise
        self.size = size
        for frame in frames:
            self.note(frame)

    def put(self, group: Group) -> bool:
        """Appends one event in the window; False where there is none, or too little of it. Asks no disk."""
        if self._window is None:
            return False
        data = encode(group)
        if not self._window.write(self.size, data):
            return False
        self.size += len(data)
        self.end = Place(group.epoch, group.first)
        self.last[group.epoch] = group.first
        return True

    def renew(self) -> None:
        """Prepares the window. Where the disk refuses, there is none."""
        window, self._window = self._window, None
        try:
            if window is None or not window.renew(self.size):
                window = Window(self._fd, self.size)
        except (OSError, ValueError):
            self._is_torn = True
        else:
            self._window = window

    def finish(self) -> None:
        """All that was appended is on the disk then, and nothing behind it."""
        self._is_torn = True
        self._mend()
        os.fdatasync(self._fd)

    def close(self) -> None:
        """What was prepared is cut off; where the disk refuses, the next process does it."""
        try:
            self._is_torn = self._is_torn or self._window is not None
            with contextlib.suppress(OSError):
                self._mend()
        finally:
            with contextlib.suppress(OSError):
                os.close(self._fd)

    def _mend(self) -> None:
        if self._is_torn:
            self._window = None  # nothing may touch memory of which the file has no bytes any more
            os.ftruncate(self._fd, self.size)
            self._is_torn = False


def begin(folder: Path, number: int, frames: Sequence[Frame]) -> LastSegment:
    """Makes a segment that begins with these frames."""
    unfinished, path = folder / _UNFINISHED, folder / f"{number:012}.log"
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        data = MAGIC + b"".join(encode(frame) for frame in frames)
        _write_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(unfinished, path)  # noqa: PTH104
    _sync_folder(folder)
    segment = LastSegment(path, len(data))
    for frame in frames:
        segment.note(frame)
    return segment


def found(folder: Path) -> list[Segment]:
    """The segments of a folder, in order."""
    paths = sorted(path for path in folder.glob("*.log") if path.stem.isdigit())
    return [Segment(path, path.stat().st_size) for path in paths]


def cut(segment: Segment, size: int) -> bool:
    """Takes off what is behind its whole frames; False where those were zeros only."""
    fd = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        torn = any(
            os.pread(fd, CHUNK_BYTES, at).strip(b"\0") for at in range(size, segment.size, CHUNK_BYTES)
        )
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)
    segment.size = size
    return torn


def remove(segment: Segment) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(segment.path)  # noqa: PTH108


def lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed. Raises BlockingIOError where one does."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, data: bytes, offset: int) -> None:
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
