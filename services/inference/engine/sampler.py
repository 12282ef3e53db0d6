"""From the step's logits to a token for each row.

What is drawn is defined row by row; neighbours and their number move nothing, because every operation here
is elementwise or reduces one row alone. With z the row's logits in float32:

1. Penalties, in float64 and rounded once to float32, only for the tokens that they touch. First the
   repetition penalty r for each token of prompt or output: z / r where z > 0, else z * r. Then
   z - presence - frequency * n for each token that the output has n > 0 times. Then the bias is added.
2. Temperature 0 takes the largest z; of equals the lowest id. The rest is for other temperatures.
3. s = (z - max z) / temperature and the weight w = exp(s), in float32: the best token weighs 1, and no
   temperature, however small, overflows.
4. top-k keeps the k largest s, and whatever equals the k-th.
5. top-p keeps the shortest run of tokens, by falling weight and equals by rising id, whose sum reaches
   top_p of what step 4 kept.
6. min-p keeps what weighs at least min_p.
7. The draw: the first token, by rising id, at which the running sum of what is kept exceeds u times the
   whole sum. u is the uniform of (seed, choice, position). Sums are of float32 weights in float64.

Rows without numbers (NaN, infinite, all minus infinity) are errors; minus infinity forbids a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from services.inference.engine.port import Sampling
from services.inference.engine.uniform import uniforms

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
N = TypeVar("N", int, float)

BLOCK_TOKENS = 256
"""The running sum over a whole vocabulary is taken by blocks, then inside the one that is hit."""
NO_WEIGHT = -64.0
"""Of s: so many tokens as no vocabulary has weigh nothing below it that 53 bits of a uniform could meet."""
DENSE = 4
"""Where more than one token in so many is a candidate, all are computed."""
SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""What float32 can divide by; anything below is as good as greedy."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a parameter that is not set means for a model."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Sampler:
    """The parameters of one choice of one request, and what it has said so far."""

    def __init__(
        self,
        sampling: Sampling,
        defaults: SamplingDefaults,
        *,
        choice: int,
        prompt: Sequence[int],
        vocab_tokens: int,
    ) -> None:
        """Raises ValueError where the seed does not fit 64 bits or a biased token is none of the model's."""
        if not 0 <= sampling.seed < 2**64:
            raise ValueError("a seed has 64 bits, unsigned")
        self.seed = sampling.seed
        self.choice = choice
        temperature = _or(sampling.temperature, defaults.temperature)
        self.greedy = temperature == 0
        self.temperature = np.float32(max(temperature, SMALLEST_TEMPERATURE))
        self.top_p = _or(sampling.top_p, defaults.top_p)
        self.top_k = _or(sampling.top_k, defaults.top_k)
        self.min_p = _or(sampling.min_p, defaults.min_p)
        self._repetition = _or(sampling.repetition_penalty, defaults.repetition_penalty)
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        bias = dict(sampling.logit_bias)
        if any(not 0 <= token < vocab_tokens for token in bias):
            raise ValueError(f"token ids end at {vocab_tokens - 1}")
        self._bias_ids = np.array(list(bias), dtype=np.int64)
        self._bias = np.array(list(bias.values()), dtype=np.float64)
        repeats = self._repetition != 1
        penalises = repeats or self._presence != 0 or self._frequency != 0
        self._tally = _Tally(prompt if repeats else ()) if penalises else None

    @property
    def adjusts(self) -> bool:
        """Whether the logits are changed before anything is chosen."""
        return self._tally is not None or self._bias_ids.size > 0

    @property
    def remembers(self) -> bool:
        """Whether what was said before changes what is chosen."""
        return self._tally is not None

    def adjusted(self, logits: Row) -> Row:
        """A copy of the row, with penalties and bias."""
        row = logits.copy()
        if self._tally is not None:
            ids, times = self._tally.ids, self._tally.times
            scores = row[ids].astype(np.float64)
            if self._repetition != 1:
                scores = np.where(scores > 0, scores / self._repetition, scores * self._repetition)
            row[ids] = scores - self._presence * (times > 0) - self._frequency * times
        row[self._bias_ids] = row[self._bias_ids] + self._bias
        return row

    def record(self, token: int) -> None:
        """The token is now part of the output."""
        if self._tally is not None:
            self._tally.add(token)

    def replay(self, tokens: Iterable[int]) -> None:
        """Tokens that were chosen and delivered elsewhere: penalties go on as if they were chosen here."""
        for token in tokens:
            self.record(token)

    def choose(self, logits: Row, position: int) -> int:
        """`sample` for one row. Raises its error."""
        token = sample(logits[np.newaxis], [self], [position])[0]
        if isinstance(token, Exception):
            raise token
        return token


class _Tally:
    """The tokens that penalties touch, and how often each was generated (0: it is in the prompt only)."""

    def __init__(self, prompt: Sequence[int]) -> None:
        ids = list(dict.fromkeys(prompt))
        self._places = {token: place for place, token in enumerate(ids)}
        self._ids = np.array(ids, dtype=np.int64)
        self._times = np.zeros(len(ids), dtype=np.float64)

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._places)]

    @property
    def times(self) -> npt.NDArray[np.float64]:
        return self._times[: len(self._places)]

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            # Room grows by doubling: a step must not copy what thousands of steps have gathered.
            room = np.zeros(max(16, place), dtype=np.int64)
            self._ids = np.concatenate([self._ids, room])
            self._times = np.concatenate([self._times, room.astype(np.float64)])
        self._ids[place] = token
        self._times[place] += 1


