"""How many more jobs a tenant may hand in: by the schedule's count of a moment ago, and what was handed in
here since. The schedule keeps the bound exactly; this refuses a caller who would only fill it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from services.gateway.jobs.ports import SchedulePort
from services.mesh.clock import Clock
from services.mesh.errors import ConcurrencyLimit, DependencyUnavailable, QuotaViolation

COUNT_INTERVAL_S = 1.0
COUNT_TIMEOUT_S = 2.0
RETRY_AFTER_S = 5.0
MAX_TENANTS = 10_000


class _Left:
    def __init__(self, left: int) -> None:
        self.left = left
        self.counted_s = float("-inf")
        self.lock = asyncio.Lock()


class Room:
    """Counts by tenant."""

    def __init__(self, schedule: SchedulePort, clock: Clock, *, max_jobs_per_tenant: int) -> None:
        self._schedule = schedule
        self._clock = clock
        self._max_jobs = max_jobs_per_tenant
        self._tenants: OrderedDict[str, _Left] = OrderedDict()

    async def take(self, tenant_id: str) -> None:
        """One more, inside a request of the tenant's. Raises ConcurrencyLimit. Where the schedule is away,
        only the spool's own bound holds."""
        found = self._tenants.setdefault(tenant_id, _Left(self._max_jobs))
        self._tenants.move_to_end(tenant_id)
        while len(self._tenants) > MAX_TENANTS:
            self._tenants.popitem(last=False)
        async with found.lock:
            if self._clock.monotonic() - found.counted_s >= COUNT_INTERVAL_S:
                await self._count(found)
        if found.left <= 0:
            raise ConcurrencyLimit(
                f"The tenant has {self._max_jobs} jobs that have not ended, which is its limit.",
                hint="Wait until some have ended, or cancel some.",
                retry_after_s=RETRY_AFTER_S,
                quota=[QuotaViolation(f"tenant:{tenant_id}", f"at most {self._max_jobs} jobs at once")],
            )
        found.left -= 1

    async def _count(self, found: _Left) -> None:
        try:
            async with asyncio.timeout(COUNT_TIMEOUT_S):
                counts = await self._schedule.count()
        except (DependencyUnavailable, TimeoutError):
            found.left = max(found.left, 1)
            return
        found.left = self._max_jobs - counts.waiting - counts.running
        found.counted_s = self._clock.monotonic()
