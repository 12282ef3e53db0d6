"""Files in a folder, which may be shared by several gateways.

A file is written beside its place, flushed to the disk and renamed: whoever reads sees all of it or nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import IO, TypeVar

from services.gateway.files.ports import READ_MAX_BYTES, Blob
from services.mesh.app import StartError
from services.mesh.errors import DependencyUnavailable, NotFound
from services.mesh.randomness import random_bytes

PARTIAL = ".partial"
T = TypeVar("T")


class FolderBlobs:
    """A folder of folders."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._partial = root / PARTIAL

    async def start(self) -> None:
        try:
            await asyncio.to_thread(self._make)
        except OSError as error:
            raise StartError(f"the folder for files {self._root} cannot be used: {error.strerror}") from error

    def _make(self) -> None:
        self._root.mkdir(0o700, parents=True, exist_ok=True)
        self._partial.mkdir(0o700, exist_ok=True)

    async def stop(self) -> None:
        """Nothing is held open."""

    async def put(self, folder: str, name: str, parts: AsyncIterator[bytes]) -> None:
        partial = self._partial / random_bytes(16).hex()
        file = await _done(lambda: os.fdopen(_own(partial), "wb"))
        try:
            async for part in parts:
                await _done(lambda part=part: file.write(part))  # type: ignore[misc]
            await _done(lambda: self._place(file, partial, folder, name))
        finally:
            file.close()
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _place(self, file: IO[bytes], partial: Path, folder: str, name: str) -> None:
        file.flush()
        os.fsync(file.fileno())
        place = self._root / folder
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)
            _sync(self._root)
        partial.rename(place / name)
        _sync(place)

    async def read(self, folder: str, name: str, start: int, max_bytes: int) -> tuple[int, bytes]:
        def read() -> tuple[int, bytes]:
            with (self._root / folder / name).open("rb") as file:
                file.seek(start)
                return os.fstat(file.fileno()).st_size, file.read(min(max_bytes, READ_MAX_BYTES))

        return await _done(read)

    async def list(self, folder: str, max_blobs: int, after: str = "") -> Sequence[Blob]:
        def listed() -> Sequence[Blob]:
            try:
                names = sorted(each.name for each in (self._root / folder).iterdir() if each.name > after)
            except FileNotFoundError:
                return ()
            found: list[Blob] = []
            for name in names[:max_blobs]:
                with contextlib.suppress(FileNotFoundError):
                    found.append(Blob(name, (self._root / folder / name).stat().st_size))
            return found

        return await _done(listed)

    async def rename(self, folder: str, name: str, new_name: str) -> None:
        def renamed() -> None:
            (self._root / folder / name).rename(self._root / folder / new_name)
            _sync(self._root / folder)

        await _done(renamed)

    async def delete(self, folder: str, name: str) -> bool:
        def deleted() -> bool:
            try:
                (self._root / folder / name).unlink()
            except FileNotFoundError:
                return False
            _sync(self._root / folder)
            return True

        return await _done(deleted)

    async def folders(self) -> Sequence[str]:
        def named() -> Sequence[str]:
            return [each.name for each in os.scandir(self._root) if each.is_dir() and each.name != PARTIAL]

        return await _done(named)


async def _done(work: Callable[[], T]) -> T:
    """In a thread: a disk may take its time."""
    try:
        return await asyncio.to_thread(work)
    except FileNotFoundError:
        raise NotFound("There is no such file.") from None
    except OSError as error:
        raise DependencyUnavailable("The store of files cannot do this now.") from error


def _own(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
