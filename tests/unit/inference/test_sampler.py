"""Sampling: what parameters mean, and that a row's token is its own affair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.inference.engine.port import Sampling
from services.inference.engine.sampler import Sampler, SamplingDefaults, sample
from services.inference.engine.uniform import uniforms

VOCAB_TOKENS = 64
seeds = st.integers(0, 2**64 - 1)
unit = st.floats(0.01, 1)
samplings = st.builds(
    Sampling,
    seed=seeds,
    temperature=st.sampled_from([0.0, 1e-40, 0.05, 0.2, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 5000]),
    top_p=st.one_of(st.just(1.0), unit),
    min_p=st.one_of(st.just(0.0), unit),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
    logit_bias=st.sampled_from([(), (), ((3, 2.0), (0, -100.0))]),
)
logit_rows = st.integers(0, 2**32).map(
    lambda seed: np.random.default_rng(seed).normal(0, 5, VOCAB_TOKENS).astype(np.float32)
)

Logits = npt.NDArray[np.float32]


def sampler(
    sampling: Sampling, *, choice: int = 0, prompt: Sequence[int] = (), vocab_tokens: int = VOCAB_TOKENS
) -> Sampler:
    return Sampler(sampling, SamplingDefaults(), choice=choice, prompt=prompt, vocab_tokens=vocab_tokens)


def quarters(seed: int, shape: tuple[int, ...], spread: float) -> Logits:
    """Logits in steps of 1/4: many are equal, as they are where a model computes in bfloat16."""
    rows = np.random.default_rng(seed).normal(0, spread, shape)
    return (np.round(rows * 4) / 4).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(samplings, st.integers(0, 7), st.integers(0, 2**40)), min_size=1, max_size=8),
    st.sampled_from([5, 64, 256, 257, 1500]),
    st.integers(0, 2**32),
    st.sampled_from([0.3, 3, 30]),
    st.randoms(use_true_random=False),
)
def test_r20_a_row_is_the_same_alone_and_among_any_neighbours(
    rows: list[tuple[Sampling, int, int]], vocab: int, data_seed: int, spread: float, random: Any
) -> None:
    logits = quarters(data_seed, (len(rows), vocab), spread)
    said = [list(range(index % 5)) for index in range(len(rows))]

    def fresh(index: int) -> Sampler:
        made = sampler(rows[index][0], choice=rows[index][1], prompt=[1, 4], vocab_tokens=vocab)
        made.replay(said[index])
        return made

    positions = [position for _, _, position in rows]
    alone = [fresh(index).choose(logits[index], positions[index]) for index in range(len(rows))]
    before = logits.copy()
    assert sample(logits, [fresh(index) for index in range(len(rows))], positions) == alone
    assert (logits == before).all()
    order = list(range(len(rows)))
    random.shuffle(order)
    # In another order, between a row of hostile numbers and one of none.
    hostile = np.full((1, vocab), 3e38, dtype=np.float32)
    broken = np.full((1, vocab), np.nan, dtype=np.float32)
    others = [sampler(Sampling(temperature=1), vocab_tokens=vocab) for _ in range(2)]
    mixed = sample(
        np.concatenate([hostile, logits[order], broken]),
        [others[0], *(fresh(index) for index in order), others[1]],
        [0, *(positions[index] for index in order), 0],
    )
    assert mixed[1:-1] == [alone[index] for index in order]
    assert isinstance(mixed[-1], ValueError)


def kept_by_definition(weights: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.bool_]:
    """Top-k, top-p, min-p as the module's docstring has them, the slow way."""
    kept = np.ones(weights.size, dtype=np.bool_)
    if sampling.top_k:
        kept &= weights >= np.sort(weights)[::-1][: sampling.top_k][-1]
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-np.where(kept, weights, 0), kind="stable")
        share = np.cumsum(np.where(kept, weights, 0)[order]) / weights[kept].sum()
        # Where the border falls on a token, rounding decides; not a matter of definition.
        assume(np.abs(share - sampling.top_p).min() > 1e-5)
        kept[order[int(np.count_nonzero(share < sampling.top_p)) + 1 :]] = False
    if sampling.min_p:
        assume(np.abs(weights - sampling.min_p).min() > 1e-5)
        kept &= weights >= sampling.min_p
    return kept


