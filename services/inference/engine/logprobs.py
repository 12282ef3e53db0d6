"""Log probabilities of the model itself: before temperature, penalties, bias and filters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.inference.engine.detokenizer import TokenTable
from services.inference.engine.port import Alternative, TokenLogprob
from services.inference.engine.sampler import Row


def token_logprob(logits: Row, token: int, top: int, table: TokenTable) -> TokenLogprob:
    """Of the chosen token, and of the `top` most probable ones; equals by lower id.

    Natural logarithms. Weights are computed in float32 like the logits, against the best token's, which is 1;
    they are summed, and everything else is done, in float64: the error is a hundredth of what the last bit
    of a logit means. The row has been sampled from, so it holds numbers.
    """
    peak = logits.max()
    with np.errstate(under="ignore"):
        log_sum = float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    ranked: Sequence[int] = ()
    if top := min(top, logits.size):
        candidates = np.flatnonzero(logits >= np.partition(logits, -top)[-top])
        ranked = candidates[np.argsort(-logits[candidates], kind="stable")][:top].tolist()

    def alternative(index: int) -> Alternative:
        return Alternative(index, table.raw(index), float(logits[index]) - float(peak) - log_sum)

    return TokenLogprob(alternative(token), tuple(alternative(index) for index in ranked))
