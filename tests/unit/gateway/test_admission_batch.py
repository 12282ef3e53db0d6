"""Batch leaves room: never has all places of a model, and is asked for no more than can begin."""

from __future__ import annotations

import pytest

from services.gateway.generation import Priority
from services.gateway.jobs.ports import JobClaim, ScheduledJob
from services.gateway.jobs.working.places import Places
from services.gateway.jobs.working.ports import Attempt
from services.mesh.jobs import JobState
from tests.framework.admissions import MODEL, Restaurant
from tests.framework.schedule_jobs import requested


@pytest.mark.parametrize(
    ("capacity", "share", "gateways", "places"),
    [(1, 0.875, 1, 1), (2, 0.875, 1, 1), (8, 0.875, 1, 7), (8, 1.0, 1, 7), (16, 0.875, 2, 7), (2, 0.5, 4, 1)],
)
async def test_its_places(capacity: int, share: float, gateways: int, places: int) -> None:
    room = Restaurant(capacity, batch_share=share, gateways=gateways)
    assert room.admission.batch_room([MODEL]).places == places
    for _ in range(capacity + 2):
        await room.arrive(priority=Priority.BATCH)
    assert len(room.at_work) == places
    assert room.admission.batch_room([MODEL]).free == 0
    await room.close()


@pytest.mark.parametrize(("gateways", "places"), [(1, 8), (2, 4)])
async def test_it_has_all_places_once_nobody_has_waited_for_an_answer_for_long(
    gateways: int, places: int
) -> None:
    room = Restaurant(8, batch_share=0.5, gateways=gateways, batch_alone_after_s=60)
    await room.finish(await room.arrive(priority=Priority.INTERACTIVE))
    await room.clock.advance(59.9)
    assert room.admission.batch_room([MODEL]).places == places // 2
    await room.clock.advance(0.1)
    assert room.admission.batch_room([MODEL]).places == places
    guests = [await room.arrive(priority=Priority.BATCH) for _ in range(places)]
    assert len(room.at_work) == places
    # The first who comes has the next place, and batch comes down to its share.
    interactive = [await room.arrive(priority=Priority.INTERACTIVE) for _ in range(gateways)]
    waiting = [await room.arrive(priority=Priority.BATCH) for _ in range(2)]
    for guest in guests[: places // 2]:
        await room.finish(guest)
    assert all(guest.at_work for guest in interactive)
    assert not any(guest.at_work for guest in waiting)
    await room.finish(guests[-1])
    assert [guest.at_work for guest in waiting] == [True, False]
    await room.close()


async def test_an_interactive_request_begins_at_once_while_batch_waits_for_its_share() -> None:
    room = Restaurant(4, batch_share=0.5)
    for _ in range(5):
        await room.arrive(priority=Priority.BATCH)
    assert (len(room.at_work), len(room.waiting)) == (2, 3)
    await room.arrive(priority=Priority.INTERACTIVE)
    await room.arrive(priority=Priority.INTERACTIVE)
    assert (len(room.at_work), len(room.waiting)) == (4, 3)
    await room.close()


async def test_there_is_room_where_nobody_has_been_yet_and_none_where_no_replica_is() -> None:
    room = Restaurant(8)
    assert room.admission.batch_room([MODEL]).free == 7
    await room.arrive(priority=Priority.INTERACTIVE)
    assert room.admission.batch_room([MODEL]).free == 7
    await room.set_capacity(None)
    assert room.admission.batch_room([MODEL]).places == 0
    await room.close()


def claimed(number: int, *, waits: bool) -> Attempt:
    job = requested(f"job_{number}")
    claim = JobClaim(ScheduledJob(job, JobState.RUNNING, 1), 1, job.give_up_time)
    return Attempt(claim, f"req_{number}", waits=waits)


@pytest.mark.parametrize(("took_s", "ahead"), [(0.01, 3), (3.5, 3), (7.0, 2), (14.0, 1), (40.0, 0)])
async def test_where_jobs_are_short_some_are_claimed_before_there_is_a_place(
    took_s: float, ahead: int
) -> None:
    room = Restaurant(8)
    places = Places(room.admission, lambda: [MODEL])
    guests = [await room.arrive(priority=Priority.BATCH) for _ in range(7)]
    await room.clock.advance(took_s)
    for guest in guests:
        await room.finish(guest)
    for _ in range(7):
        await room.arrive(priority=Priority.BATCH)
    running = [claimed(number, waits=False) for number in range(7)]
    assert places.room(running).jobs == ahead
    # Nor one by one: only once half of them have begun.
    waiting = [claimed(10 + number, waits=True) for number in range(ahead)]
    assert places.room([*running, *waiting]).jobs == 0
    assert Places(room.admission, lambda: [MODEL], most=3).room(running).jobs == 0
    await room.close()
