"""Log probabilities: those of the model's own distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine.detokenizer import Spelling, TokenTable
from services.inference.engine.logprobs import token_logprob

VOCAB_TOKENS = 500
TABLE = TokenTable([b"%d" % token for token in range(VOCAB_TOKENS)], frozenset({3}), Spelling(str.encode))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([0.1, 3, 40]), st.integers(0, VOCAB_TOKENS - 1), st.integers(0, 20)
)
def test_they_are_the_log_softmax_and_the_best_come_first(
    seed: int, spread: float, token: int, top: int
) -> None:
    # In steps of 1/4, so that many are equal.
    rows = np.random.default_rng(seed).normal(0, spread, VOCAB_TOKENS)
    logits = (np.round(rows * 4) / 4).astype(np.float32)
    shares = np.exp(logits.astype(np.float64) - logits.max())
    expected = np.log(shares / shares.sum())
    found = token_logprob(logits, token, top, TABLE)
    assert (found.chosen.token_id, found.chosen.token) == (token, b"%d" % token)
    assert found.chosen.logprob == pytest.approx(expected[token], abs=1e-7)
    order = sorted(range(VOCAB_TOKENS), key=lambda index: (-logits[index], index))[:top]
    assert [alternative.token_id for alternative in found.top] == order
    assert [alternative.logprob for alternative in found.top] == pytest.approx(expected[order], abs=1e-7)


def test_a_nearly_certain_token_keeps_its_digits() -> None:
    logits = np.full(VOCAB_TOKENS, -100, dtype=np.float32)
    logits[[5, 6]] = [10, -4]
    found = token_logprob(logits, 5, 1, TABLE)
    assert found.chosen.logprob == pytest.approx(-np.log1p(np.exp(-14)), rel=1e-6)


def test_more_than_there_are_and_forbidden_ones() -> None:
    logits = np.full(4, -np.inf, dtype=np.float32)
    logits[2] = 1
    found = token_logprob(logits, 2, 20, TABLE)
    assert [alternative.token_id for alternative in found.top] == [2, 0, 1, 3]
    assert [alternative.logprob for alternative in found.top] == [0, -np.inf, -np.inf, -np.inf]
    assert found.top[-1].token == b"3"  # A special token has its bytes here.
