"""Admission: who begins, who waits, who is refused and why; permits come back whatever ends a request."""

from __future__ import annotations

import pytest

from services.gateway.admission.permits import Reason
from services.gateway.generation import Priority
from services.mesh import errors
from tests.framework.admissions import Guest, Restaurant, settled


def refused(guest: Guest, error: type[errors.LlmosError] = errors.Overloaded) -> bool:
    assert guest.task.done()
    return type(guest.error) is error


async def test_within_capacity_nobody_waits_and_no_task_is_made() -> None:
    room = Restaurant(2)
    claim = (await room.arrive()).claim
    permit = room.admission.permit(claim)
    entering = permit.__aenter__()
    with pytest.raises(StopIteration):  # it came to its end without waiting for anything
        entering.send(None)
    assert room.admission.running == 2
    await permit.__aexit__(None, None, None)
    await room.close()
    assert (room.admission.running, room.observer.waits_s) == (0, [])


async def test_a_place_that_is_given_back_goes_to_whoever_waits() -> None:
    room = Restaurant(1)
    first, second, third = [await room.arrive() for _ in range(3)]
    assert [guest.at_work for guest in room.guests] == [True, False, False]
    assert (room.admission.running, room.admission.waiting, room.observer.waiting) == (1, 2, 2)
    await room.clock.advance(0.5)
    await room.finish(first)
    assert second.at_work
    assert room.observer.waits_s == [0.5]
    await room.leave(second)
    assert third.at_work
    await room.finish(third)
    assert (room.admission.running, room.admission.waiting, room.observer.waiting) == (0, 0, 0)


async def test_who_leaves_the_queue_frees_its_place_at_once() -> None:
    room = Restaurant(1, max_queued=1)
    first = await room.arrive()
    waiting = await room.arrive("b")
    assert refused(await room.arrive("c"))
    await room.leave(waiting)
    successor = await room.arrive("c")
    assert successor.waits
    await room.finish(first)
    assert successor.at_work
    await room.close()


async def test_leaving_in_the_moment_of_the_grant_passes_the_place_on() -> None:
    room = Restaurant(1)
    first, second, third = [await room.arrive() for _ in range(3)]
    first.done.set()
    second.task.cancel()
    await settled()
    assert third.at_work
    first = third
    fourth = await room.arrive()
    first.task.cancel()  # gives back, and so grants
    fourth.task.cancel()  # before it has seen that
    await settled()
    assert room.admission.running == 0


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    room = Restaurant(1, max_queued=3, max_queued_per_tenant=2)
    await room.arrive("a")
    waiting = [await room.arrive("a"), await room.arrive("a")]
    third = await room.arrive("a")
    assert refused(third)
    assert third.error is not None
    assert (third.error.status, third.error.retry_after_s) == (errors.Status.RESOURCE_EXHAUSTED, 1.0)
    assert all(guest.waits for guest in waiting)
    assert room.observer.refusals == {Reason.QUEUE_FULL: 1}
    await room.close()


async def test_a_flood_gives_way_to_others_in_a_full_queue() -> None:
    room = Restaurant(1, max_queued=4)
    flood = [await room.arrive("flood") for _ in range(5)]
    quiet = [await room.arrive("quiet") for _ in range(3)]
    assert [guest.waits for guest in quiet] == [True, True, False]
    assert refused(quiet[2])
    assert [guest.waits for guest in flood[1:]] == [True, True, False, False]
    assert room.observer.refusals == {Reason.DISPLACED: 2, Reason.QUEUE_FULL: 1}
    await room.close()


async def test_limits_refuse_at_once_what_capacity_would_let_wait() -> None:
    room = Restaurant(2, max_generations=3)
    guests = [await room.arrive() for _ in range(4)]
    assert refused(guests[3], errors.ConcurrencyLimit)
    assert room.observer.refusals == {Reason.CONCURRENCY: 1}
    await room.close()


@pytest.mark.parametrize(("limit", "other"), [("tenant_share", {"tenant": "b"}), ("key_share", {"key": "l"})])
async def test_a_share_is_a_limit(limit: str, other: dict[str, str]) -> None:
    room = Restaurant(4, **{limit: 0.5})
    first, _, third = [await room.arrive() for _ in range(3)]
    assert refused(third, errors.ConcurrencyLimit)
    assert (await room.arrive(**other)).at_work
    await room.finish(first)
    assert (await room.arrive()).at_work
    assert refused(await room.arrive(), errors.ConcurrencyLimit)
    assert room.observer.refusals == {Reason.SHARE: 2}
    await room.close()
    assert (await room.arrive(sequences=3)).at_work  # who has nothing may always have something


