"""Deltas of many generations in one stream: each arrives once and in its order, by the stream or, where that
ends, by its own way."""

from __future__ import annotations

import asyncio
import random

import pytest

from services.inference.delta_watches import MAX_DELTAS, DeltaWatch, DeltaWatches, Entry, Way
from services.inference.engine.port import Delta
from services.mesh.errors import AlreadyExists

NAME = "watch-0123456789"


def said(entries: list[Entry]) -> list[tuple[int, int, bool]]:
    return [(entry.number, entry.seq, entry.last) for entry in entries]


def delta(choice: int = 0) -> Delta:
    return Delta(choice, "x", (1,), ())


async def test_what_comes_at_once_is_one_message() -> None:
    watch = DeltaWatch()
    one, two = watch.way(1), watch.way(2)
    assert await one.put(1, delta())
    assert await two.put(1, delta())
    assert await one.put(2, delta(choice=1))
    assert said(await watch.take()) == [(1, 1, False), (2, 1, False), (1, 2, False)]


async def test_who_has_said_something_waits_until_it_is_taken() -> None:
    watch = DeltaWatch()
    way = watch.way(1)
    await way.put(1, delta())
    second = asyncio.ensure_future(way.put(2, delta()))
    await asyncio.sleep(0)
    assert not second.done()
    assert said(await watch.take()) == [(1, 1, False)]
    assert await second
    assert said(await watch.take()) == [(1, 2, False)]


async def test_a_message_is_bounded() -> None:
    watch = DeltaWatch()
    for number in range(MAX_DELTAS + 3):
        await watch.way(number).put(1, delta())
    assert len(await watch.take()) == MAX_DELTAS
    assert len(await watch.take()) == 3


async def test_the_last_of_a_generation_is_marked_in_its_message() -> None:
    watch = DeltaWatch()
    way = watch.way(1)
    await way.put(1, delta())
    leaving = asyncio.ensure_future(way.left())
    await asyncio.sleep(0)
    assert not leaving.done(), "the rest must not overtake it"
    assert said(await watch.take()) == [(1, 1, True)]
    assert await leaving == []
    way.close()
    assert not await way.put(2, delta())


async def test_a_generation_that_fails_tells_its_reader_where_to_look() -> None:
    watch = DeltaWatch()
    watch.way(1).close()
    assert said(await watch.take()) == [(1, 0, True)]


async def test_who_leaves_sends_the_rest_another_way() -> None:
    watch = DeltaWatch()
    way = watch.way(1)
    await way.put(1, delta())
    watch.leave(1)
    watch.leave(2)
    taking = asyncio.ensure_future(watch.take())
    assert not await way.put(2, delta())
    assert said(await taking) == [(1, 1, False)]
    leaving = asyncio.ensure_future(way.left())
    assert said(await watch.take()) == [(1, 0, True)]
    assert await leaving == []


async def test_what_nobody_took_goes_back_when_the_reader_leaves() -> None:
    watches = DeltaWatches()
    with watches.open(NAME) as watch:
        way = watch.way(1)
        await way.put(1, delta())
        waiting = asyncio.ensure_future(way.put(2, delta()))
        await asyncio.sleep(0)
    assert not await waiting
    assert said(await way.left()) == [(1, 1, True)]
    assert watches.get(NAME) is None


async def test_a_watch_that_is_to_end_gives_what_it_has_and_takes_no_more() -> None:
    watch = DeltaWatch()
    way = watch.way(1)
    await way.put(1, delta())
    watch.end_soon()
    assert not await watch.way(2).put(1, delta())
    assert said(await watch.take()) == [(1, 1, False)]
    assert await watch.take() == []
    watch.end()
    assert await way.left() == []


async def test_names_and_numbers_are_used_once() -> None:
    watches = DeltaWatches()
    with watches.open(NAME) as watch:
        watch.way(1)
        with pytest.raises(AlreadyExists):
            watch.way(1)
        with pytest.raises(AlreadyExists), watches.open(NAME):
            pass
        assert watches.get(NAME) is watch


@pytest.mark.parametrize("run", range(20))
async def test_random_lives_lose_and_double_nothing(run: int) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    watch = DeltaWatch()
    arrived: dict[int, list[int]] = {}
    own: dict[int, list[int]] = {}

    async def turns() -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)

    async def generate(number: int, way: Way) -> None:
        for seq in range(1, 30):
            await turns()
            if not await way.put(seq, delta(rng.randrange(2))):
                own[number] += [entry.seq for entry in await way.left()]
                own[number].append(seq)
        own[number] += [entry.seq for entry in await way.left()]
        way.close()

    async def read(takes: int) -> None:
        for _ in range(takes):
            await turns()
            entries = await watch.take()
            if not entries:
                break
            for entry in entries:
                if entry.delta is not None:
                    arrived[entry.number].append(entry.seq)
            if rng.random() < 0.02:
                watch.leave(rng.randrange(6))
            if rng.random() < 0.01:
                watch.end_soon()
        watch.end()

    reading = asyncio.ensure_future(read(rng.choice([3, 20, 1000])))
    for number in range(6):
        arrived[number], own[number] = [], []
    await asyncio.wait_for(asyncio.gather(*(generate(n, watch.way(n)) for n in range(6))), 10)
    watch.end_soon()
    await asyncio.wait_for(reading, 10)
    for number in range(6):
        assert arrived[number] + own[number] == list(range(1, 30)), (seed, number)
