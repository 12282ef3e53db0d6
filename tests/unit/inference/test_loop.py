"""The loop, over a step that is a function of the tokens in a slot: exactness, faults, slots, fairness."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine import frames
from services.inference.engine.loop import EngineLoop, LoadedModel, LoopLimits
from services.inference.engine.port import GenerationRequest, ModelInfo, Prompt, Sampling
from services.inference.engine.row_step import Logits, StepFault, StepRow
from services.inference.engine.sampler import SamplingDefaults
from services.inference.engine.tokenizer import PromptTokenizer

VOCAB_TOKENS = 49_152
MAX_CHOSEN = 41_000
CONTEXT_TOKENS = 512
POISON = " inexperienced"
"""The step fails on this word, which is one token, beyond those that HashStep chooses."""
LIMITS = LoopLimits(max_running=4, max_output_tokens=64, prefill_chunk_tokens=8)
ENDS = (frames.JobFinished, frames.JobFailed, frames.JobCancelled, frames.JobCounted)


@dataclass
class HashStep:
    """A `Step` without a model: logits are a hash of all tokens in the slot, so any mistake changes them."""

    poison: frozenset[int] = frozenset()
    vocab_tokens: int = VOCAB_TOKENS
    context_tokens: int = CONTEXT_TOKENS
    numerics: str = "hash"
    exact_replay: bool = True
    slots: dict[int, list[int]] = field(default_factory=dict)
    most_rows: int = 0
    _next: itertools.count[int] = field(default_factory=itertools.count)

    def open_slot(self) -> int:
        slot = next(self._next)
        self.slots[slot] = []
        return slot

    def fork_slot(self, slot: int) -> int:
        fork = self.open_slot()
        self.slots[fork] = list(self.slots[slot])
        return fork

    def close_slot(self, slot: int) -> None:
        del self.slots[slot]

    def run(self, rows: Sequence[StepRow]) -> Sequence[Logits | StepFault | None]:
        self.most_rows = max(self.most_rows, len(rows))
        assert sum(len(row.tokens) > 1 for row in rows) <= 1, "one prefill at a time"
        return [self._row(row) for row in rows]

    def _row(self, row: StepRow) -> Logits | StepFault | None:
        tokens = self.slots[row.slot]
        assert row.position == len(tokens)
        assert len(row.tokens) <= LIMITS.prefill_chunk_tokens
        if self.poison.intersection(row.tokens):
            return StepFault(RuntimeError("poison"))
        tokens.extend(row.tokens)
        if not row.wants_logits:
            return None
        logits = np.zeros(self.vocab_tokens, dtype=np.float32)
        digest = hashlib.sha256(repr(tokens).encode()).digest()
        for rank in range(8):
            token = 1000 + int.from_bytes(digest[2 * rank : 2 * rank + 2]) % (MAX_CHOSEN - 1000)
            logits[token] = 20 - rank
        return logits


class Bench:
    """A loop with its step and a clock that a test moves."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self.tokenizer = tokenizer
        (poison,) = tokenizer.encode(Prompt(text=POISON))
        assert poison > MAX_CHOSEN
        self.step = HashStep(frozenset({poison}))
        self.now_s = 0.0
        info = ModelInfo("hash", "1", CONTEXT_TOKENS)
        model = LoadedModel(info, self.step, tokenizer, frozenset({2}), SamplingDefaults())
        self.loop = EngineLoop(model, LIMITS, lambda: self.now_s)
        self.events: list[frames.JobEvent] = []

    def turn(self) -> None:
        self.events += self.loop.step()
        assert self.loop.running <= LIMITS.max_running

    def run(self) -> None:
        for _ in range(5000):
            if self.loop.idle:
                return
            self.turn()
        raise AssertionError("the loop does not come to an end")

    def tokens(self, job: int) -> list[list[int]]:
        """Of each choice."""
        deltas = [event for event in self.events if isinstance(event, frames.JobDelta) and event.job == job]
        choices = sorted({delta.choice for delta in deltas})
        return [[i for d in deltas if d.choice == choice for i in d.token_ids] for choice in choices]

    def end(self, job: int) -> frames.JobEvent:
        (end,) = [event for event in self.events if isinstance(event, ENDS) and event.job == job]
        assert [event for event in self.events if event.job == job][-1] == end
        return end


