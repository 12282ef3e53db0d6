"""Remembers when API keys were last used: in memory first, written at most every minute."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime

from services.auth.store import Store
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
MAX_KEYS = 10_000


class LastUse:
    """A component. What is not written yet is lost with a crash: it is a help, and no record."""

    def __init__(self, store: Store, clock: Clock, *, max_keys: int = MAX_KEYS) -> None:
        """Of more than `max_keys` keys within one interval, those that come last are passed over."""
        self._store = store
        self._clock = clock
        self._max_keys = max_keys
        self._used: dict[str, datetime] = {}
        self._writing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._writing = asyncio.create_task(self._write_for_ever(), name="last-use")

    async def stop(self) -> None:
        """Writes what there is. The store must still be open."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        await self.flush()

    def note(self, key_id: str) -> None:
        """The key is used now."""
        if key_id in self._used or len(self._used) < self._max_keys:
            self._used[key_id] = self._clock.now().replace(second=0, microsecond=0)

    async def flush(self) -> None:
        """Writes what there is; keeps it where the store cannot take it now."""
        used, self._used = self._used, {}
        if not used:
            return
        try:
            await self._store.used(used)
        except LlmosError as error:
            log.warning("the last use of %d keys could not be written yet: %s", len(used), error)
            self._used = used | self._used

    async def _write_for_ever(self) -> None:
        while True:
            await self._clock.sleep(INTERVAL_S)
            await self.flush()
