"""Two gateways' limiters on one Valkey that a test kills: what they admit without it, and when it is back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from services.gateway.limits.limiter import NOTHING, Hold, Limit, Refused, asked, used
from services.gateway.limits.redis_limiter import RedisLimiter
from services.gateway.redis import Redis
from services.mesh.clock import SystemClock
from tests.framework.limiters import ONE, limits
from tests.framework.valkey import ValkeyServer
from tests.framework.waiting import eventually


@dataclass
class Gateway:
    """What one of two gateways has."""

    redis: Redis
    limiter: RedisLimiter

    async def take_all(self, on: tuple[Limit, ...]) -> list[Hold]:
        """As many requests of 10 tokens as it lets through."""
        held: list[Hold] = []
        while True:
            try:
                held.append(await self.limiter.reserve(on, ONE, 60))
            except Refused:
                return held

    async def left(self, on: tuple[Limit, ...]) -> list[int]:
        await self.limiter.idle()
        return [stands.remaining for stands in await self.limiter.remaining(on)]


@pytest.fixture
async def gateways(own_valkey: ValkeyServer) -> AsyncIterator[list[Gateway]]:
    made: list[Gateway] = []
    for _ in range(2):
        redis = Redis(own_valkey.url, SystemClock(), timeout_s=2, retry_s=0.05)
        await redis.start()
        made.append(Gateway(redis, RedisLimiter(redis, SystemClock(), replicas=2)))
    yield made
    for gateway in made:
        await gateway.limiter.stop()
        await gateway.redis.stop()


async def back(server: ValkeyServer, gateways: list[Gateway]) -> None:
    server.start()
    for gateway in gateways:
        await eventually(lambda gateway=gateway: gateway.redis.is_available)


async def test_what_one_takes_the_other_lacks(gateways: list[Gateway]) -> None:
    on = limits(concurrent=5, tokens_a_day=100)
    held = await gateways[0].take_all(on)
    assert len(held) == 5
    assert await gateways[1].take_all(on) == []
    gateways[0].limiter.settle(held[0], used(10, 0))
    assert await gateways[0].left(on) == [1, 50]
    assert len(await gateways[1].take_all(on)) == 1


async def test_without_redis_each_keeps_its_share(gateways: list[Gateway], own_valkey: ValkeyServer) -> None:
    on = limits(tokens_a_day=1000)
    for gateway in gateways:
        hold = await gateway.limiter.reserve(on, asked(100, 0), 60)
        gateway.limiter.settle(hold, used(100, 0))
        await gateway.limiter.idle()
    assert await gateways[0].left(on) == [800]
    assert await gateways[1].left(on) == [800]
    own_valkey.kill()
    counts = [len(await gateway.take_all(on)) for gateway in gateways]
    assert counts == [40, 40], "half of the 80 requests that are left, for each"


async def test_more_than_its_share_of_what_runs_at_once_is_refused(
    gateways: list[Gateway], own_valkey: ValkeyServer
) -> None:
    """What a gateway has begun before counts, and one request always goes through."""
    on, one = limits(concurrent=8), limits(concurrent=1)
    held = [await gateways[0].limiter.reserve(on, ONE, 60) for _ in range(3)]
    own_valkey.kill()
    assert len(await gateways[0].take_all(on)) == 1
    assert len(await gateways[1].take_all(on)) == 4
    assert len(await gateways[0].take_all(one)) == 1
    for hold in held:
        gateways[0].limiter.settle(hold, NOTHING)
    assert len(await gateways[0].take_all(on)) == 3


async def test_a_redis_that_has_forgotten_is_told_what_was_used(
    gateways: list[Gateway], own_valkey: ValkeyServer
) -> None:
    on = limits(tpm=60_000, tokens_a_day=100_000)
    hold = await gateways[0].limiter.reserve(on, asked(50_000, 0), 60)
    gateways[0].limiter.settle(hold, used(50_000, 0))
    assert (await gateways[1].left(on))[1] == 50_000
    own_valkey.kill()
    for gateway in gateways:
        hold = await gateway.limiter.reserve(on, asked(1000, 0), 60)
        gateway.limiter.settle(hold, used(1000, 0))
    await back(own_valkey, gateways)
    for gateway in gateways:
        hold = await gateway.limiter.reserve(on, asked(0, 0), 60)
        gateway.limiter.settle(hold, NOTHING)
        await gateway.limiter.idle()
    tpm, tokens = await gateways[0].left(on)
    assert tokens == 100_000 - 50_000 - 2 * 1000
    # 10,000 were left, less what both took, and a thousand a second flow in: not a full bucket
    assert tpm < 45_000
    assert await gateways[1].left(on) == pytest.approx([tpm, tokens], abs=2000)


async def test_what_was_reserved_before_the_loss_is_settled_after_it(
    gateways: list[Gateway], own_valkey: ValkeyServer
) -> None:
    on = limits(concurrent=2, tokens_a_day=1000)
    hold = await gateways[0].limiter.reserve(on, ONE, 60)
    own_valkey.kill()
    gateways[0].limiter.settle(hold, used(7, 0))
    await gateways[0].limiter.idle()
    await back(own_valkey, gateways)
    for gateway in gateways:
        hold = await gateway.limiter.reserve(on, ONE, 60)
        gateway.limiter.settle(hold, NOTHING)
    assert await gateways[1].left(on) == [2, 993]


async def test_keys_are_few_and_each_has_an_end(gateways: list[Gateway]) -> None:
    """However many requests there were: two keys for each limit, and no reservation that has ended."""
    on = limits(rpm=10**6, tpm=10**9, concurrent=50, tokens_a_day=10**9, money_a_month=10**9)
    for number in range(100):
        gateway = gateways[number % 2]
        hold = await gateway.limiter.reserve(on, ONE, 0.01 if number % 10 == 0 else 60)
        if number % 10:
            gateway.limiter.settle(hold, used(5, 50))
    await eventually(lambda: nothing_reserved(gateways[0], on))
    redis = gateways[0].redis
    keys = [key for key in await redis.execute("KEYS", "llmos:limit:*") if on[0].tenant_id.encode() in key]
    assert len(keys) == 5, "no reservation is left, so no set of reservations is"
    for key in keys:
        assert 0 < await redis.execute("PTTL", key) <= 32 * 86_400_000
        assert await redis.execute("HLEN", key) == 3


async def nothing_reserved(gateway: Gateway, on: tuple[Limit, ...]) -> bool:
    await gateway.limiter.idle()
    return not any(stands.reserved for stands in await gateway.limiter.remaining(on))
