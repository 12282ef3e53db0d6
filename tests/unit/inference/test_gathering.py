"""A generation in fewer deltas says the same."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.engine.port import Delta, EngineEvent, Finished, FinishReason, Started, Usage
from services.inference.whole import gathered
from services.mesh.clock import ManualClock
from services.mesh.errors import EngineFault

STARTED = Started("r1", "n1", True, 3)
FINISHED = Finished((FinishReason.LENGTH, FinishReason.LENGTH), Usage(3, 8))
STEPS = st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 1), st.text(max_size=3)), max_size=30)


async def said(
    steps: list[tuple[float, int, str]], gather_s: float, end: EngineEvent | EngineFault
) -> tuple[list[tuple[float, EngineEvent]], EngineFault | None]:
    """What comes, and when; and the error."""
    clock = ManualClock(datetime(2026, 1, 1, tzinfo=UTC))

    async def events() -> AsyncGenerator[EngineEvent, None]:
        yield STARTED
        for token, (wait_s, choice, text) in enumerate(steps):
            await clock.advance(wait_s)
            yield Delta(choice, text, (token,))
        if isinstance(end, EngineFault):
            raise end
        yield end

    found = []
    try:
        async for event in gathered(events(), 2, gather_s, clock):
            found.append((clock.monotonic(), event))  # noqa: PERF401 (what came before an error counts)
    except EngineFault as error:
        return found, error
    return found, None


@pytest.mark.parametrize("end", [FINISHED, EngineFault("fault")])
@given(steps=STEPS, gather_s=st.floats(0.01, 2))
async def test_each_choice_says_the_same_in_fewer_deltas(
    steps: list[tuple[float, int, str]], gather_s: float, end: EngineEvent | EngineFault
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


async def test_the_first_comes_at_once_and_the_last_with_the_end() -> None:
    found, _ = await said([(0.1, 0, letter) for letter in "abcdefg"], 0.25, FINISHED)
    texts = [(round(at_s, 1), event.text) for at_s, event in found if isinstance(event, Delta)]
    first_s = texts[0][0]
    assert [(round(at_s - first_s, 1), text) for at_s, text in texts] == [
        (0.0, "a"),
        (0.3, "bcd"),
        (0.6, "efg"),
    ]