@settings(max_examples=250, deadline=None)
@given(
    samplings.filter(lambda sampling: sampling.temperature != 0),
    st.sampled_from([5, 64, 256, 257, 1500]),
    st.integers(0, 2**32),
    st.sampled_from([0.3, 3, 30]),
)
def test_the_draw_is_what_the_definition_says(
    sampling: Sampling, vocab: int, data_seed: int, spread: float
) -> None:
    sampling = replace(sampling, presence_penalty=0, frequency_penalty=0, repetition_penalty=1, logit_bias=())
    logits = quarters(data_seed, (vocab,), spread)
    token = sampler(sampling, vocab_tokens=vocab).choose(logits, 7)
    assert sampling.temperature is not None
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    weights[~kept_by_definition(weights, sampling)] = 0
    running = np.cumsum(weights) / weights.sum()
    uniform = uniforms([sampling.seed], [0], [7])[0]
    assert weights[token] > 0
    assert running[token] > uniform - 1e-5
    assert token == 0 or running[token - 1] < uniform + 1e-5


@settings(max_examples=50, deadline=None)
@given(logit_rows, seeds, st.integers(0, 7), st.integers(0, 10_000))
def test_a_token_is_a_function_of_seed_choice_and_position(
    logits: Logits, seed: int, choice: int, position: int
) -> None:
    sampling = Sampling(seed=seed, temperature=0.9, top_p=0.95)
    first = sampler(sampling, choice=choice).choose(logits, position)
    other = sampler(sampling, choice=choice)
    other.choose(logits, position + 1)  # What came before is no matter.
    assert other.choose(logits, position) == first


@settings(max_examples=60, deadline=None)
@given(samplings, st.integers(0, 2**32), st.integers(0, 30))
def test_r05_replayed_tokens_count_as_if_they_were_chosen_here(
    sampling: Sampling, data_seed: int, cut: int
) -> None:
    rows = quarters(data_seed, (30, VOCAB_TOKENS), 2)
    undisturbed = sampler(sampling, prompt=[1, 2, 2])
    whole = [undisturbed.choose(row, position) for position, row in enumerate(rows)]
    resumed = sampler(sampling, prompt=[1, 2, 2])
    resumed.replay(whole[:cut])
    assert [resumed.choose(rows[position], position) for position in range(cut, 30)] == whole[cut:]


@settings(max_examples=50, deadline=None)
@given(logit_rows, seeds)
def test_narrow_enough_is_greedy(logits: Logits, seed: int) -> None:
    best = int(logits.argmax())
    # Near equals stay together in top-k, and share the probability.
    assume(np.count_nonzero(logits > logits[best] - 1e-3) == 1)
    for sampling in (
        Sampling(seed=seed, temperature=0),
        Sampling(seed=seed, temperature=1, top_k=1),
        Sampling(seed=seed, temperature=1, min_p=1),
        Sampling(seed=seed, temperature=1, top_p=1e-6),
        Sampling(seed=seed, temperature=1e-30),
        Sampling(seed=seed, temperature=1e-45),
    ):
        assert sampler(sampling).choose(logits, 0) == best


def test_of_equals_greedy_takes_the_lowest_id() -> None:
    logits = np.zeros((1, VOCAB_TOKENS), dtype=np.float32)
    logits[0, [9, 5, 40]] = 3
    assert sample(logits, [sampler(Sampling(temperature=0))], [0]) == [5]


