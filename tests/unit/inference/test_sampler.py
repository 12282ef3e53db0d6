"""Sampling: what parameters mean, and that a token is a function of (seed, choice, position)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.inference.engine.port import Sampling
from services.inference.engine.sampler import Sampler, SamplingDefaults
from services.inference.engine.uniform import philox4x32, uniforms

VOCAB_TOKENS = 64
seeds = st.integers(0, 2**64 - 1)
logit_rows = st.lists(st.floats(-20, 20, width=32), min_size=VOCAB_TOKENS, max_size=VOCAB_TOKENS).map(
    lambda row: np.array(row, dtype=np.float32)
)


def sampler(sampling: Sampling, *, choice: int = 0, prompt: list[int] | None = None) -> Sampler:
    return Sampler(
        sampling, SamplingDefaults(), choice=choice, prompt=prompt or [], vocab_tokens=VOCAB_TOKENS
    )


def shares(logits: np.ndarray, sampling: Sampling, draws: int = 4000) -> np.ndarray:
    """How often each token is drawn, over positions."""
    drawn = [sampler(sampling).choose(logits, position) for position in range(draws)]
    return np.bincount(drawn, minlength=VOCAB_TOKENS) / draws


# Random123's own vectors (kat_vectors, philox4x32 with 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_is_philox(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox4x32(
        [np.array([word], dtype=np.uint64) for word in counter],
        [np.array([word], dtype=np.uint64) for word in key],
    )
    assert tuple(int(word[0]) for word in words) == expected


def test_the_numbers_are_these() -> None:
    """Replicas of two versions must agree; another definition needs another numerics_id."""
    found = uniforms([0, 1, 2**64 - 1, 5], [0, 0, 3, 1], [0, 7, 2**40, 0])
    assert found.tolist() == [
        0.3990464708489645,
        0.48069244564219105,
        0.031276435920603696,
        0.3874756219628346,
    ]


@given(st.lists(st.tuples(seeds, st.integers(0, 7), st.integers(0, 2**40)), min_size=1, max_size=8))
def test_a_rows_number_does_not_depend_on_its_neighbours(rows: list[tuple[int, int, int]]) -> None:
    together = uniforms(*map(list, zip(*rows, strict=True)))
    alone = [float(uniforms([seed], [choice], [position])[0]) for seed, choice, position in rows]
    assert together.tolist() == alone
    assert all(0 <= number < 1 for number in alone)


def test_the_numbers_are_uniform() -> None:
    count = 20_000
    found = uniforms([9] * count, [0] * count, range(count))
    assert abs(found.mean() - 0.5) < 0.01
    assert np.bincount((found * 10).astype(int), minlength=10).min() > 0.9 * count / 10


@given(logit_rows, seeds, st.integers(0, 7), st.integers(0, 10_000))
def test_a_token_is_a_function_of_seed_choice_and_position(
    logits: np.ndarray, seed: int, choice: int, position: int
) -> None:
    sampling = Sampling(seed=seed, temperature=0.9, top_p=0.95)
    first = sampler(sampling, choice=choice).choose(logits, position)
    other = sampler(sampling, choice=choice)
    other.choose(logits, position + 1)  # What came before is no matter.
    assert other.choose(logits, position) == first


@given(logit_rows, seeds)
def test_narrow_enough_is_greedy(logits: np.ndarray, seed: int) -> None:
    best = int(logits.argmax())
    # Near equals stay together in top-k, and share the probability.
    assume(np.count_nonzero(logits > logits[best] - 1e-3) == 1)
    for sampling in (
        Sampling(seed=seed, temperature=0),
        Sampling(seed=seed, temperature=1, top_k=1),
        Sampling(seed=seed, temperature=1, min_p=1),
        Sampling(seed=seed, temperature=1, top_p=1e-6),
        Sampling(seed=seed, temperature=1e-30),
    ):
        assert sampler(sampling).choose(logits, 0) == best


@given(logit_rows, seeds, st.floats(0.01, 1), st.integers(0, VOCAB_TOKENS), st.floats(0, 1))
def test_only_what_the_filters_keep_is_drawn(
    logits: np.ndarray, seed: int, top_p: float, top_k: int, min_p: float
) -> None:
    sampling = Sampling(seed=seed, temperature=1, top_p=top_p, top_k=top_k, min_p=min_p)
    token = sampler(sampling).choose(logits, 0)
    weights = np.exp(logits.astype(np.float64) - logits.max())
    rank = np.count_nonzero(weights > weights[token])
    if top_k:
        assert rank < top_k
    above = weights[weights > weights[token]].sum() / weights.sum()
    assert above < top_p + 1e-9 or rank == 0
    assert weights[token] >= min_p or rank == 0


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = np.full(VOCAB_TOKENS, -30, dtype=np.float32)
    logits[:3] = np.log([0.6, 0.3, 0.1])
    found = shares(logits, Sampling(seed=3, temperature=1))
    assert np.abs(found[:3] - [0.6, 0.3, 0.1]).max() < 0.03
    half = shares(logits, Sampling(seed=3, temperature=0.5))
    expected = np.array([0.36, 0.09, 0.01]) / 0.46
    assert np.abs(half[:3] - expected).max() < 0.03


def test_penalties_and_bias() -> None:
    logits = np.zeros(VOCAB_TOKENS, dtype=np.float32)
    logits[[4, 5]] = [2.0, 1.5]

    greedy = sampler(Sampling(temperature=0, presence_penalty=1.0))
    assert [greedy.choose(logits, position) for position in range(3)] == [4, 5, 4]

    frequent = sampler(Sampling(temperature=0, frequency_penalty=0.3))
    assert [frequent.choose(logits, position) for position in range(4)] == [4, 4, 5, 4]

    seen = sampler(Sampling(temperature=0, repetition_penalty=2.0), prompt=[4])
    assert [seen.choose(logits, position) for position in range(2)] == [5, 4]

    biased = sampler(Sampling(temperature=0, logit_bias=((9, 100.0), (4, -100.0))))
    assert biased.choose(logits, 0) == 9


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(broken: float) -> None:
    logits = np.zeros(VOCAB_TOKENS, dtype=np.float32)
    logits[7] = broken
    with pytest.raises(ValueError, match="not numbers"):
        sampler(Sampling(temperature=1)).choose(logits, 0)


def test_the_models_defaults_hold_where_nothing_is_said() -> None:
    logits = np.arange(VOCAB_TOKENS, dtype=np.float32) / 100
    defaults = SamplingDefaults(temperature=0.5, top_k=1)
    chosen = Sampler(Sampling(), defaults, choice=0, prompt=[], vocab_tokens=VOCAB_TOKENS)
    assert {chosen.choose(logits, position) for position in range(20)} == {VOCAB_TOKENS - 1}
    own = Sampler(Sampling(top_k=0), defaults, choice=0, prompt=[], vocab_tokens=VOCAB_TOKENS)
    assert len({own.choose(logits, position) for position in range(20)}) > 1
