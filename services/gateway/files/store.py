"""Files of tenants: their ids, their limits, when they expire; sealed, in whatever stores the bytes.

An id says when the file was made, how long it is kept and what it is for, so that listing and expiring read
no file. A note is a small file that its owner does not see, under a name that its writer can make again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import IntEnum

from services.gateway.files import sealing
from services.gateway.files.ports import Blobs, FileKeys
from services.gateway.files.sealing import HEAD_MAX_BYTES, Head, OpenedHead
from services.mesh.clock import Clock
from services.mesh.errors import DataCorrupt, MessageTooLarge, NotFound, RateLimit, RequestInvalid
from services.mesh.randomness import random_bytes

MAX_TTL_S = 0xFFFFFF
MAX_NOTE_BYTES = 64 * 1024
MAX_FILENAME_BYTES = 512
PREFIX = "file-"
_NAME = re.compile(r"(file|note)-([0-9a-f]{11})([0-9a-f]{6})([0-9a-f])([0-9a-f]{22})")
_LIST_AT_ONCE = 10_000


class Purpose(IntEnum):
    """What a file is for; the number stands in its id."""

    BATCH = 1
    BATCH_OUTPUT = 2

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as its owner sees it."""

    file_id: str
    size_bytes: int
    create_time: datetime
    expire_time: datetime
    filename: str
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class FileLimits:
    """How much there may be."""

    max_file_bytes: int
    max_tenant_bytes: int
    """Of all files of a tenant, as they are stored. Files that are uploaded at the same time may pass it
    by what they hold themselves."""
    max_tenant_files: int
    ttl_s: int
    """Of a file that names no other time; the longest too."""


@dataclass(frozen=True, slots=True)
class _Name:
    """What an id says."""

    kind: str
    created_ms: int
    ttl_s: int
    number: int
    tail: str

    @classmethod
    def of(cls, text: str) -> _Name | None:
        found = _NAME.fullmatch(text)
        if found is None:
            return None
        kind, created, ttl, number, tail = found.groups()
        return cls(kind, int(created, 16), int(ttl, 16), int(number, 16), tail)

    @property
    def expires_s(self) -> float:
        return self.created_ms / 1000 + self.ttl_s

    @property
    def bound(self) -> str:
        """What the content is sealed for: all but the time, which may be set when the file is complete."""
        return str(replace(self, ttl_s=0))

    def __str__(self) -> str:
        return f"{self.kind}-{self.created_ms:011x}{self.ttl_s:06x}{self.number:x}{self.tail}"