@pytest.fixture
def bench(tokenizer: PromptTokenizer) -> Bench:
    return Bench(tokenizer)


def request(text: str, **fields: object) -> GenerationRequest:
    defaults: dict[str, object] = {"max_tokens": 6, "sampling": Sampling(seed=7, temperature=0.8)}
    return GenerationRequest("req", "hash", Prompt(text=text), **(defaults | fields))  # type: ignore[arg-type]


def test_a_long_prompt_is_computed_in_chunks_beside_what_decodes(bench: Bench) -> None:
    bench.loop.submit(1, request("short", max_tokens=20))
    bench.turn()
    bench.loop.submit(2, request("a rather long prompt " * 10, max_tokens=2))
    for _ in range(4):
        bench.turn()
    assert len(bench.tokens(1)[0]) == 5
    assert not bench.tokens(2)
    bench.run()
    assert [len(tokens) for tokens in bench.tokens(2)] == [2]


def test_first_come_first_served(bench: Bench) -> None:
    for job in range(10):
        bench.loop.submit(job, request(f"job {job}"))
    bench.run()
    started = [event.job for event in bench.events if isinstance(event, frames.JobStarted)]
    assert started == list(range(10))
    assert bench.step.most_rows <= LIMITS.max_running
    assert not bench.step.slots


def test_r17_a_fault_ends_one_job_and_moves_no_other(tokenizer: PromptTokenizer) -> None:
    calm = Bench(tokenizer)
    calm.loop.submit(1, request("good"))
    calm.loop.submit(3, request("fine", n=2))
    calm.run()
    stormy = Bench(tokenizer)
    stormy.loop.submit(1, request("good"))
    stormy.loop.submit(2, request(f"bad{POISON} in a prompt"))
    stormy.loop.submit(3, request("fine", n=2))
    stormy.loop.submit(4, request("very " * 40 + "bad" + POISON, n=3))
    stormy.run()
    for job in (1, 3):
        assert isinstance(stormy.end(job), frames.JobFinished)
        assert stormy.tokens(job) == calm.tokens(job)
    for job in (2, 4):
        end = stormy.end(job)
        assert isinstance(end, frames.JobFailed)
        assert end.reason == "ENGINE_FAULT"
        assert "poison" not in end.message
    assert not stormy.step.slots


def test_cancelling_frees_the_slot_before_the_next_step(bench: Bench) -> None:
    bench.loop.submit(1, request("one", n=3, max_tokens=50))
    bench.loop.submit(2, request("two", n=2))
    bench.turn()
    bench.turn()
    assert (bench.loop.running, bench.loop.waiting, len(bench.step.slots)) == (3, 2, 3)
    bench.loop.cancel(1)
    assert (bench.loop.running, len(bench.step.slots)) == (0, 0)
    bench.turn()
    assert (bench.loop.running, bench.loop.waiting) == (2, 0)
    bench.loop.cancel(2)
    bench.loop.cancel(2)
    bench.loop.cancel(99)
    bench.run()
    assert isinstance(bench.end(1), frames.JobCancelled)
    assert isinstance(bench.end(2), frames.JobCancelled)
    assert not bench.step.slots


def test_r12_a_job_whose_deadline_passed_is_not_started(bench: Bench) -> None:
    bench.loop.submit(1, request("one", n=4, max_tokens=50))
    bench.loop.submit(2, request("two", timeout_s=5.0))
    bench.turn()
    bench.now_s = 5.0
    bench.turn()
    end = bench.end(2)
    assert isinstance(end, frames.JobFailed)
    assert end.reason == "DEADLINE_EXCEEDED"
    assert not any(isinstance(event, frames.JobStarted) and event.job == 2 for event in bench.events)
    assert bench.loop.running == 4


def test_a_running_job_ends_at_its_deadline(bench: Bench) -> None:
    bench.loop.submit(1, request("one", n=2, timeout_s=5.0, max_tokens=50))
    bench.turn()
    assert len(bench.step.slots) == 2
    bench.now_s = 5.0
    bench.turn()
    assert isinstance(bench.end(1), frames.JobFailed)
    assert bench.loop.idle
    assert not bench.step.slots


