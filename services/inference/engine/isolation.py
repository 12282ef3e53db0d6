"""A step for all rows, in which a row that fails takes no other with it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from services.inference.engine.step import Logits, Step, StepRow

logger = logging.getLogger(__name__)


def run_isolated(step: Step, rows: Sequence[StepRow]) -> tuple[Logits, dict[int, Exception]]:
    """Runs the rows; returns the logits of those that did not fail, in order, and the failures by row.

    Where the step fails as a whole, each row is run by itself: who fails then is at fault, and the others
    compute what they would have computed (their keys and values are only written again).
    """
    try:
        return step.run(rows), {}
    except Exception:
        logger.exception("a step over %d sequences failed; each is run alone", len(rows))
    results = [np.empty((0, step.vocab_tokens), dtype=np.float32)]
    failures: dict[int, Exception] = {}
    for index, row in enumerate(rows):
        try:
            # Valid until the next call, hence the copy.
            results.append(step.run([row]).copy())
        except Exception as error:
            failures[index] = error
    return np.concatenate(results), failures
