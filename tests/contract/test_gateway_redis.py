"""How the gateway holds Redis, on a real Valkey: what it loses, it loses fast, and finds again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from services.gateway.redis import Redis, RedisLost, Script, connect
from services.gateway.settings import GatewaySettings
from services.mesh.app import StartError
from services.mesh.clock import SystemClock
from services.mesh.settings import describe
from tests.framework.valkey import ValkeyServer
from tests.framework.waiting import eventually

ADD = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")


def over(server: ValkeyServer, *, timeout_s: float = 0.5, max_connections: int = 8) -> Redis:
    return Redis(
        server.url, SystemClock(), timeout_s=timeout_s, retry_s=0.05, max_connections=max_connections
    )


@pytest.fixture
async def redis(own_valkey: ValkeyServer) -> AsyncIterator[Redis]:
    found = over(own_valkey)
    await found.start()
    yield found
    await found.stop()


async def test_commands_and_scripts_are_answered(redis: Redis) -> None:
    assert await redis.execute("SET", "a", "1") == b"OK"
    assert await redis.evaluate(ADD, ["a"], [2]) == 3
    assert await redis.evaluate(ADD, ["a"], [3]) == 6
    assert await redis.execute("GET", "nothing") is None


async def test_more_calls_than_connections_wait_for_each_other(own_valkey: ValkeyServer) -> None:
    redis = over(own_valkey, max_connections=2, timeout_s=5)
    await redis.start()
    try:
        await asyncio.gather(*(redis.evaluate(ADD, ["sum"], [1]) for _ in range(100)))
        assert await redis.execute("GET", "sum") == b"100"
        clients = await redis.execute("CLIENT", "LIST")
        assert clients.count(b" addr=") in (1, 2)
    finally:
        await redis.stop()


async def test_a_redis_that_is_killed_fails_fast_and_is_found_again(
    redis: Redis, own_valkey: ValkeyServer
) -> None:
    await redis.evaluate(ADD, ["a"], [1])
    own_valkey.kill()
    for _ in range(50):
        with pytest.raises(RedisLost):
            await redis.execute("GET", "a")
    own_valkey.start()
    await eventually(lambda: redis.is_available)
    # each connection of the life before would fail one more call
    answers = await asyncio.gather(*(redis.evaluate(ADD, ["a"], [1]) for _ in range(20)))
    assert sorted(answers) == list(range(1, 21))


async def test_a_redis_that_answers_nothing_is_waited_for_once(
    redis: Redis, own_valkey: ValkeyServer
) -> None:
    own_valkey.freeze()
    begun_s = time.monotonic()
    for _ in range(100):
        with pytest.raises(RedisLost):
            await redis.execute("GET", "a")
    assert time.monotonic() - begun_s < 2, "each call waited, not only the first"
    own_valkey.thaw()
    await eventually(lambda: redis.is_available)
    assert await redis.execute("GET", "a") is None


async def test_a_gateway_starts_without_redis_and_finds_it_later(own_valkey: ValkeyServer) -> None:
    own_valkey.kill()
    redis = over(own_valkey)
    await redis.start()
    try:
        assert not redis.is_available
        own_valkey.start()
        await eventually(lambda: redis.is_available)
        assert await redis.execute("ECHO", "hello") == b"hello"
    finally:
        await redis.stop()
    with pytest.raises(RedisLost):
        await redis.execute("ECHO", "hello")


def settings(folder: Path, **given: object) -> GatewaySettings:
    return GatewaySettings(state_dir=folder, service_secret_file=folder / "secret", **given)  # type: ignore[arg-type]


async def test_the_password_comes_from_a_file_and_is_told_nobody(
    own_valkey: ValkeyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "password").write_text("canary-password\n")
    url = SecretStr(f"redis://127.0.0.1:{own_valkey.port}/0")
    redis = connect(
        settings(tmp_path, redis_url=url, redis_password_file=tmp_path / "password"), SystemClock()
    )
    assert redis is not None
    await redis.start()
    assert redis.is_available
    own_valkey.kill()
    with pytest.raises(RedisLost):
        await redis.execute("GET", "a")
    await redis.stop()
    with_password = settings(tmp_path, redis_url=SecretStr(own_valkey.url))
    assert not [line for line in describe(with_password) if "canary-password" in line]
    assert "canary-password" not in caplog.text


async def test_nothing_is_connected_unless_it_is_set(tmp_path: Path) -> None:
    assert connect(settings(tmp_path), SystemClock()) is None
    with pytest.raises(StartError, match="REDIS_PASSWORD_FILE"):
        connect(
            settings(
                tmp_path, redis_url=SecretStr("redis://localhost"), redis_password_file=tmp_path / "none"
            ),
            SystemClock(),
        )


def test_a_url_that_is_none_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(tmp_path, redis_url=SecretStr("http://:canary@localhost"))
    assert "redis://host:port/0" in str(caught.value)
    assert "canary" not in str(caught.value)
