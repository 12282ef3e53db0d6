"""The deadline around a call ends it with an error of its own; the cancellation of others stays theirs."""

from __future__ import annotations

import asyncio

import pytest

from services.mesh.errors import DeadlineExceeded
from services.mesh.interceptors import Deadline


async def forever() -> None:
    await asyncio.Event().wait()


def cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_it_passes() -> None:
    with pytest.raises(DeadlineExceeded), Deadline(0.01):
        await forever()
    assert cancellations() == 0
    with pytest.raises(DeadlineExceeded), Deadline(-1):
        await forever()


async def test_what_is_done_in_time_is_not_disturbed() -> None:
    with Deadline(60):
        await asyncio.sleep(0)
    with pytest.raises(ValueError, match="own"), Deadline(60):
        raise ValueError("own")
    assert cancellations() == 0


async def test_an_error_of_the_block_wins_over_the_deadline_that_caused_it() -> None:
    async def fails() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise ValueError("own") from None

    with pytest.raises(ValueError, match="own"), Deadline(0):
        await fails()
    assert cancellations() == 0


async def test_a_cancellation_of_others_stays_one() -> None:
    async def work(begun: asyncio.Event, allowed_s: float) -> None:
        with Deadline(allowed_s):
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