def sample(logits: Row, samplers: Sequence[Sampler], positions: Sequence[int]) -> list[int | Exception]:
    """The next token of each row of float32 [rows, vocab], or what went wrong with that row alone.

    `positions` count the tokens that each choice has generated before. Chosen tokens are recorded in their
    samplers. Penalties and bias work on copies: `logits` stay as they are.
    """
    best = logits.argmax(axis=1).tolist()
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    uniform = dict(
        zip(
            drawing,
            uniforms(
                [samplers[row].seed for row in drawing],
                [samplers[row].choice for row in drawing],
                [positions[row] for row in drawing],
            ).tolist(),
            strict=True,
        )
    )
    scratch = np.empty(logits.shape[1], dtype=np.float32) if drawing else None
    tokens: list[int | Exception] = []
    for row, sampler in enumerate(samplers):
        try:
            token = _choose(logits[row], best[row], sampler, uniform.get(row), scratch)
            sampler.record(token)
            tokens.append(token)
        except Exception as error:
            tokens.append(error)
    return tokens


def _choose(scores: Row, best: int, sampler: Sampler, uniform: float | None, scratch: Row | None) -> int:
    if sampler.adjusts:
        scores = sampler.adjusted(scores)
        best = int(scores.argmax())
    # The maximum tells of the whole row: it is NaN where anything is, and infinite where anything is.
    if not math.isfinite(scores[best]):
        raise ValueError("the model gave logits that are not numbers")
    if uniform is None:
        return best
    scaled = np.subtract(scores, scores[best], out=scratch)
    with np.errstate(over="ignore"):  # Minus infinity is right for what a tiny temperature leaves no weight.
        np.divide(scaled, sampler.temperature, out=scaled)
    return _draw(scaled, sampler, uniform)


def _draw(scaled: Row, sampler: Sampler, uniform: float) -> int:
    """Steps 4 to 7. Writes over `scaled`."""
    ids = _candidates(scaled, sampler)
    with np.errstate(under="ignore"):
        weights: Row = np.exp(scaled, out=scaled) if ids is None else np.exp(scaled[ids])
    if sampler.top_p < 1:
        kept = _nucleus(weights, sampler.top_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    if sampler.min_p > 0:
        kept = np.flatnonzero(weights >= sampler.min_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    drawn = _invert(weights, uniform)
    return drawn if ids is None else int(ids[drawn])


def _candidates(scaled: Row, sampler: Sampler) -> Ids | None:
    """Top-k; else whatever later steps could keep, some more perhaps. None stands for all."""
    if 0 < sampler.top_k < scaled.size:
        return np.flatnonzero(scaled >= np.partition(scaled, -sampler.top_k)[-sampler.top_k])
    bound = NO_WEIGHT
    if sampler.min_p > 0 and sampler.top_p >= 1:
        # A little wide: the exact bound is on weights. Top-p must know the weight of all.
        bound = max(bound, math.log(sampler.min_p) - 0.01)
    reachable = scaled > bound
    if DENSE * int(np.count_nonzero(reachable)) > scaled.size:
        return None  # Picking them out costs more than it saves.
    return np.flatnonzero(reachable)


def _nucleus(weights: Row, top_p: float) -> Ids:
    """Which of the weights are kept, by rising index.

    Sorting values alone is several times quicker than sorting indices: the last value that is kept says
    which indices are, but for its equals.
    """
    total = float(weights.sum(dtype=np.float64))
    # What is lighter than this has, all together, at most half of what may be dropped: it is dropped, and
    # only the others (few, unless the row is flat) need be sorted.
    candidates = np.flatnonzero(weights >= (1 - top_p) * total / (2 * weights.size))
    heavy = weights[candidates]
    falling = -np.sort(-heavy)
    last = int(np.searchsorted(np.cumsum(falling, dtype=np.float64), top_p * total, side="left"))
    if last >= falling.size:
        return candidates
    kept: npt.NDArray[np.bool_] = heavy > falling[last]
    equal = np.flatnonzero(heavy == falling[last])
    kept[equal[: last + 1 - np.count_nonzero(kept)]] = True
    nucleus: Ids = candidates[kept]
    return nucleus


def _invert(weights: Row, uniform: float) -> int:
    """The first index at which the running sum exceeds that share of the whole."""
    if weights.size <= BLOCK_TOKENS:
        running = np.cumsum(weights, dtype=np.float64)
        return _first_above(running, uniform * float(running[-1]))
    whole = weights.size - weights.size % BLOCK_TOKENS
    blocks = weights[:whole].reshape(-1, BLOCK_TOKENS).sum(axis=1, dtype=np.float64)
    running = np.cumsum(np.append(blocks, weights[whole:].sum(dtype=np.float64)))
    target = uniform * float(running[-1])
    block = _first_above(running, target)
    begin = block * BLOCK_TOKENS
    before = float(running[block - 1]) if block else 0.0
    inside = np.cumsum(weights[begin : begin + BLOCK_TOKENS], dtype=np.float64)
    return begin + _first_above(inside, target - before)


def _first_above(running: npt.NDArray[np.float64], target: float) -> int:
    found = int(np.searchsorted(running, target, side="right"))
    if found < running.size:
        return found
    # Rounding has put the target on the very end: the last that adds anything is meant.
    return int(np.searchsorted(running, running[-1], side="left"))


def _or(value: N | None, default: N) -> N:
    return default if value is None else value
