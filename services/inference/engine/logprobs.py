"""Log probabilities of the model itself: before temperature, penalties, bias and filters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.inference.engine.detokenizer import TokenTable
from services.inference.engine.port import Alternative, TokenLogprob
from services.inference.engine.sampler import Row


def token_logprob(logits: Row, token: int, top: int, table: TokenTable) -> TokenLogprob:
    """Of the chosen token, and of the `top` most probable ones; equals by lower id.

    Natural logarithms, from one row's float32 logits in float64. The row has been sampled from, so it holds
    numbers.
    """
    peak = np.float64(logits.max())
    with np.errstate(under="ignore"):
        norm = peak + np.log(np.exp(logits - peak).sum())
    ranked: Sequence[int] = ()
    if top := min(top, logits.size):
        candidates = np.flatnonzero(logits >= np.partition(logits, -top)[-top])
        ranked = candidates[np.argsort(-logits[candidates], kind="stable")][:top].tolist()

    def alternative(index: int) -> Alternative:
        return Alternative(index, table.raw(index), float(logits[index] - norm))

    return TokenLogprob(alternative(token), tuple(alternative(index) for index in ranked))
