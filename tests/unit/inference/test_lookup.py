"""Prompt lookup changes how long an answer takes, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine import frames
from services.inference.engine.lookup import PromptLookup
from services.inference.engine.port import GenerationRequest, Sampling
from services.inference.engine.scheduler import ScheduleLimits
from tests.framework.loop_bench import LoopBench, request

GREEDY = Sampling(temperature=0.0)
SEEDED = Sampling(seed=3, temperature=1.0, top_p=0.9)
PENALISED = Sampling(seed=3, temperature=1.0, frequency_penalty=0.5)
PLAIN = ScheduleLimits(max_running=4, max_prefill_tokens=32, min_prefill_tokens=8)
GUESSING = replace(PLAIN, lookup_tokens=6)


def naive(tokens: list[int], most: int) -> tuple[int, ...]:
    """What came after the last three tokens, else after the last two, where they occurred last before."""
    for length in (3, 2):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                again = tokens[end:] * (most + 1)
                return tuple(again[:most])
    return ()


@given(
    tokens=st.lists(st.integers(0, 2), max_size=60), steps=st.lists(st.integers(1, 9)), most=st.integers(0, 7)
)
def test_a_guess_is_what_followed_the_last_time(tokens: list[int], steps: list[int], most: int) -> None:
    lookup = PromptLookup()
    end = 0
    for step in [*steps, len(tokens)]:
        end = min(end + step, len(tokens))
        assert lookup.guess(tokens[:end], most) == naive(tokens[:end], most)


def test_guessing_pauses_where_it_does_not_pay_and_is_tried_again() -> None:
    lookup = PromptLookup()
    tokens = [1, 2, 3] * 10
    guesses = []
    for _ in range(400):
        guess = lookup.guess(tokens, 6)
        guesses.append(bool(guess))
        if guess:
            lookup.learn(len(tokens), 0)
        tokens.append(tokens[-3])
    assert guesses[0]
    assert 3 <= sum(guesses) <= 10, "tried now and then, ever more seldom"
    assert any(guesses[100:])
    for _ in range(20):
        lookup.learn(len(tokens), 6)
    assert lookup.guess([*tokens, *([1, 2, 3] * 100)], 6), "what pays goes on"


@dataclass(frozen=True)
class Asked:
    at: int
    text: str
    max_tokens: int
    sampling: Sampling
    n: int
    stop: str | None
    ignore_eos: bool
    cancelled_after: int | None

    def request(self) -> GenerationRequest:
        return request(
            self.text,
            n=self.n,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop=() if self.stop is None else (self.stop,),
            ignore_eos=self.ignore_eos,
            logprobs=True,
        )


asked = st.builds(
    Asked,
    at=st.integers(0, 40),
    text=st.text("ab", min_size=1, max_size=50),
    max_tokens=st.integers(1, 40),
    sampling=st.sampled_from((GREEDY, SEEDED, PENALISED)),
    n=st.integers(1, 2),
    stop=st.none() | st.text("\x00\x01", min_size=1, max_size=3),
    ignore_eos=st.booleans(),
    cancelled_after=st.none() | st.integers(0, 20),
)


def run(limits: ScheduleLimits, plan: list[Asked], pages: int) -> LoopBench:
    # Answers of three different tokens repeat themselves all the time, and seldom go on as they did.
    bench = LoopBench(pages=pages, limits=limits, says_below=3)
    for turn in range(60):
        for number, each in enumerate(plan):
            if each.at == turn:
                bench.loop.submit(number, each.request())
            if each.cancelled_after is not None and turn == each.at + each.cancelled_after:
                bench.loop.cancel(number)
        bench.turn()
    bench.run()
    return bench


def logprobs(bench: LoopBench, number: int) -> list[tuple[int, object]]:
    """Choice and log probability of each token."""
    deltas = [event for event in bench.of(number) if isinstance(event, frames.JobDelta)]
    return sorted(
        ((delta.choice, each) for delta in deltas for each in delta.logprobs), key=lambda pair: pair[0]
    )


@settings(max_examples=60, deadline=None)
@given(plan=st.lists(asked, min_size=1, max_size=5), pages=st.integers(8, 40))
def test_answers_are_the_same_with_and_without(plan: list[Asked], pages: int) -> None:
    plain, guessing = (run(limits, plan, pages) for limits in (PLAIN, GUESSING))
    assert plain.loop.state.guessed_tokens == 0
    for number, each in enumerate(plan):
        if isinstance(plain.end(number), frames.JobFinished) and each.cancelled_after is None:
            assert guessing.end(number) == plain.end(number)
            assert guessing.tokens(number) == plain.tokens(number)
            assert [guessing.text(number, choice) for choice in range(each.n)] == [
                plain.text(number, choice) for choice in range(each.n)
            ]
            assert logprobs(guessing, number) == logprobs(plain, number)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED])
def test_right_guesses_save_steps(sampling: Sampling) -> None:
    plan = [Asked(0, "abababab", 60, sampling, 1, None, True, None)]
    # A single token: all that can be said is what was said before.
    plain, guessing = (LoopBench(limits=limits, says_below=1) for limits in (PLAIN, GUESSING))
    for bench in (plain, guessing):
        bench.loop.submit(0, plan[0].request())
        bench.run()
    assert guessing.tokens(0) == plain.tokens(0)
    if sampling is PENALISED:
        assert guessing.loop.state.guessed_tokens == 0, "a penalty needs one token after the other"
        assert guessing.step.steps == plain.step.steps
    else:
        assert guessing.step.steps < plain.step.steps / 3
        assert guessing.loop.state.guessed_right_tokens > 40
        deltas = [event for event in guessing.events if isinstance(event, frames.JobDelta)]
        assert len(deltas) == guessing.step.steps, "what a step brings is one delta"


def test_nobody_guesses_where_many_run_or_a_prompt_is_left() -> None:
    bench = LoopBench(limits=GUESSING, says_below=1)
    for job in range(3):
        bench.loop.submit(job, request("abab", max_tokens=20, sampling=GREEDY))
    bench.run()
    assert bench.loop.state.guessed_tokens == 0
