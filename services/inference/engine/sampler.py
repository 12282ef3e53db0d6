"""From a row of logits to a token.

The order is fixed: penalties, bias; then, unless greedy, temperature, top-k, top-p, min-p, and a draw by
inverting the cumulative distribution at a uniform of `uniform.uniforms`. All in float64 of numpy, row by row,
so a row's result never depends on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from services.inference.engine.port import Sampling
from services.inference.engine.uniform import uniforms

Row = npt.NDArray[np.float32]
N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a parameter that is not set means for a model."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Sampler:
    """Chooses the tokens of one choice of one request."""

    def __init__(
        self,
        sampling: Sampling,
        defaults: SamplingDefaults,
        *,
        choice: int,
        prompt: list[int],
        vocab_tokens: int,
    ) -> None:
        self._seed = sampling.seed
        self._choice = choice
        self._temperature = _or(sampling.temperature, defaults.temperature)
        self._top_p = _or(sampling.top_p, defaults.top_p)
        self._top_k = _or(sampling.top_k, defaults.top_k)
        self._min_p = _or(sampling.min_p, defaults.min_p)
        self._repetition = _or(sampling.repetition_penalty, defaults.repetition_penalty)
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._bias_ids = np.array([token for token, _ in sampling.logit_bias], dtype=np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float64)
        self._counts: dict[int, int] = {}
        self._seen = np.zeros(vocab_tokens, dtype=np.bool_) if self._repetition != 1.0 else None
        if self._seen is not None:
            self._seen[prompt] = True

    def choose(self, logits: Row, position: int) -> int:
        """The token at `position` of the output. Raises ValueError where the model gave no usable number."""
        scores = self._penalised(logits.astype(np.float64))
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            raise ValueError("the model gave logits that are not numbers")
        token = best if self._temperature == 0 else self._draw(scores, best, position)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _penalised(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self._seen is not None:
            seen = scores[self._seen]
            scores[self._seen] = np.where(seen > 0, seen / self._repetition, seen * self._repetition)
        if self._counts and (self._presence or self._frequency):
            ids = np.fromiter(self._counts, dtype=np.int64)
            times = np.fromiter(self._counts.values(), dtype=np.float64)
            scores[ids] -= self._presence + self._frequency * times
        if self._bias_ids.size:
            scores[self._bias_ids] += self._bias
        return scores

    def _draw(self, scores: npt.NDArray[np.float64], best: int, position: int) -> int:
        # The maximum becomes 0 first: no temperature, however small, can then overflow.
        weights = np.exp((scores - scores[best]) / self._temperature)
        if 0 < self._top_k < weights.size:
            weights[weights < np.partition(weights, -self._top_k)[-self._top_k]] = 0.0
        if self._top_p < 1:
            weights = _nucleus(weights, self._top_p)
        if self._min_p > 0:
            weights[weights < self._min_p] = 0.0  # The most probable token weighs 1.
        cumulative = np.cumsum(weights)
        uniform = float(uniforms([self._seed], [self._choice], [position])[0])
        drawn = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        # Rounding may put the product on the very end: the last token that has any weight is meant.
        return drawn if drawn < weights.size else int(np.flatnonzero(weights)[-1])


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.float64]:
    """Keeps the smallest set of the most probable tokens whose share reaches top_p; equals by lower id."""
    order = np.argsort(-weights, kind="stable")
    share = np.cumsum(weights[order])
    keep = int(np.searchsorted(share, top_p * share[-1], side="left")) + 1
    weights[order[keep:]] = 0.0
    return weights


def _or(value: N | None, default: N) -> N:
    return default if value is None else value