def test_penalties_and_bias() -> None:
    logits = np.zeros(VOCAB_TOKENS, dtype=np.float32)
    logits[[4, 5]] = [2.0, 1.5]

    greedy = sampler(Sampling(temperature=0, presence_penalty=1.0))
    assert [greedy.choose(logits, position) for position in range(3)] == [4, 5, 4]

    frequent = sampler(Sampling(temperature=0, frequency_penalty=0.3))
    assert [frequent.choose(logits, position) for position in range(4)] == [4, 4, 5, 4]

    seen = sampler(Sampling(temperature=0, repetition_penalty=2.0), prompt=[4])
    assert [seen.choose(logits, position) for position in range(2)] == [5, 4]

    # The prompt counts for the repetition penalty alone.
    fresh = sampler(Sampling(temperature=0, presence_penalty=2.0, repetition_penalty=1.01), prompt=[4])
    assert fresh.choose(logits, 0) == 4

    biased = sampler(Sampling(temperature=0, logit_bias=((9, 100.0), (4, -100.0))))
    assert biased.choose(logits, 0) == 9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, VOCAB_TOKENS - 1), max_size=200), st.lists(st.integers(0, 63), max_size=40))
def test_penalties_keep_count(said: list[int], prompt: list[int]) -> None:
    counted = sampler(
        Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0),
        prompt=prompt,
    )
    counted.replay(said)
    logits = quarters(len(said), (VOCAB_TOKENS,), 3)
    expected = logits.astype(np.float64)
    for token in {*prompt, *said}:
        expected[token] *= 0.5 if expected[token] > 0 else 2
    for token in said:
        expected[token] -= 0.25
    for token in set(said):
        expected[token] -= 0.5
    assert counted.adjusted(logits).tolist() == expected.tolist()


def test_r17_a_row_that_fails_is_alone_in_it() -> None:
    logits = quarters(1, (6, VOCAB_TOKENS), 2)
    logits[1, 7] = np.nan
    logits[2, 7] = np.inf
    logits[3] = -np.inf
    logits[4, :60] = -np.inf
    broken = sampler(Sampling(temperature=1, repetition_penalty=1.5), prompt=[VOCAB_TOKENS])
    samplers = [sampler(Sampling(seed=row, temperature=row % 2)) for row in range(5)] + [broken]
    found = sample(logits, samplers, [0] * 6)
    assert found[0] == logits[0].argmax()
    assert all(isinstance(error, ValueError) and "not numbers" in str(error) for error in found[1:4])
    assert isinstance(found[4], int)
    assert found[4] >= 60
    assert isinstance(found[5], IndexError)
    with pytest.raises(ValueError, match="not numbers"):
        samplers[1].choose(logits[1], 0)


def test_what_is_forbidden_is_never_drawn() -> None:
    logits = np.full((1, 1000), -np.inf, dtype=np.float32)
    logits[0, [3, 700]] = [0, 1]
    for sampling in (Sampling(temperature=2), Sampling(temperature=2, top_p=0.99), Sampling(top_k=900)):
        drawn = sampler(replace(sampling, seed=5), vocab_tokens=1000)
        assert {sample(logits, [drawn], [position])[0] for position in range(50)} == {3, 700}


@pytest.mark.parametrize(
    "sampling", [Sampling(seed=2**64), Sampling(seed=-1), Sampling(logit_bias=((64, 1.0),))]
)
def test_what_would_fail_in_a_step_is_refused_before(sampling: Sampling) -> None:
    with pytest.raises(ValueError, match=r"64 bits|ids end at 63"):
        sampler(sampling)


def test_the_models_defaults_hold_where_nothing_is_said() -> None:
    logits = np.arange(VOCAB_TOKENS, dtype=np.float32) / 100
    defaults = SamplingDefaults(temperature=0.5, top_k=1)
    chosen = Sampler(Sampling(), defaults, choice=0, prompt=[], vocab_tokens=VOCAB_TOKENS)
    assert {chosen.choose(logits, position) for position in range(20)} == {VOCAB_TOKENS - 1}
    own = Sampler(Sampling(top_k=0), defaults, choice=0, prompt=[], vocab_tokens=VOCAB_TOKENS)
    assert len({own.choose(logits, position) for position in range(20)}) > 1
