"""A gateway that comes up beside its replicas waits a moment for one of them."""

from __future__ import annotations

import asyncio

from services.gateway.routing import Router
from services.mesh.clock import Clock, wait_at_most
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
        await wait_at_most(self._clock, self._router.found, FIRST_REPLICA_WAIT_S)
        await self._health.set_part(FIRST_REPLICA, ready=True)
