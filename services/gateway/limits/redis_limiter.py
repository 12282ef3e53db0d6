"""The limiter in Redis, for several gateways.

With Redis lost, each gateway goes on by itself within its share, from what it last knew of each limit; when
Redis is back it says what it has used meanwhile, and what stood in a Redis that has forgotten everything.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Sequence
from typing import Any

from msgspec import field

from services.gateway.limits import counting
from services.gateway.limits.limiter import MINUTE_S, NOTHING, Amounts, Hold, Limit, Standing
from services.gateway.limits.memory import MemoryLimiter
from services.gateway.limits.script import SCRIPT
from services.gateway.redis import Redis, RedisLost
from services.mesh.clock import Clock
from services.mesh.policy import LimitUnit

PREFIX = "llmos:limit"
SPARE_S = 2 * MINUTE_S
"""Keys live so much longer than they are needed. A bucket that nobody uses is full after a minute."""


class _RedisHold(Hold, eq=False):
    names: list[str] = field(default_factory=list)
    """Of the counters, in the period in which it was made."""
    expires_s: float = 0.0
    lease: Hold | None = None
    """What runs at the same time is also counted here, for when Redis is lost."""


class RedisLimiter:
    """A `Limiter`; a component, to be stopped before Redis is."""

    def __init__(self, redis: Redis, clock: Clock, *, replicas: int) -> None:
        """`replicas`: how many gateways share the limits when Redis is lost."""
        self._redis = redis
        self._clock = clock
        self._local = MemoryLimiter(clock, weight=replicas)
        self._replicas = replicas
        self._owed: dict[str, int] = {}
        """By counter: what was taken here while Redis was lost, and Redis does not know. Of budgets the sum,
        of rates only that there is something."""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Waits until all is settled; the calls to Redis are bounded."""
        await self.idle()

    async def reserve(self, limits: Sequence[Limit], amounts: Amounts, hold_s: float) -> Hold:
        if limits and self._redis.is_available:
            hold = _RedisHold(
                0,
                limits,
                amounts,
                (),
                names=[self._local.name(limit) for limit in limits],
                expires_s=self._clock.monotonic() + hold_s,
            )
            hold.hold_id = secrets.randbits(63)
            asking = self._spawn(self._ask("reserve", hold, amounts))
            try:
                answer = await asyncio.shield(asking)
            except RedisLost:
                pass
            except asyncio.CancelledError:
                # nobody will use what was reserved
                asking.add_done_callback(lambda _: self.settle(hold, NOTHING))
                raise
            else:
                return self._taken(hold, *answer)
        hold_here = self._local.take(limits, amounts, hold_s)
        for limit in limits:
            if limit.is_rate:
                self._owe(self._local.name(limit), 1)
        return hold_here

    def correct(self, hold: Hold, amounts: Amounts) -> None:
        if not isinstance(hold, _RedisHold):
            self._local.correct(hold, amounts)
        elif hold.limits and not hold.settled:
            hold.amounts = amounts
            self._spawn(self._tell("correct", hold, amounts))

    def settle(self, hold: Hold, amounts: Amounts) -> None:
        if hold.settled:
            return
        if isinstance(hold, _RedisHold):
            hold.settled = True
            if hold.lease is not None:
                self._local.settle(hold.lease, NOTHING)
            self._spawn(self._tell("settle", hold, amounts))
            return
        self._local.settle(hold, amounts)
        self._owe_budgets(hold.limits, [self._local.name(limit) for limit in hold.limits], amounts)

    async def remaining(self, limits: Sequence[Limit]) -> list[Standing]:
        names = [self._local.name(limit) for limit in limits]
        if limits and self._redis.is_available:
            try:
                _, found = await self._ask("look", _RedisHold(0, limits, NOTHING, (), names=names), NOTHING)
            except RedisLost:
                pass
            else:
                return self._standings(limits, found)
        return self._local.standings(limits)

    async def idle(self) -> None:
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))

    def _taken(self, hold: _RedisHold, allowed: bool, found: list[tuple[float, int]]) -> Hold:
        hold.standings = self._standings(hold.limits, found)
        if not allowed:
            raise counting.refusal(
                hold.limits,
                [value for value, _ in found],
                [hold.amounts[limit.index] for limit in hold.limits],
                [self._local.left_s(limit) for limit in hold.limits],
                hold.standings,
            )
        leases = [limit for limit in hold.limits if limit.unit is LimitUnit.CONCURRENT_REQUESTS]
        if leases:
            left_s = hold.expires_s - self._clock.monotonic()
            hold.lease = self._local.take(leases, hold.amounts, left_s, force=True)
        return hold

    def _standings(self, limits: Sequence[Limit], found: list[tuple[float, int]]) -> list[Standing]:
        return [
            counting.standing(limit, value, reserved, self._local.left_s(limit))
            for limit, (value, reserved) in zip(limits, found, strict=True)
        ]

    async def _ask(
        self, what: str, hold: _RedisHold, amounts: Amounts
    ) -> tuple[bool, list[tuple[float, int]]]:
        """Whether it was allowed, and (value, reserved) of each limit. Raises RedisLost."""
        hold_s = max(0.0, hold.expires_s - self._clock.monotonic())
        keys: list[str] = []
        arguments: list[str | int | float] = [what, f"h{hold.hold_id:x}", int(hold_s * 1000)]
        owed = [self._owed.pop(name, 0) for name in hold.names]
        for limit, name, owes in zip(hold.limits, hold.names, owed, strict=True):
            key = f"{PREFIX}:{{{limit.tenant_id}}}:{name}"
            keys += (key, f"{key}:holds")
            start = self._start(limit, name, owes)
            ttl_ms = int((hold_s + SPARE_S + self._local.left_s(limit)) * 1000)
            arguments += (int(limit.is_rate), limit.limit, amounts[limit.index], ttl_ms, start, owes)
        try:
            allowed, *answer = await self._redis.evaluate(SCRIPT, keys, arguments)
        except RedisLost:
            for name, owes in zip(hold.names, owed, strict=True):
                self._owe(name, owes)
            raise
        found = [(float(answer[i]), int(float(answer[i + 1]))) for i in range(0, len(answer), 2)]
        for limit, name, (value, _) in zip(hold.limits, hold.names, found, strict=True):
            if name == self._local.name(limit) and limit.unit is not LimitUnit.CONCURRENT_REQUESTS:
                self._local.observe(limit, value)
        return bool(allowed), found

    async def _tell(self, what: str, hold: _RedisHold, amounts: Amounts) -> None:
        try:
            await self._ask(what, hold, amounts)
        except RedisLost:
            # The reservation expires in Redis by itself.
            if what == "settle":
                self._owe_budgets(hold.limits, hold.names, amounts)

    def _start(self, limit: Limit, name: str, owes: int) -> float:
        """What Redis shall begin with where it knows nothing of the limit."""
        if limit.is_rate:
            return self._local.value(limit)
        if not limit.is_budget or name != self._local.name(limit):
            return 0.0
        return max(0.0, self._local.value(limit) - owes * self._replicas)

    def _owe_budgets(self, limits: Sequence[Limit], names: Sequence[str], amounts: Amounts) -> None:
        for limit, name in zip(limits, names, strict=True):
            if limit.is_budget:
                self._owe(name, amounts[limit.index])

    def _owe(self, name: str, amount: int) -> None:
        if amount:
            self._owed[name] = self._owed.get(name, 0) + amount

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Not awaited by the request; bounded by the requests that run, and each by Redis's timeout."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
