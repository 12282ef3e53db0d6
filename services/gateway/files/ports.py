"""What files need of the world: somewhere to put bytes, and keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

READ_MAX_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Blob:
    """Something that is stored."""

    name: str
    size_bytes: int


class Blobs(Protocol):
    """Stores bytes under names in folders. Folders and names are of our own making: `[a-z0-9-]`, 64 at most.

    Everything raises DependencyUnavailable where the store does not do it."""

    async def start(self) -> None:
        """Raises StartError where it cannot be used."""

    async def stop(self) -> None: ...

    async def put(self, folder: str, name: str, parts: AsyncIterator[bytes]) -> None:
        """Whole or not at all, in place of what was there; on durable storage when it returns. What `parts`
        raises comes out as it is."""

    async def read(self, folder: str, name: str, start: int, max_bytes: int) -> tuple[int, bytes]:
        """The size of all of it, and what there is from `start` on; READ_MAX_BYTES at most. Raises
        NotFound."""

    async def list(self, folder: str, max_blobs: int, after: str = "") -> Sequence[Blob]:
        """By name, those after the one that is named; none where there is no such folder."""

    async def rename(self, folder: str, name: str, new_name: str) -> None:
        """Raises NotFound."""

    async def delete(self, folder: str, name: str) -> bool:
        """Whether it was there."""

    async def folders(self) -> Sequence[str]:
        """Those that hold something."""


class FileKeys(Protocol):
    """Keys that only gateways have."""

    @property
    def key_id(self) -> str:
        """The one that seals now."""

    def derive(self, key_id: str, tenant_id: str, info: bytes) -> bytes:
        """32 bytes, another for each tenant and `info`. Raises DataCorrupt where there is no such key."""
