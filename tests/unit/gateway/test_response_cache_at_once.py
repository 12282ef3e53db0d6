"""Equal requests at the same time: one is computed, the others follow it, and nobody hangs."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from services.gateway.generation import Delta, EngineStarted, Finished, FinishReason, Started, Usage
from services.mesh import errors
from services.mesh.events import Outcome
from tests.framework.cached import TIMEOUT_S, asked, bench_of, computed
from tests.framework.gateway_fakes import Gate, Step, answer


async def come_to_rest() -> None:
    """Everything that can go on without a gate has."""
    for _ in range(30):
        await asyncio.sleep(0)


async def test_equal_requests_at_once_share_one_generation_live() -> None:
    gate = Gate()
    bench = bench_of([*answer("Hel")[:-1], gate, *answer("lo", first_seq=2)[1:]])
    requests = [asked(bench) for _ in range(5)]
    tasks = [asyncio.create_task(request.run()) for request in requests]
    for request in requests:
        await request.until(1)  # while the leader has no more than that
    gate.open.set()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*tasks)
    assert computed(bench) == 1
    assert [request.text for request in requests] == ["Hello"] * 5
    assert [[delta.seq for delta in request.deltas] for request in requests] == [[1, 2]] * 5
    assert [request.status for request in requests] == ["miss", "hit", "hit", "hit", "hit"]
    assert sum(request.ended.usage.completion_tokens for request in requests) == 1
    assert len({request.ended.facts.request_id for request in requests}) == 5
    assert bench.cache._flights.held_bytes == len(bench.cache._flights) == 0


async def test_one_who_comes_late_gets_the_beginning_too() -> None:
    gate = Gate()
    bench = bench_of([*answer("a", "b", "c")[:-1], gate, *answer("d", first_seq=4)[1:]])
    first, late = asked(bench), asked(bench)
    task = asyncio.create_task(first.run())
    await first.until(3)
    later = asyncio.create_task(late.run())
    await late.until(3)
    gate.open.set()
    await asyncio.gather(task, later)
    assert late.text == first.text == "abcd"


@pytest.mark.parametrize("seen", [0, 1], ids=["before the first token", "in mid-answer"])
@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_follower_takes_over_from_a_lost_leader(seen: int, how: str) -> None:
    gate = Gate()
    beginning = answer("Hel")[:-1] if seen else []
    lost: list[Step] = [*beginning, gate, errors.EngineFault("broken")]
    # The second time it comes in other pieces: what counts is the text.
    bench = bench_of(lost, answer("H", "el", "lo"))
    requests = [asked(bench) for _ in range(3)]
    if seen:  # the same tokens as above
        bench.replicas[0].scripts[1] = [
            EngineStarted("rev-1", 7, "replica-0"),
            Delta(1, 0, "H", ()),
            Delta(2, 0, "ello", (100, 101)),
            Finished((FinishReason.STOP,), Usage(7, 2)),
        ]
    tasks = [asyncio.create_task(request.run()) for request in requests]
    await gate.reached.wait()
    for request in requests[1:]:
        await request.until(seen)
    await come_to_rest()
    if how == "cancelled":
        tasks[0].cancel()
    else:
        gate.open.set()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*tasks, return_exceptions=True)
    assert computed(bench) == 2
    assert [request.text for request in requests[1:]] == ["Hello"] * 2
    for request in requests[1:]:
        assert [delta.seq for delta in request.deltas] == list(range(1, len(request.deltas) + 1))
        assert [isinstance(event, Started) for event in request.events].count(True) == 1
        assert request.ended.outcome is Outcome.SUCCEEDED
    # One of the two had it computed, the other shared it.
    assert sorted(request.ended.served_from_cache for request in requests[1:]) == [False, True]
    assert requests[0].ended.outcome is (Outcome.CANCELLED if how == "cancelled" else Outcome.FAILED)
    assert bench.cache._flights.held_bytes == len(bench.cache._flights) == 0


async def test_an_answer_that_begins_otherwise_the_second_time_is_not_glued_together() -> None:
    gate = Gate()
    bench = bench_of([*answer("Hel")[:-1], gate, errors.EngineFault("broken")], answer("Good", "bye"))
    leader, follower = asked(bench), asked(bench)
    tasks = [asyncio.create_task(request.run()) for request in (leader, follower)]
    await follower.until(1)
    gate.open.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [errors.EngineFault, errors.ReplicaLost]
    assert follower.text == "Hel"


async def test_many_followers_of_leaders_that_all_fail_come_to_an_end() -> None:
    bench = bench_of([errors.EngineFault("broken")], max_concurrent=64)
    requests = [asked(bench) for _ in range(20)]
    async with asyncio.timeout(TIMEOUT_S):
        results = await asyncio.gather(*(request.run() for request in requests), return_exceptions=True)
    assert {type(result) for result in results} == {errors.EngineFault}
    assert len(bench.audit.ended) == 20


async def test_a_leader_that_is_refused_leaves_nobody_waiting() -> None:
    bench = bench_of(max_concurrent=1)
    async with bench.permit():
        results = await asyncio.gather(*(asked(bench).run() for _ in range(3)), return_exceptions=True)
    assert {type(result) for result in results} == {errors.ConcurrencyLimit}
    assert (await asked(bench).run()).status == "miss"


async def test_a_follower_that_leaves_disturbs_nobody() -> None:
    gate = Gate()
    bench = bench_of([*answer("Hel")[:-1], gate, *answer("lo", first_seq=2)[1:]])
    leader, leaver, other = (asked(bench) for _ in range(3))
    tasks = [asyncio.create_task(request.run()) for request in (leader, leaver, other)]
    await leaver.until(1)
    tasks[1].cancel()
    with suppress(asyncio.CancelledError):
        await tasks[1]
    gate.open.set()
    await asyncio.gather(tasks[0], tasks[2])
    assert (leader.text, other.text, computed(bench)) == ("Hello", "Hello", 1)
    assert leaver.ended.outcome is Outcome.CANCELLED


async def test_one_that_wants_a_new_answer_follows_nobody() -> None:
    gate = Gate()
    bench = bench_of([gate, *answer("old")], answer("new"))
    first = asyncio.create_task(asked(bench).run())
    await gate.reached.wait()
    second = await asked(bench, "no-cache").run()
    assert second.text == "new"
    gate.open.set()
    assert (await first).text == "old"


async def test_what_is_on_its_way_is_bounded() -> None:
    gate = Gate()
    bench = bench_of(
        [*answer("x" * 2000, "y")[:-1], gate, *answer("z", first_seq=3)[1:]], max_flight_bytes=4096
    )
    requests = [asked(bench) for _ in range(3)]
    tasks = [asyncio.create_task(request.run()) for request in requests]
    for request in requests:
        await request.until(2)
    assert bench.cache.held_bytes == 0
    gate.open.set()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*tasks)
    assert {request.text for request in requests} == {"x" * 2000 + "yz"}
    assert computed(bench) == 3


async def test_who_reads_along_does_not_wait_for_one_who_does_not() -> None:
    gate = Gate()
    bench = bench_of([*answer("Hel")[:-1], gate, *answer("lo", first_seq=2)[1:]])
    whole, streamed, also_whole = asked(bench, whole=True), asked(bench), asked(bench, whole=True)
    tasks = [asyncio.create_task(request.run()) for request in (whole, streamed, also_whole)]
    await streamed.until(1)
    gate.open.set()
    await asyncio.gather(*tasks)
    assert [request.status for request in (whole, streamed, also_whole)] == ["miss", "miss", "hit"]
    assert {request.text for request in (whole, streamed, also_whole)} == {"Hello"}
    assert computed(bench) == 2
