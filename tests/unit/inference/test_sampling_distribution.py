"""Draws against the probabilities that transformers computes from the same logits, by chi-square."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from services.inference.engine.port import Sampling
from services.inference.engine.sampler import Sampler, SamplingDefaults, sample
from tests.framework.chi_square import ALARM, p_value, survival

DRAWS = 4000
PROMPT = [0, 1, 1, 2, 17]
SAID = [3, 3, 3, 4, 17]
SEED = int.from_bytes(os.urandom(4), "big")
"""Another one in each run; the tests print it."""

FILTERS = {
    "plain": Sampling(temperature=1.0),
    "temperature": Sampling(temperature=0.6),
    "hot": Sampling(temperature=1.8),
    "top_k": Sampling(temperature=1.0, top_k=7),
    "top_p": Sampling(temperature=1.0, top_p=0.8),
    "min_p": Sampling(temperature=1.0, min_p=0.1),
    "top_k, top_p, min_p": Sampling(temperature=1.3, top_k=12, top_p=0.9, min_p=0.12),
    "repetition": Sampling(temperature=1.0, repetition_penalty=1.7),
    "repetition, filtered": Sampling(temperature=0.8, repetition_penalty=0.6, top_k=9, top_p=0.95),
}
ADDITIVE = {
    "presence": Sampling(temperature=1.0, presence_penalty=1.2),
    "frequency": Sampling(temperature=1.0, frequency_penalty=0.7),
    "bias": Sampling(temperature=1.0, logit_bias=((3, 2.5), (5, -100.0), (9, -1.0))),
    "all": Sampling(
        temperature=0.9, presence_penalty=-0.8, frequency_penalty=0.5, logit_bias=((4, 1.5), (0, -1.0))
    ),
}


def logits_of(vocab: int) -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(SEED).normal(0, 1.5, vocab).astype(np.float32)
    rows[[0, 1, 2, 3, 4, 17]] = [2.0, -0.5, 1.0, 3.0, 1.5, 2.5]  # What penalties touch has some weight.
    return rows


def draws(logits: npt.NDArray[np.float32], sampling: Sampling) -> list[int]:
    """Counts of each token: half over seeds, a quarter over positions, a quarter over choices and seeds."""

    def make(index: int) -> tuple[Sampler, int]:
        kind = index % 4
        seed = SEED if kind == 2 else SEED + index
        made = Sampler(
            replace(sampling, seed=seed),
            SamplingDefaults(),
            choice=index % 8 if kind == 3 else 0,
            prompt=PROMPT,
            vocab_tokens=logits.size,
        )
        made.replay(SAID)
        return made, index if kind == 2 else len(SAID)

    samplers, positions = zip(*map(make, range(DRAWS)), strict=True)
    found = sample(np.broadcast_to(logits, (DRAWS, logits.size)), samplers, positions)
    return np.bincount(found, minlength=logits.size).tolist()


def of_transformers(logits: npt.NDArray[np.float32], sampling: Sampling) -> list[float]:
    """Probabilities by the processors of `generate`, in its order."""
    import torch
    from transformers.generation import logits_process as steps

    chain: list[Any] = []
    if sampling.repetition_penalty is not None:
        chain.append(steps.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    assert sampling.temperature is not None
    chain.append(steps.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        chain.append(steps.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        chain.append(steps.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        chain.append(steps.MinPLogitsWarper(sampling.min_p))
    scores = torch.from_numpy(logits.copy())[None]
    for step in chain:
        scores = step(torch.tensor([PROMPT + SAID]), scores)
    probabilities: list[float] = scores.double().softmax(-1)[0].tolist()
    return probabilities


def of_openai(logits: npt.NDArray[np.float32], sampling: Sampling) -> list[float]:
    """As its reference has it: mu[j] - c[j] * frequency - (c[j] > 0) * presence, and the bias added."""
    scores = logits.astype(np.float64)
    for token in set(SAID):
        times = SAID.count(token)
        scores[token] -= times * sampling.frequency_penalty + (times > 0) * sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    assert sampling.temperature is not None
    weights = np.exp((scores - scores.max()) / sampling.temperature)
    probabilities: list[float] = (weights / weights.sum()).tolist()
    return probabilities


# The larger vocabulary has several blocks, and a rest.
@pytest.mark.parametrize(
    ("vocab", "name"),
    [
        *((24, name) for name in FILTERS),
        *((700, name) for name in ("plain", "hot", "top_k", "top_p", "min_p")),
    ],
)
def test_draws_agree_with_transformers(vocab: int, name: str) -> None:
    print(f"seed {SEED}")
    logits = logits_of(vocab)
    found = p_value(draws(logits, FILTERS[name]), of_transformers(logits, FILTERS[name]))
    assert found > ALARM, f"seed {SEED}: p = {found}"


@pytest.mark.parametrize("name", ADDITIVE)
def test_draws_agree_with_openais_definition(name: str) -> None:
    print(f"seed {SEED}")
    logits = logits_of(24)
    found = p_value(draws(logits, ADDITIVE[name]), of_openai(logits, ADDITIVE[name]))
    assert found > ALARM, f"seed {SEED}: p = {found}"


@pytest.mark.parametrize(
    ("drawn", "claimed"),
    [
        (Sampling(temperature=1.0), Sampling(temperature=0.7)),
        (Sampling(temperature=1.0, top_k=7), Sampling(temperature=1.0, top_k=6)),
        (Sampling(temperature=1.0, top_p=0.8), Sampling(temperature=1.0, top_p=0.6)),
        (Sampling(temperature=1.0, min_p=0.1), Sampling(temperature=1.0, min_p=0.3)),
        (Sampling(temperature=1.0), Sampling(temperature=1.0, repetition_penalty=1.4)),
    ],
)
def test_a_wrong_distribution_is_found(drawn: Sampling, claimed: Sampling) -> None:
    print(f"seed {SEED}")
    logits = logits_of(24)
    assert p_value(draws(logits, drawn), of_transformers(logits, claimed)) < ALARM, f"seed {SEED}"


@pytest.mark.parametrize(
    ("statistic", "freedom", "expected"),
    # From printed tables of the distribution.
    [(3.841, 1, 0.05), (5.991, 2, 0.05), (18.307, 10, 0.05), (30.578, 15, 0.01), (124.342, 100, 0.05)],
)
def test_the_distribution_function_is_the_tables(statistic: float, freedom: int, expected: float) -> None:
    assert survival(statistic, freedom) == pytest.approx(expected, rel=2e-3)
