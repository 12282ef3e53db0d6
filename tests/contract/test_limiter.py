"""What every limiter keeps: the one in memory, and the one in Redis on a real Valkey.

Time of the first is moved by hand; Valkey's own goes on by itself, so what has to wait for it waits little.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.limits.limiter import NOTHING, Amounts, Hold, Refused, asked, used
from services.gateway.limits.memory import MemoryLimiter
from services.gateway.limits.redis_limiter import RedisLimiter
from services.gateway.redis import Redis
from services.mesh.clock import ManualClock, SystemClock
from services.mesh.policy import LimitUnit
from tests.framework.limiters import ONE, Under, limits
from tests.framework.valkey import ValkeyServer


@pytest.fixture(params=["memory", "redis"])
async def under(request: pytest.FixtureRequest) -> AsyncIterator[Under]:
    if request.param == "memory":
        clock = ManualClock()
        yield Under(MemoryLimiter(clock), clock.advance)
        return
    server: ValkeyServer = request.getfixturevalue("valkey")
    redis = Redis(server.url, SystemClock(), timeout_s=5)
    await redis.start()
    shared = RedisLimiter(redis, SystemClock(), replicas=2)
    yield Under(shared, asyncio.sleep)
    await shared.stop()
    await redis.stop()


async def test_a_bucket_gives_what_it_holds_and_then_what_flows_in(under: Under) -> None:
    on = limits(rpm=600)  # 10 a second
    admitted = 0
    begun_s = time.monotonic()
    while await under.admits(on, ONE):
        admitted += 1
    flowed = (time.monotonic() - begun_s) * 10 + 1
    assert 600 <= admitted <= 600 + flowed
    with pytest.raises(Refused) as caught:
        await under.limiter.reserve(on, ONE, 60)
    assert caught.value.wait_s is not None
    assert 0 < caught.value.wait_s <= 0.1
    await under.pass_time(0.15)
    assert await under.admits(on, ONE)


async def test_tokens_are_reserved_corrected_and_settled(under: Under) -> None:
    on = limits(tpm=60, tokens_a_day=1000, money_a_month=5000)
    hold = await under.limiter.reserve(on, asked(50, 500), 60)
    assert await under.reserved(on) == [50, 50, 500]
    under.limiter.correct(hold, asked(40, 400))
    assert await under.reserved(on) == [40, 40, 400]
    under.limiter.settle(hold, used(15, 150))
    assert await under.reserved(on) == [0, 0, 0]
    left = await under.left(on)
    assert 45 <= left[0] <= 50  # a token a second flows in
    assert left[1:] == [985, 4850]


async def test_nothing_is_taken_where_one_limit_refuses(under: Under) -> None:
    on = limits(rpm=100, tpm=5, concurrent=3)
    with pytest.raises(Refused) as caught:
        await under.limiter.reserve(on, ONE, 60)
    assert caught.value.limit is on[1]
    assert caught.value.wait_s is None, "10 tokens are never within a limit of 5"
    assert await under.left(on) == [100, 5, 3]


async def test_r11_no_more_at_once_than_allowed(under: Under) -> None:
    on = limits(concurrent=2)
    for _ in range(10):
        tries = await asyncio.gather(
            *(under.limiter.reserve(on, ONE, 60) for _ in range(10)), return_exceptions=True
        )
        held = [found for found in tries if isinstance(found, Hold)]
        assert len(held) == 2
        assert all(isinstance(found, Hold | Refused) for found in tries)
        for hold in held:
            under.limiter.settle(hold, used(10, 0))
        assert await under.left(on) == [2]


async def test_what_is_given_back_is_whole_again(under: Under) -> None:
    on = limits(rpm=10, tpm=100, concurrent=2, tokens_a_day=100, money_a_month=1000)
    hold = await under.limiter.reserve(on, ONE, 60)
    under.limiter.settle(hold, NOTHING)
    assert await under.left(on) == [10, 100, 2, 100, 1000]


async def test_settling_twice_is_settling_once(under: Under) -> None:
    on = limits(tokens_a_day=100)
    hold = await under.limiter.reserve(on, ONE, 60)
    under.limiter.settle(hold, used(5, 0))
    under.limiter.settle(hold, used(5, 0))
    under.limiter.settle(hold, NOTHING)
    under.limiter.correct(hold, asked(50, 0))
    assert await under.left(on) == [95]
    assert await under.reserved(on) == [0]


async def test_more_may_be_used_than_was_reserved_and_is_owed(under: Under) -> None:
    on = limits(tpm=60, tokens_a_day=20)
    hold = await under.limiter.reserve(on, ONE, 60)
    under.limiter.settle(hold, used(90, 0))
    assert await under.left(on) == [0, 0]
    with pytest.raises(Refused) as caught:
        await under.limiter.reserve(on, asked(1, 0), 60)
    assert caught.value.limit is on[1]


async def test_a_reservation_that_nobody_settles_expires(under: Under) -> None:
    """As when its gateway dies."""
    on = limits(rpm=10, tpm=10, concurrent=1, tokens_a_day=10, money_a_month=100)
    hold = await under.limiter.reserve(on, ONE, 0.2)
    assert await under.left(on) == [9, 0, 0, 0, 0]
    await under.pass_time(1.2)
    assert await under.reserved(on) == [0, 0, 0, 0, 0]
    assert await under.left(on) == [10, 10, 1, 10, 100]
    # its work was done all the same
    under.limiter.settle(hold, used(4, 40))
    assert (await under.left(on))[2:] == [1, 6, 60]


async def test_a_budget_that_is_spent_says_when_it_is_renewed(under: Under) -> None:
    on = limits(money_a_month=150)
    await under.limiter.reserve(on, ONE, 60)
    with pytest.raises(Refused) as caught:
        await under.limiter.reserve(on, ONE, 60)
    assert caught.value.wait_s is not None
    assert 0 < caught.value.wait_s <= 31 * 86400
    assert caught.value.remaining == 50


async def test_a_limit_of_nothing_refuses_everything(under: Under) -> None:
    for on in (limits(rpm=0), limits(concurrent=0), limits(tokens_a_day=0)):
        with pytest.raises(Refused) as caught:
            await under.limiter.reserve(on, ONE, 60)
        assert caught.value.wait_s is None
        assert await under.left(on) == [0]


async def test_no_limits_let_everything_through(under: Under) -> None:
    hold = await under.limiter.reserve((), ONE, 60)
    under.limiter.settle(hold, used(1, 1))
    assert await under.limiter.remaining(()) == []


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, 60)),
        st.tuples(st.just("correct"), st.integers(0, 60)),
        st.tuples(st.just("settle"), st.integers(0, 80)),
        st.tuples(st.just("give back"), st.just(0)),
    ),
    max_size=40,
)


@settings(
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(actions=ACTIONS, picks=st.randoms(use_true_random=False))
async def test_nothing_leaks_whatever_happens(
    under: Under, actions: list[tuple[str, int]], picks: Any
) -> None:
    """After any sequence nothing is reserved, what is settled equals the usage, and never was more let
    through than a limit allows."""
    on = limits(rpm=10**9, concurrent=4, tokens_a_day=500, money_a_month=50_000)
    held: list[Hold] = []
    usage = 0
    for what, tokens in actions:
        if what == "reserve":
            sums, running = usage, len(held)
            outstanding = sum(hold.amounts[LimitUnit.TOKENS_PER_MINUTE] for hold in held)
            try:
                hold = await under.limiter.reserve(on, asked(tokens, tokens * 100), 600)
            except Refused:
                assert running == 4 or sums + outstanding + tokens > 500
            else:
                assert running < 4
                assert sums + outstanding + tokens <= 500
                held.append(hold)
        elif held:
            if what == "correct":
                under.limiter.correct(picks.choice(held), asked(tokens, tokens * 100))
            else:
                hold = held.pop(picks.randrange(len(held)))
                amounts: Amounts = used(tokens, tokens * 100) if what == "settle" else NOTHING
                under.limiter.settle(hold, amounts)
                usage += amounts[LimitUnit.TOKENS_PER_MINUTE]
            await under.limiter.idle()
    for hold in held:
        under.limiter.settle(hold, NOTHING)
    assert await under.reserved(on) == [0, 0, 0, 0]
    assert (await under.left(on))[1:] == [4, max(0, 500 - usage), max(0, 50_000 - usage * 100)]
