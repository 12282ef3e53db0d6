"""Which requests went well, and when they arrive."""

from __future__ import annotations

import random
from collections.abc import Mapping

import psutil
import pytest

from tests.bench.goodput import Goodput, Pace, aim, arrivals, measure
from tests.bench.rounds import Plan
from tests.bench.work import CannotMeasure, Stream, Work

PLAN = Plan((1,), 2, 20, 5, lambda text: len(text.split()), "seed")


class Scripted:
    """A `Subject` whose answers take what they are told to."""

    def __init__(self, name: str, first_s: float, each_s: float, tokens: int = PLAN.max_tokens) -> None:
        self.name = name
        self._stream = Stream(first_s, first_s + (PLAN.max_tokens - 1) * each_s, tokens)
        self.awake = False
        self.asked: list[str] = []

    async def start(self) -> None: ...

    async def answer(self, work: Work) -> list[Stream]:
        return [self._stream for _ in work.prompts]

    async def ask(self, prompt: str, max_tokens: int, due_s: float) -> Stream:
        assert self.awake
        self.asked.append(prompt)
        return self._stream

    def processes(self) -> Mapping[str, psutil.Process]:
        return {}

    def rest(self) -> None:
        self.awake = False

    def wake(self) -> None:
        self.awake = True

    async def stop(self) -> None: ...


def test_arrivals_are_a_poisson_process() -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    found = arrivals(50, 100, str(seed))
    assert found == sorted(found)
    assert found[0] > 0
    assert found[-1] < 100
    # 5,000 are expected, with a deviation of 71.
    assert abs(len(found) - 5000) < 6 * 71
    assert arrivals(50, 100, str(seed)) == found


async def test_both_are_judged_by_the_anchors_pace() -> None:
    ours, anchor = Scripted("ours", 0.29, 0.029), Scripted("anchor", 0.1, 0.01)
    for one, other in await measure(ours, anchor, PLAN, 100, lambda _: None, seconds=0.2):
        assert one.good == one.requests == other.good == other.requests
    slow = Scripted("slow", 0.29, 0.031)
    found = await measure(slow, anchor, PLAN, 100, lambda _: None, seconds=0.2)
    assert len(found) == PLAN.rounds
    assert all(one.good == 0 < other.good for one, other in found)
    assert not any(each.awake for each in (ours, anchor, slow))
    assert len(set(ours.asked)) == len(ours.asked), "no cache has seen them"


async def test_another_number_of_tokens_is_not_measured() -> None:
    wrong = Scripted("wrong", 0.1, 0.01, tokens=3)
    with pytest.raises(CannotMeasure, match="wrong"):
        await measure(wrong, Scripted("anchor", 0.1, 0.01), PLAN, 100, lambda _: None, seconds=0.1)


def test_who_did_nothing_well_counts_as_one_request() -> None:
    found = [(Goodput(9, 8, 10.0), Goodput(9, 4, 10.0)), (Goodput(9, 6, 10.0), Goodput(9, 0, 10.0))]
    assert aim(found, "other").line() == "aim goodput_vs_other 4 1 met"


def test_a_first_token_or_any_other_may_be_too_late() -> None:
    bound = Pace(0.1, 0.01)
    assert bound.allows(Pace(0.3, 0.03))
    assert not bound.allows(Pace(0.31, 0.01))
    assert not bound.allows(Pace(0.1, 0.031))
