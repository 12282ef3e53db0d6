"""Deletes files that have expired, now and then: they are gone for their owners before."""

from __future__ import annotations

import asyncio
import logging

from services.gateway.files.store import FileStore
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError

logger = logging.getLogger(__name__)

INTERVAL_S = 3600.0


class FileSweeper:
    """A component."""

    def __init__(self, files: FileStore, clock: Clock) -> None:
        self._files = files
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="files-sweep")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                if deleted := await self._files.sweep():
                    logger.info("%d files had expired", deleted)
            except LlmosError as error:
                logger.warning("expired files were not deleted: %s", error.reason)
            await self._clock.sleep(INTERVAL_S)
