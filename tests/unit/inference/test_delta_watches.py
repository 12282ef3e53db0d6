"""Deltas of many generations in one stream: each arrives once and in its order, by the stream or, where that
ends, by its own way."""

from __future__ import annotations

import asyncio
import random

import pytest

from services.inference.delta_watches import MAX_DELTAS, DeltaWatch, DeltaWatches, Entry
from services.inference.engine.mailbox import Mailbox
from services.inference.engine.port import Delta, Finished, FinishReason, Started, Usage
from services.mesh.clock import ManualClock
from services.mesh.errors import AlreadyExists

NAME = "watch-0123456789"
TOKENS = 30


def said(entries: list[Entry]) -> list[tuple[int, int, bool]]:
    return [(entry.number, entry.seq, entry.last) for entry in entries]


def delta(choice: int = 0) -> Delta:
    return Delta(choice, "x", (1,), ())


async def test_what_comes_at_once_is_one_message() -> None:
    watch = DeltaWatch()
    one, two = watch.way(1), watch.way(2)
    assert await one.put(delta())
    assert await two.put(delta())
    assert await one.put(delta(choice=1))
    assert said(await watch.take()) == [(1, 1, False), (2, 1, False), (1, 2, False)]


async def test_who_has_said_something_waits_until_it_is_taken() -> None:
    watch = DeltaWatch()
    way = watch.way(1)
    await way.put(delta())
    second = asyncio.ensure_future(way.put(delta()))
    await asyncio.sleep(0)
    assert not second.done()
    assert said(await watch.take()) == [(1, 1, False)]
    assert await second
    assert said(await watch.take()) == [(1, 2, False)]


async def test_an_offer_is_taken_at_once_or_not_at_all() -> None:
    watch = DeltaWatch()
    way = watch.way(1, after_seq=4)
    assert way.offer(delta())
    assert not way.offer(delta()), "the first one waits to be taken"
    assert way.offer(delta(choice=1))
    assert said(await watch.take()) == [(1, 5, False), (1, 6, False)]
    assert way.offer(delta())
    watch.leave(1)
    assert not way.offer(delta(choice=1))
    assert (way.seq, said(await watch.take())) == (7, [(1, 7, False)])


async def test_a_message_is_bounded() -> None:
    watch = DeltaWatch()
    for number in range(MAX_DELTAS + 3):
        await watch.way(number).put(delta())
    assert len(await watch.take()) == MAX_DELTAS
    assert len(await watch.take()) == 3


async def test_the_last_of_a_generation_is_marked_in_its_message() -> None:
    watch = DeltaWatch()
    way = watch.way(1)
    await way.put(delta())
    leaving = asyncio.ensure_future(way.left())
    await asyncio.sleep(0)
    assert not leaving.done(), "the rest must not overtake it"
    assert said(await watch.take()) == [(1, 1, True)]
    assert await leaving == []
    way.close()
    assert not await way.put(delta())


async def test_a_generation_that_fails_tells_its_reader_where_to_look() -> None:
    watch = DeltaWatch()
    watch.way(1).close()
    assert said(await watch.take()) == [(1, 0, True)]


async def test_who_leaves_sends_the_rest_another_way() -> None:
    watch = DeltaWatch()
    way = watch.way(1)
    await way.put(delta())
    watch.leave(1)
    watch.leave(2)
    taking = asyncio.ensure_future(watch.take())
    assert not await way.put(delta())
    assert said(await taking) == [(1, 1, False)]
    leaving = asyncio.ensure_future(way.left())
    assert said(await watch.take()) == [(1, 0, True)]
    assert await leaving == []


async def test_what_nobody_took_goes_back_when_the_reader_leaves() -> None:
    watches = DeltaWatches()
    with watches.open(NAME) as watch:
        way = watch.way(1)
        await way.put(delta())
        waiting = asyncio.ensure_future(way.put(delta()))
        await asyncio.sleep(0)
    assert not await waiting
    assert said(await way.left()) == [(1, 1, True)]
    assert watches.get(NAME) is None


async def test_a_watch_that_is_to_end_gives_what_it_has_and_takes_no_more() -> None:
    watch = DeltaWatch()
    way = watch.way(1)
    await way.put(delta())
    watch.end_soon()
    assert not await watch.way(2).put(delta())
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


@pytest.mark.parametrize("run", range(40))
async def test_random_lives_lose_and_double_nothing(run: int) -> None:
    """From an engine's mailbox to the reader of the watch or of the generation's own call."""
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    watch = DeltaWatch()
    arrived: dict[int, list[Entry]] = {}
    own: dict[int, list[Entry]] = {}

    async def turns() -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)

    async def speak(mailbox: Mailbox) -> None:
        mailbox.put(Started("r", "n", True, 1))
        for token in range(TOKENS):
            await turns()
            mailbox.put(Delta(rng.randrange(2), "x", (token,)))
        mailbox.put(Finished((FinishReason.LENGTH,), Usage(1, TOKENS)))

    async def generate(number: int) -> None:
        way = watch.way(number)
        mailbox = Mailbox(ManualClock(), direct=way.offer)
        speaking = asyncio.ensure_future(speak(mailbox))
        seq = 0
        while not isinstance(event := await mailbox.get(), Finished):
            await turns()
            if not isinstance(event, Delta) or await way.put(event):
                continue
            own[number] += await way.left()
            seq = max(seq, way.seq) + 1
            own[number].append(Entry(number, seq, event))
        own[number] += await way.left()
        way.close()
        await speaking

    async def read(takes: int) -> None:
        for _ in range(takes):
            await turns()
            entries = await watch.take()
            if not entries:
                break
            for entry in entries:
                if entry.delta is not None:
                    arrived[entry.number].append(entry)
            if rng.random() < 0.02:
                watch.leave(rng.randrange(6))
            if rng.random() < 0.01:
                watch.end_soon()
        watch.end()

    reading = asyncio.ensure_future(read(rng.choice([3, 20, 1000])))
    for number in range(6):
        arrived[number], own[number] = [], []
    await asyncio.wait_for(asyncio.gather(*map(generate, range(6))), 10)
    watch.end_soon()
    await asyncio.wait_for(reading, 10)
    for number in range(6):
        entries = arrived[number] + own[number]
        assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1)), (seed, number)
        deltas = [entry.delta for entry in entries if entry.delta is not None]
        tokens = [(delta.choice, token) for delta in deltas for token in delta.token_ids]
        assert sorted(token for _, token in tokens) == list(range(TOKENS)), (seed, number)
        for choice in range(2):
            said_by = [token for by, token in tokens if by == choice]
            assert said_by == sorted(said_by), (seed, number, choice)
