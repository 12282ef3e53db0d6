"""What a step predicts of a text, and how far two of them agree: top-1 agreement and perplexity.

The text is given, token by token (teacher forcing), in windows that know nothing of each other. Of each
position only the likeliest token and the probability of the one that follows are kept: any text fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.inference.engine.step import Logits, Step, StepRow

WINDOW_TOKENS = 512
_TOKENS_AT_ONCE = 128
"""In a step: the logits of 128 tokens take 25 MB where a vocabulary has 49,152, and 134 MB of 262,144."""

Progress = Callable[[int, int], None]
"""Gets how many tokens of how many are done."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """For each token of the windows that another follows, in order."""

    likeliest: npt.NDArray[np.int32]
    log_probabilities: npt.NDArray[np.float64]
    """Of the tokens that follow in the text; natural logarithms."""

    @property
    def perplexity(self) -> float:
        """Among how many tokens, all alike, the model as good as chooses: 1 if it knew the text."""
        return math.exp(-float(self.log_probabilities.mean()))


def windows(tokens: Sequence[int], size: int = WINDOW_TOKENS, before: Sequence[int] = ()) -> list[list[int]]:
    """The tokens in pieces of `size`, each behind `before`, which counts: a token that begins every text."""
    step = size - len(before)
    pieces = [list(tokens[start : start + step]) for start in range(0, len(tokens), step)]
    # Nothing is predicted of a single token.
    return [[*before, *piece] for piece in pieces if len(before) + len(piece) > 1]


def predict(
    step: Step, pieces: Sequence[Sequence[int]], progress: Progress = lambda done, of: None
) -> Predictions:
    """Runs each piece from an empty context; `step` has pages for the longest.

    Raises ValueError where a piece does not fit, or none has two tokens.
    """
    likeliest: list[npt.NDArray[np.int32]] = []
    log_probabilities: list[npt.NDArray[np.float64]] = []
    pages = range(step.pages)
    done, total = 0, sum(map(len, pieces))
    for piece in pieces:
        # The last token is followed by nothing: it is not computed.
        for start in range(0, len(piece) - 1, _TOKENS_AT_ONCE):
            tokens = piece[start : min(start + _TOKENS_AT_ONCE, len(piece) - 1)]
            following = piece[start + 1 : start + 1 + len(tokens)]
            logits = step.run([StepRow(tokens, start, pages, len(tokens))])
            likeliest.append(logits.argmax(axis=1).astype(np.int32))
            log_probabilities.append(_log_probabilities(logits, following))
            progress(done + start + len(tokens), total)
        done += len(piece)
    if not likeliest:
        raise ValueError("there is nothing to predict in less than two tokens")
    return Predictions(np.concatenate(likeliest), np.concatenate(log_probabilities))


def agreement(one: Predictions, other: Predictions) -> float:
    """At how many positions, of 1, both hold the same token for the likeliest."""
    return float((one.likeliest == other.likeliest).mean())


def _log_probabilities(logits: Logits, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    highest = logits.max(axis=1, keepdims=True)
    shifted = logits - highest
    chosen = shifted[np.arange(len(tokens)), np.asarray(tokens)].astype(np.float64)
    sums = np.exp(shifted, out=shifted).sum(axis=1, dtype=np.float64)
    found: npt.NDArray[np.float64] = chosen - np.log(sums)
    return found
