"""A generation in fewer deltas says the same."""

from __future__ import annotations

import asyncio
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.engine.mailbox import Mailbox
from services.inference.engine.port import Delta, EngineEvent, Finished, FinishReason, Started, Usage
from services.mesh.clock import ManualClock
from services.mesh.errors import EngineFault

STARTED = Started("r1", "n1", True, 3)
FINISHED = Finished((FinishReason.LENGTH, FinishReason.LENGTH), Usage(3, 8))
STEPS = st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 1), st.text(max_size=3)), max_size=30)


class Reader:
    """Reads a mailbox, and notes what comes, and when."""

    def __init__(self, gather_s: float) -> None:
        self.clock = ManualClock()
        self.mailbox = Mailbox(self.clock, gather_s=gather_s)
        self.found: list[tuple[float, EngineEvent]] = []

    async def read(self) -> EngineFault | None:
        try:
            while not self.found or not isinstance(self.found[-1][1], Finished):
                event = await self.mailbox.get()
                self.found.append((self.clock.monotonic(), event))
        except EngineFault as error:
            return error
        return None


async def said(
    steps: list[tuple[float, int, str]], gather_s: float, end: Finished | EngineFault
) -> tuple[list[tuple[float, EngineEvent]], EngineFault | None]:
    """What comes, and when; and the error."""
    reader = Reader(gather_s)
    reading = asyncio.create_task(reader.read())
    reader.mailbox.put(STARTED)
    for token, (wait_s, choice, text) in enumerate(steps):
        await reader.clock.advance(wait_s)
        reader.mailbox.put(Delta(choice, text, (token,)))
    if isinstance(end, EngineFault):
        reader.mailbox.fail(end)
    else:
        reader.mailbox.put(end)
    error = await asyncio.wait_for(reading, 10)
    return reader.found, error


@pytest.mark.parametrize("end", [FINISHED, EngineFault("fault")])
@given(steps=STEPS, gather_s=st.floats(0.01, 2) | st.just(math.inf))
async def test_each_choice_says_the_same_in_fewer_deltas(
    steps: list[tuple[float, int, str]], gather_s: float, end: Finished | EngineFault
) -> None:
    found, error = await said(steps, gather_s, end)
    assert found[0][1] is STARTED
    assert error is end or found[-1][1] is end
    deltas = [event for _, event in found if isinstance(event, Delta)]
    assert len(deltas) <= len(steps)
    for choice in (0, 1):
        mine = [(number, text) for number, (_, of, text) in enumerate(steps) if of == choice]
        assert "".join(each.text for each in deltas if each.choice == choice) == "".join(t for _, t in mine)
        assert [i for each in deltas if each.choice == choice for i in each.token_ids] == [n for n, _ in mine]


@pytest.mark.parametrize(("gather_s", "count"), [(0.0, 7), (0.24, 4), (math.inf, 2)])
async def test_the_first_comes_at_once_and_the_last_with_the_end(gather_s: float, count: int) -> None:
    found, _ = await said([(0.1, 0, letter) for letter in "abcdefg"], gather_s, FINISHED)
    times = [at_s for at_s, event in found if isinstance(event, Delta)]
    texts = [event.text for _, event in found if isinstance(event, Delta)]
    assert (len(texts), texts[0], "".join(texts)) == (count, "a", "abcdefg")
    assert times[-1] == found[-1][0]
    assert all(later - sooner > gather_s - 0.001 for sooner, later in itertools.pairwise(times[:-1]))
