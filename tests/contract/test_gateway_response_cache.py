"""Where answers are kept: memory and Redis keep one contract; Redis keeps nobody's text in the clear."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from services.gateway.cache.memory import MemoryCache
from services.gateway.cache.ports import ResponseCache
from services.gateway.cache.redis_cache import PREFIX, RedisCache
from services.gateway.redis import Redis
from services.mesh.clock import ManualClock, SystemClock
from tests.framework.valkey import ValkeyServer
from tests.framework.waiting import eventually

MAX_ENTRY_BYTES = 4096
TTL_S = 0.3
TEXT = b"canary: what a caller was told"


def key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def over(server: ValkeyServer) -> Redis:
    return Redis(server.url, SystemClock(), timeout_s=0.5, retry_s=0.05)


@pytest.fixture
async def redis(own_valkey: ValkeyServer) -> AsyncIterator[Redis]:
    found = over(own_valkey)
    await found.start()
    yield found
    await found.stop()


@pytest.fixture(params=["memory", "valkey"])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[ResponseCache]:
    if request.param == "memory":
        yield MemoryCache(SystemClock(), max_bytes=2**20, max_entry_bytes=MAX_ENTRY_BYTES, ttl_s=TTL_S)
        return
    redis = over(request.getfixturevalue("valkey"))
    await redis.start()
    await redis.execute("FLUSHDB")
    yield RedisCache(redis, max_entry_bytes=MAX_ENTRY_BYTES, ttl_s=TTL_S)
    await redis.stop()


async def test_what_was_put_is_found_by_its_key_alone(cache: ResponseCache) -> None:
    assert await cache.get(key("a")) is None
    await cache.put(key("a"), b"1")
    await cache.put(key("b"), b"2")
    assert [await cache.get(key(name)) for name in "abc"] == [b"1", b"2", None]
    await cache.put(key("a"), b"3")
    assert await cache.get(key("a")) == b"3"


async def test_what_is_too_long_is_not_kept(cache: ResponseCache) -> None:
    longest = random.Random(7).randbytes(MAX_ENTRY_BYTES)
    await cache.put(key("a"), longest)
    assert await cache.get(key("a")) == longest
    await cache.put(key("b"), longest + b"x")
    assert await cache.get(key("b")) is None


async def test_it_is_forgotten_in_time(cache: ResponseCache) -> None:
    await cache.put(key("a"), b"1")

    async def is_gone() -> bool:
        return await cache.get(key("a")) is None

    await eventually(is_gone, timeout_s=5)


# -- memory -------------------------------------------------------------------------------------------------


async def test_memory_is_bounded_and_drops_what_was_not_used_for_longest() -> None:
    cache = MemoryCache(ManualClock(), max_bytes=10_000, max_entry_bytes=MAX_ENTRY_BYTES, ttl_s=60)
    for name in "abcd":
        await cache.put(key(name), bytes(2000))
        await cache.get(key("a"))
    await cache.put(key("e"), bytes(2000))
    assert cache.held_bytes <= 10_000
    assert [await cache.get(key(name)) is not None for name in "abcde"] == [True, False, True, True, True]


async def test_memory_counts_what_it_takes() -> None:
    cache = MemoryCache(ManualClock(), max_bytes=2**30, max_entry_bytes=MAX_ENTRY_BYTES, ttl_s=60)
    seed = 11
    print(f"seed {seed}")
    rng = random.Random(seed)
    tracemalloc.start()
    try:
        before_bytes, _ = tracemalloc.get_traced_memory()
        for _ in range(5000):
            await cache.put(rng.randbytes(32), rng.randbytes(rng.randrange(1, 1000)))
        after_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    used_bytes = after_bytes - before_bytes
    assert 0.8 * cache.held_bytes <= used_bytes <= cache.held_bytes


# -- Redis --------------------------------------------------------------------------------------------------


async def names(redis: Redis) -> list[bytes]:
    found: list[bytes] = await redis.execute("KEYS", PREFIX + b"*")
    return found


async def test_redis_shows_nobody_what_is_kept(redis: Redis) -> None:
    cache = RedisCache(redis, max_entry_bytes=MAX_ENTRY_BYTES, ttl_s=60)
    await cache.put(key("a"), TEXT)
    (name,) = await names(redis)
    stored = await redis.execute("GET", name)
    assert TEXT not in stored
    assert key("a") not in name + stored
    assert key("a").hex().encode() not in name
    assert 0 < await redis.execute("PTTL", name) <= 60_000


async def test_a_value_opens_under_its_own_key_alone(redis: Redis) -> None:
    cache = RedisCache(redis, max_entry_bytes=MAX_ENTRY_BYTES, ttl_s=60)
    await cache.put(key("acme"), TEXT)
    (acme,) = await names(redis)
    await cache.put(key("bolt"), b"theirs")
    (bolt,) = set(await names(redis)) - {acme}
    stored = await redis.execute("GET", acme)
    for forged in (stored, b"", b"short", stored[:-1], bytes([stored[0] ^ 1]) + stored[1:], bytes(10_000)):
        await redis.execute("SET", bolt, forged)
        assert await cache.get(key("bolt")) is None
    assert await cache.get(key("acme")) == TEXT


async def test_a_lost_redis_means_misses(redis: Redis, own_valkey: ValkeyServer) -> None:
    cache = RedisCache(redis, max_entry_bytes=MAX_ENTRY_BYTES, ttl_s=60)
    await cache.put(key("a"), b"1")
    own_valkey.kill()
    assert await cache.get(key("a")) is None
    await cache.put(key("a"), b"2")
    assert await cache.get(key("a")) is None
    own_valkey.start()

    async def is_back() -> bool:
        await cache.put(key("a"), b"3")
        return await cache.get(key("a")) == b"3"

    await eventually(is_back, timeout_s=10)