@pytest.mark.parametrize(
    ("fields", "reason", "field_name"),
    [
        ({"n": 5}, "REQUEST_INVALID", "spec.n"),
        ({"max_tokens": 65}, "REQUEST_INVALID", "spec.max_tokens"),
        ({"stop_token_ids": (VOCAB_TOKENS,)}, "REQUEST_INVALID", "spec.stop_token_ids"),
        (
            {"sampling": Sampling(logit_bias=((VOCAB_TOKENS, 1.0),))},
            "REQUEST_INVALID",
            "spec.sampling.logit_bias",
        ),
        ({"prompt": Prompt(text="word " * CONTEXT_TOKENS)}, "CONTEXT_LENGTH_EXCEEDED", None),
    ],
)
def test_r16_a_bad_request_never_reaches_the_model(
    bench: Bench, fields: dict[str, object], reason: str, field_name: str | None
) -> None:
    bench.loop.submit(1, replace(request("text"), **fields))  # type: ignore[arg-type]
    bench.run()
    end = bench.end(1)
    assert isinstance(end, frames.JobFailed)
    assert end.reason == reason
    assert [name for name, _ in end.violations] == ([field_name] if field_name else [])
    assert bench.step.most_rows == 0


def test_max_tokens_is_what_is_left_where_nothing_is_said(bench: Bench) -> None:
    prompt = "word " * (CONTEXT_TOKENS - 20)
    bench.loop.submit(1, request(prompt, max_tokens=None, ignore_eos=True))
    bench.loop.submit(2, request("short", max_tokens=None, ignore_eos=True))
    bench.run()
    left = CONTEXT_TOKENS - len(bench.tokenizer.encode(Prompt(text=prompt)))
    assert len(bench.tokens(1)[0]) == left
    assert len(bench.tokens(2)[0]) == LIMITS.max_output_tokens


def test_choices_differ_by_their_number_alone(bench: Bench) -> None:
    bench.loop.submit(1, request("tell me", n=3, max_tokens=12))
    bench.run()
    first, second, third = bench.tokens(1)
    assert first != second != third


jobs = st.lists(
    st.tuples(
        st.integers(0, 12),  # submitted before this turn
        st.integers(1, 40),  # words of the prompt
        st.integers(1, 3),  # choices
        st.integers(1, 20),  # max_tokens
        st.one_of(st.none(), st.integers(0, 12)),  # cancelled so many turns later
        st.booleans(),  # poisoned
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(jobs)
def test_r20_neighbours_joins_and_leaves_move_nothing(
    tokenizer: PromptTokenizer, plan: list[tuple[int, int, int, int, int | None, bool]]
) -> None:
    bench = Bench(tokenizer)
    requests = {
        number: request(
            f"{number} " + "word " * words + "." + (POISON if poisoned else ""),
            n=n,
            max_tokens=most,
            ignore_eos=True,
        )
        for number, (_, words, n, most, _, poisoned) in enumerate(plan)
    }
    for turn in range(26):
        for number, (at, _, _, _, cancelled, _) in enumerate(plan):
            if at == turn:
                bench.loop.submit(number, requests[number])
            if cancelled is not None and at + cancelled == turn:
                bench.loop.cancel(number)
        bench.turn()
    bench.run()
    assert not bench.step.slots
    for number, (_, _, n, most, cancelled, poisoned) in enumerate(plan):
        end = bench.end(number)
        alone = Bench(tokenizer)
        alone.loop.submit(number, requests[number])
        alone.run()
        if isinstance(end, frames.JobFinished):
            assert not poisoned
            assert bench.tokens(number) == alone.tokens(number)
            assert [len(tokens) for tokens in bench.tokens(number)] == [most] * n
        elif isinstance(end, frames.JobFailed):
            assert poisoned
        else:
            assert cancelled is not None
            for cut, whole in zip(bench.tokens(number), alone.tokens(number), strict=False):
                assert whole[: len(cut)] == cut
