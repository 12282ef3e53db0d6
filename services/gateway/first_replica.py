"""A gateway that comes up beside its replicas waits a moment for one of them."""

from __future__ import annotations

import asyncio

from services.gateway.routing import Router
from services.mesh.clock import Clock
from services.mesh.health import Health

FIRST_REPLICA = "first replica"
FIRST_REPLICA_WAIT_S = 10.0


class FirstReplica:
    """Holds readiness back until a replica was found, as a component: a gateway that comes up beside its
    replicas refuses nobody. Not for long: where all are away, callers shall hear that from the gateway."""

    def __init__(self, router: Router, health: Health, clock: Clock) -> None:
        self._router = router
        self._health = health
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._wait(), name="first-replica")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _wait(self) -> None:
        waits = [
            asyncio.ensure_future(self._router.found.wait()),
            asyncio.ensure_future(self._clock.sleep(FIRST_REPLICA_WAIT_S)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        await self._health.set_part(FIRST_REPLICA, ready=True)
