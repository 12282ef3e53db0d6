"""One value of health, and those who follow it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from services.inference.engine.port import Health
from services.mesh.clock import Clock
from services.mesh.errors import NoReplica


class HealthState:
    """Set by a backend; followed by any number of readers, each of which sees at least the latest value."""

    def __init__(self, detail: str) -> None:
        self.value = Health(serving=False, detail=detail)
        self._changed = asyncio.Event()

    def set(self, *, serving: bool, detail: str) -> bool:
        """Returns whether that is news."""
        value = Health(serving, detail)
        if value == self.value:
            return False
        self.value = value
        self._changed.set()
        self._changed = asyncio.Event()
        return True

    async def changes(self) -> AsyncIterator[Health]:
        """The value, then each change."""
        while True:
            value, changed = self.value, self._changed
            yield value
            if value == self.value:
                await changed.wait()

    async def wait_serving(self, timeout_s: float, clock: Clock) -> None:
        """Raises NoReplica where it takes longer."""
        waiting = asyncio.ensure_future(self._serving())
        timer = asyncio.ensure_future(clock.sleep(timeout_s))
        try:
            await asyncio.wait((waiting, timer), return_when=asyncio.FIRST_COMPLETED)
            if not self.value.serving:
                raise NoReplica(f"The engine does not serve: {self.value.detail}.")
        finally:
            waiting.cancel()
            timer.cancel()

    async def _serving(self) -> None:
        async for health in self.changes():
            if health.serving:
                return
