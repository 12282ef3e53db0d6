"""In place of a store, where a deployment has none that all its gateways share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from services.gateway.files.ports import Blob
from services.mesh.errors import StateConflict


class NoBlobs:
    """Refuses everything but being looked through."""

    async def start(self) -> None:
        """Nothing to open."""

    async def stop(self) -> None:
        """Nothing to close."""

    async def put(self, folder: str, name: str, parts: AsyncIterator[bytes]) -> None:
        raise _none()

    async def read(self, folder: str, name: str, start: int, max_bytes: int) -> tuple[int, bytes]:
        raise _none()

    async def list(self, folder: str, max_blobs: int, after: str = "") -> Sequence[Blob]:
        raise _none()

    async def rename(self, folder: str, name: str, new_name: str) -> None:
        raise _none()

    async def delete(self, folder: str, name: str) -> bool:
        raise _none()

    async def folders(self) -> Sequence[str]:
        return ()


def _none() -> StateConflict:
    return StateConflict(
        "This deployment has several gateways and no store of files that they share, so it offers no files.",
        hint="Ask your operator to set LLMOS_GATEWAY_FILES_DIR or LLMOS_GATEWAY_FILES_S3_ENDPOINT.",
    )
