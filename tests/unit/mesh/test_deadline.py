"""The deadline around a call ends it with an error of its own; the cancellation of others stays theirs."""

from __future__ import annotations

import asyncio

import pytest

from services.mesh.deadlines import Deadline, Deadlines
from services.mesh.errors import DeadlineExceeded


def within(allowed_s: float) -> Deadline:
    task = asyncio.current_task()
    assert task is not None
    return Deadline(Deadline.blocks(), task, allowed_s)


async def forever() -> None:
    await asyncio.Event().wait()


def cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_it_passes() -> None:
    with pytest.raises(DeadlineExceeded), within(0.01):
        await forever()
    assert cancellations() == 0
    with pytest.raises(DeadlineExceeded), within(-1):
        await forever()


async def test_what_is_done_in_time_is_not_disturbed() -> None:
    with within(60):
        await asyncio.sleep(0)
    with pytest.raises(ValueError, match="own"), within(60):
        raise ValueError("own")
    assert cancellations() == 0


async def test_an_error_of_the_block_wins_over_the_deadline_that_caused_it() -> None:
    async def fails() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise ValueError("own") from None

    with pytest.raises(ValueError, match="own"), within(0):
        await fails()
    assert cancellations() == 0


async def test_a_cancellation_of_others_stays_one() -> None:
    async def work(begun: asyncio.Event, allowed_s: float) -> None:
        with within(allowed_s):
            begun.set()
            await forever()

    for allowed_s in (60, 0):
        begun = asyncio.Event()
        task = asyncio.create_task(work(begun, allowed_s))
        await begun.wait()
        # Where the deadline has passed too, both come before the task goes on.
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def test_each_of_many_passes_in_its_turn_and_those_that_have_ended_do_not() -> None:
    passed: list[str] = []
    all_are = asyncio.Event()

    def note(key: str) -> None:
        passed.append(key)
        if key == "last":
            all_are.set()

    deadlines = Deadlines(note)
    for key, allowed_s in (("last", 0.03), ("second", 0.01), ("ended", 0.02), ("first", -1), ("never", 60)):
        deadlines.begin(key, allowed_s)
    deadlines.end("ended")
    await asyncio.wait_for(all_are.wait(), 60)
    assert passed == ["first", "second", "last"]
    deadlines.end("first")


async def test_what_begins_when_all_others_have_ended_passes_too() -> None:
    passed = asyncio.Queue[int]()
    deadlines = Deadlines(passed.put_nowait)
    for key in range(3):
        deadlines.begin(key, 0.01)
        deadlines.end(key)
        deadlines.begin(key + 10, 0.001)
        assert await asyncio.wait_for(passed.get(), 60) == key + 10


async def test_after_the_end_nothing_passes() -> None:
    passed = asyncio.Queue[str]()
    closed, other = Deadlines(passed.put_nowait), Deadlines(passed.put_nowait)
    closed.begin("closed", 0)
    closed.close()
    other.begin("other", 0.01)
    assert await asyncio.wait_for(passed.get(), 60) == "other"
    assert passed.empty()