async def test_choices_take_places() -> None:
    room = Restaurant(4)
    three = await room.arrive(sequences=3)
    two = await room.arrive(sequences=2)
    one = await room.arrive()
    assert (three.at_work, two.waits, one.waits) == (
        True,
        True,
        True,
    )  # nobody passes it by
    await room.finish(three)
    assert two.at_work
    assert one.at_work
    huge = await room.arrive(sequences=100)
    assert huge.waits
    await room.finish(one)
    await room.finish(two)
    assert huge.at_work  # alone
    await room.close()


async def test_interactive_goes_first_and_batch_does_not_starve() -> None:
    room = Restaurant(1, batch_ageing_s=3, max_queue_wait_s=100)
    working = await room.arrive()
    batch = [await room.arrive("b", priority=Priority.BATCH) for _ in range(2)]
    begun: list[str] = []
    for _ in range(8):
        await room.arrive("a")
        await room.clock.advance(1)
        await room.finish(working)
        (working,) = room.at_work
        begun.append(working.claim.tenant_id)
    assert begun == ["a", "a", "b", "a", "a", "b", "a", "a"]
    assert all(guest.task.done() for guest in batch)
    await room.close()


async def test_interactive_takes_the_place_of_batch_in_a_full_queue() -> None:
    room = Restaurant(1, max_queued=1)
    await room.arrive()
    batch = await room.arrive("b", priority=Priority.BATCH)
    assert (await room.arrive("c")).waits
    assert refused(batch)
    await room.close()


async def test_r12_a_wait_ends_where_the_deadline_can_no_longer_be_met() -> None:
    room = Restaurant(1)
    first = await room.arrive()
    late = await room.arrive(within_s=2)
    assert late.waits
    await room.clock.advance(2)
    assert refused(late)
    assert late.begun_s is None
    assert room.observer.refusals == {Reason.DEADLINE: 1}
    await room.finish(first)
    await room.close()


async def test_r12_the_time_to_the_first_token_counts() -> None:
    room = Restaurant(1)
    claim = (await room.arrive()).claim
    await room.close()
    async with room.admission.permit(claim) as permit:
        await room.clock.advance(1.5)
        permit.first_token(room.clock.monotonic())
    for _ in range(60):  # the first one was at once; the mean follows
        async with room.admission.permit(claim) as permit:
            await room.clock.advance(1.5)
            permit.first_token(room.clock.monotonic())
    holder = await room.arrive()
    late = await room.arrive(within_s=4)
    assert late.waits
    await room.clock.advance(3)  # what is left is less than a first token takes
    assert refused(late)
    await room.leave(holder)
    assert refused(await room.arrive(within_s=0), errors.DeadlineExceeded)


async def test_r12_who_would_wait_too_long_is_told_on_arrival() -> None:
    room = Restaurant(1, max_queue_wait_s=3)
    for _ in range(3):
        guest = await room.arrive()
        await room.clock.advance(2)  # a place is held for 2 s
        await room.finish(guest)
    await room.arrive()
    assert refused(await room.arrive(within_s=1))
    assert (await room.arrive()).waits
    fourth = await room.arrive()
    assert refused(fourth)
    assert fourth.error is not None
    assert fourth.error.retry_after_s == 2
    assert (await room.arrive("b")).waits is False  # one stands before it: 4 s in all
    assert room.observer.refusals == {Reason.DEADLINE: 1, Reason.WAIT: 2}
    await room.close()


async def test_r12_who_may_wait_too_long_is_told_on_arrival_too() -> None:
    """Waits vary: what would just be in time on average is not let in, to be refused later."""
    room = Restaurant(1, max_queue_wait_s=2.5)
    for _ in range(3):
        guest = await room.arrive()
        await room.clock.advance(2)
        await room.finish(guest)
    await room.arrive()
    assert refused(await room.arrive())
    assert room.observer.refusals == {Reason.WAIT: 1}
    await room.close()


async def test_r12_a_wait_has_an_end_though_nothing_was_measured() -> None:
    room = Restaurant(1, max_queue_wait_s=3)
    await room.arrive()
    waiting = await room.arrive()
    await room.clock.advance(2.9)
    assert waiting.waits
    await room.clock.advance(0.1)
    assert refused(waiting)
    assert room.observer.refusals == {Reason.WAIT: 1}
    await room.close()


async def test_a_replica_that_comes_or_goes_changes_what_fits() -> None:
    room = Restaurant(1)
    first, second, third, fourth = [await room.arrive() for _ in range(4)]
    await room.set_capacity(3)
    assert (second.at_work, third.at_work, fourth.waits) == (True, True, True)
    await room.set_capacity(1)
    await room.finish(first)
    assert fourth.waits
    await room.set_capacity(None)
    assert fourth.at_work  # nobody waits for what is not there: routing says what is wrong
    await room.close()


async def test_models_do_not_wait_for_each_other_and_unknown_ones_leave_nothing() -> None:
    room = Restaurant(1)
    await room.arrive()
    unknown = [await room.arrive(model=f"unknown-{i}") for i in range(50)]
    assert all(guest.at_work for guest in unknown)
    await room.close()
    assert len(room.admission._pools) == 1
