"""Batch leaves room: never has all places of a model, and is asked for no more than can begin."""

from __future__ import annotations

import pytest

from services.gateway.generation import Priority
from tests.framework.admissions import MODEL, Restaurant


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
