"""What waits for a slow reader: merged, in order, nothing lost or doubled, in pieces of a bounded size."""

from __future__ import annotations

import random

import pytest

from services.inference.engine.mailbox import MERGED_BYTES, Mailbox
from services.inference.engine.port import (
    Alternative,
    Delta,
    EngineEvent,
    Finished,
    FinishReason,
    Started,
    TokenLogprob,
    Usage,
)
from services.mesh.clock import ManualClock
from services.mesh.errors import EngineFault

FINISHED = Finished((FinishReason.STOP,), Usage(1, 1))


def delta(choice: int, number: int, size: int, top: int = 0) -> Delta:
    chosen = Alternative(number, "x", -1.0)
    logprobs = (TokenLogprob(chosen, (chosen,) * top),) if top else ()
    return Delta(choice, f"{number}:" + "x" * size + ";", (number,), logprobs)


async def rest_of(mailbox: Mailbox) -> list[EngineEvent]:
    events: list[EngineEvent] = []
    while not events or not isinstance(events[-1], Finished):
        events.append(await mailbox.get())
    return events


@pytest.mark.parametrize("seed", range(20))
async def test_each_choice_comes_whole_and_in_order_however_it_is_read(seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    mailbox, choices = Mailbox(ManualClock()), chance.randint(1, 4)
    put: list[Delta] = []
    got: list[EngineEvent] = []
    mailbox.put(Started("rev", "numerics", True, 1))
    for number in range(chance.randint(1, 400)):
        put.append(
            delta(chance.randrange(choices), number, chance.choice((0, 5, 500)), chance.choice((0, 3)))
        )
        mailbox.put(put[-1])
        if not number or chance.random() < 0.1:
            got.append(await mailbox.get())
    mailbox.put(FINISHED)
    got += await rest_of(mailbox)
    assert isinstance(got[0], Started)
    assert got[-1] is FINISHED
    deltas = [each for each in got if isinstance(each, Delta)]
    assert len(deltas) == len(got) - 2
    for choice in range(choices):
        wanted, seen = ([each for each in found if each.choice == choice] for found in (put, deltas))
        assert "".join(each.text for each in seen) == "".join(each.text for each in wanted)
        assert [i for each in seen for i in each.token_ids] == [i for each in wanted for i in each.token_ids]
        assert [i for each in seen for i in each.logprobs] == [i for each in wanted for i in each.logprobs]


@pytest.mark.parametrize(("size", "top"), [(2000, 0), (10, 20)])
async def test_r04_what_is_merged_has_a_size(size: int, top: int) -> None:
    """Else a stalled reader would hold at each hop of its stream what was generated meanwhile."""
    mailbox = Mailbox(ManualClock())
    for number in range(1000):
        mailbox.put(delta(0, number, size, top))
    mailbox.put(FINISHED)
    deltas = [each for each in await rest_of(mailbox) if isinstance(each, Delta)]
    assert max(len(each.text) for each in deltas) < MERGED_BYTES + 2 * size
    assert max(sum(len(each.top) for each in found.logprobs) for found in deltas) * 20 <= MERGED_BYTES
    # Merged all the same: a reader that is back does not pay for each token.
    assert len(deltas) < 1000 / 3


async def test_an_error_comes_after_what_is_there() -> None:
    mailbox = Mailbox(ManualClock())
    for number in range(10):
        mailbox.put(delta(0, number, 3000))
    mailbox.fail(EngineFault("It broke."))
    text = ""
    while len(text) < 10 * 3000:
        event = await mailbox.get()
        assert isinstance(event, Delta)
        text += event.text
    assert text == "".join(delta(0, number, 3000).text for number in range(10))
    with pytest.raises(EngineFault):
        await mailbox.get()