class FileStore:
    """All files, by tenant."""

    def __init__(self, blobs: Blobs, keys: FileKeys, clock: Clock, limits: FileLimits) -> None:
        self._blobs = blobs
        self._keys = keys
        self._clock = clock
        self.limits = limits

    def new_id(self, purpose: Purpose, ttl_s: int | None = None) -> str:
        """An id for a file of now."""
        now_ms = int(self._clock.now().timestamp() * 1000)
        kept_s = min(ttl_s or self.limits.ttl_s, MAX_TTL_S)
        return str(_Name("file", now_ms, kept_s, purpose, random_bytes(11).hex()))

    async def create(
        self, tenant_id: str, file_id: str, filename: str, parts: AsyncIterator[bytes]
    ) -> StoredFile:
        """Writes a file that a caller sends. Raises MessageTooLarge, RateLimit where the tenant has no room,
        DependencyUnavailable, or what `parts` raises: then there is no file."""
        await self.check_room(tenant_id)
        size_bytes = await self.write(tenant_id, file_id, filename, self._bounded(parts))
        return _described(_named(file_id, "file"), size_bytes, filename)

    async def check_room(self, tenant_id: str) -> None:
        """Raises RateLimit where the tenant has as much as it may have."""
        # Notes come after files.
        listed = await self._blobs.list(_folder(tenant_id), self.limits.max_tenant_files)
        found = [each for each in listed if each.name.startswith(PREFIX)]
        if len(found) >= self.limits.max_tenant_files or (
            sum(each.size_bytes for each in found) >= self.limits.max_tenant_bytes
        ):
            raise RateLimit(
                f"The tenant has as many files as it may have: {self.limits.max_tenant_files} with "
                f"{self.limits.max_tenant_bytes} bytes in all.",
                hint="Delete files that are not needed any more.",
                retryable=False,
            )

    async def write(self, tenant_id: str, file_id: str, filename: str, parts: AsyncIterator[bytes]) -> int:
        """Writes a file, in place of one with the same id, and returns its size in bytes."""
        size_bytes = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size_bytes
            async for part in parts:
                size_bytes += len(part)
                yield part

        bound = _named(file_id).bound
        sealed = sealing.seal(self._keys, tenant_id, bound, Head(filename), counted())
        await self._blobs.put(_folder(tenant_id), file_id, sealed)
        return size_bytes

    async def keep_for(self, tenant_id: str, file: StoredFile, ttl_s: int) -> StoredFile:
        """The file, to expire so long after it was made; its id is another from now on."""
        name = replace(_named(file.file_id, "file"), ttl_s=min(ttl_s, MAX_TTL_S))
        if str(name) != file.file_id:
            await self._blobs.rename(_folder(tenant_id), file.file_id, str(name))
        return _described(name, file.size_bytes, file.filename)

    async def stat(self, tenant_id: str, file_id: str) -> StoredFile:
        """Raises NotFound, DataCorrupt or DependencyUnavailable."""
        name = _named(file_id, "file")
        opened = await self._open(tenant_id, name)
        return _described(name, opened.size_bytes, opened.head.filename)

    async def read(self, tenant_id: str, file_id: str, start: int = 0) -> AsyncGenerator[bytes, None]:
        """The content from byte `start` on, in chunks. Raises as `stat`."""
        name = _named(file_id, "file")
        opened = await self._open(tenant_id, name)
        first, skip = divmod(start, sealing.CHUNK_BYTES)
        for number in range(first + 1, opened.chunks + 1):
            chunk = await self._chunk(tenant_id, name, opened, number)
            yield chunk[skip:] if skip else chunk
            skip = 0

    async def list(
        self,
        tenant_id: str,
        *,
        limit: int,
        after: str = "",
        purpose: Purpose | None = None,
        descending: bool = True,
    ) -> tuple[Sequence[StoredFile], bool]:
        """A page, by when they were made, and whether there is more."""
        now_s = self._clock.now().timestamp()
        names = [
            each.name
            for each in await self._blobs.list(_folder(tenant_id), _LIST_AT_ONCE, PREFIX)
            if (name := _Name.of(each.name)) is not None
            and name.kind == "file"
            and name.expires_s > now_s
            and name.number in tuple(Purpose)
            and purpose in (None, name.number)
        ]
        if descending:
            names.reverse()
        if after:
            names = [each for each in names if (each < after if descending else each > after)]
        found: list[StoredFile] = []
        for file_id in names[:limit]:
            try:
                found.append(await self.stat(tenant_id, file_id))
            except NotFound:
                continue
        return found, len(names) > limit

    async def delete(self, tenant_id: str, file_id: str) -> None:
        """Raises NotFound."""
        _named(file_id, "file")
        if not await self._blobs.delete(_folder(tenant_id), file_id):
            raise _missing()

    def note_name(self, text: str, created_s: float, ttl_s: float) -> str:
        """A name that is a function of what is given."""
        tail = hashlib.sha256(text.encode()).hexdigest()[:22]
        return str(_Name("note", int(created_s * 1000), min(int(ttl_s), MAX_TTL_S), 0, tail))

    async def write_note(self, tenant_id: str, name: str, content: bytes) -> None:
        """Writes a small one, whole or not at all."""

        async def parts() -> AsyncIterator[bytes]:
            yield content

        if len(content) > MAX_NOTE_BYTES:
            raise DataCorrupt("A note is too long.")
        await self.write(tenant_id, name, "", parts())

    async def note(self, tenant_id: str, name: str) -> bytes | None:
        """None where there is none."""
        named, most = _named(name, "note"), HEAD_MAX_BYTES + sealing.TAG_BYTES + MAX_NOTE_BYTES
        try:
            # In one piece: between two, it may be written over.
            size_bytes, stored = await self._blobs.read(_folder(tenant_id), name, 0, most)
        except NotFound:
            return None
        opened = sealing.open_head(self._keys, tenant_id, named.bound, size_bytes, stored)
        return opened.chunk(1, stored[opened.place(1)[0] :])

    async def sweep(self) -> int:
        """Deletes what has expired, of all tenants; returns how much that was."""
        now_s, deleted = self._clock.now().timestamp(), 0
        for folder in await self._blobs.folders():
            for each in await self._blobs.list(folder, _LIST_AT_ONCE):
                name = _Name.of(each.name)
                if name is not None and name.expires_s <= now_s:
                    deleted += await self._blobs.delete(folder, each.name)
        return deleted

    async def _open(self, tenant_id: str, name: _Name) -> OpenedHead:
        if name.expires_s <= self._clock.now().timestamp():
            raise _missing()
        size_bytes, begin = await self._blobs.read(_folder(tenant_id), str(name), 0, HEAD_MAX_BYTES)
        return sealing.open_head(self._keys, tenant_id, name.bound, size_bytes, begin)

    async def _chunk(self, tenant_id: str, name: _Name, opened: OpenedHead, number: int) -> bytes:
        start, length = opened.place(number)
        _, sealed = await self._blobs.read(_folder(tenant_id), str(name), start, length)
        return opened.chunk(number, sealed)

    async def _bounded(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        size_bytes = 0
        async for part in parts:
            size_bytes += len(part)
            if size_bytes > self.limits.max_file_bytes:
                raise MessageTooLarge(f"A file may have {self.limits.max_file_bytes} bytes.")
            yield part


def checked_filename(given: str) -> str:
    """What a caller calls a file: kept, and never used as a name. Raises RequestInvalid."""
    if len(given.encode("utf-8", "surrogatepass")) > MAX_FILENAME_BYTES or "\0" in given:
        raise RequestInvalid(f"The file's name has more than {MAX_FILENAME_BYTES} bytes.")
    return given or "file"


def _folder(tenant_id: str) -> str:
    """No tenant's id is a path, whatever it holds."""
    return hashlib.sha256(b"llmos files\0" + tenant_id.encode()).hexdigest()[:32]


def _named(text: str, kind: str = "") -> _Name:
    """Raises NotFound where it is no id of ours, or another kind's."""
    name = _Name.of(text)
    if (
        name is None
        or (kind and name.kind != kind)
        or (name.kind == "file" and name.number not in tuple(Purpose))
    ):
        raise _missing()
    return name


def _described(name: _Name, size_bytes: int, filename: str) -> StoredFile:
    return StoredFile(
        file_id=str(name),
        size_bytes=size_bytes,
        create_time=datetime.fromtimestamp(name.created_ms / 1000, UTC),
        expire_time=datetime.fromtimestamp(name.expires_s, UTC),
        filename=filename,
        purpose=Purpose(name.number),
    )


def _missing() -> NotFound:
    return NotFound("There is no such file.")
