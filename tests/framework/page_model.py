"""A step without a model: what it says next is a digest of all tokens that it finds in a sequence's pages.

So a page that was given to the wrong sequence, written twice, or not written at all changes the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from services.inference.engine.step import PAGE_TOKENS, Logits, StepRow, check_row

EMPTY = -1
_CANDIDATES = 8


def candidates(tokens: Sequence[int], below: int) -> list[int]:
    """What the model may say after `tokens`, most probable first, ids under `below`; some may be the same."""
    digest = hashlib.blake2b(
        np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=4 * _CANDIDATES
    ).digest()
    return [int(number) % below for number in np.frombuffer(digest, dtype=np.uint32)]


def continuation(prompt: Sequence[int], count: int, below: int) -> list[int]:
    """The whole greedy answer, computed without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(candidates(tokens, below)[0])
    return tokens[len(prompt) :]


class PageModel:
    """A `Step`. `fails_on` says which row it raises on."""

    numerics = "page-model"
    exact_replay = True

    def __init__(
        self,
        *,
        pages: int,
        vocab_tokens: int,
        context_tokens: int,
        says_below: int,
        fails_on: Callable[[StepRow], bool] = lambda row: False,
    ) -> None:
        self.pages = pages
        self.vocab_tokens = vocab_tokens
        self.context_tokens = context_tokens
        self.steps = 0
        self.largest_step_tokens = 0
        self.says_below = says_below
        self._fails_on = fails_on
        self._pool: npt.NDArray[np.int64] = np.full((pages, PAGE_TOKENS), EMPTY, dtype=np.int64)

    def run(self, rows: Sequence[StepRow]) -> Logits:
        self.steps += 1
        self.largest_step_tokens = max(self.largest_step_tokens, sum(len(row.tokens) for row in rows))
        for row in rows:
            check_row(
                row, vocab_tokens=self.vocab_tokens, context_tokens=self.context_tokens, pages=self.pages
            )
        written = [page for row in rows for page in self._write(row)]
        assert len(written) == len(set(written)), "two sequences wrote into one page"
        if any(self._fails_on(row) for row in rows):
            raise RuntimeError("the model was told to fail")
        return np.array(
            [self._logits(row, back) for row in rows for back in reversed(range(row.logits))],
            dtype=np.float32,
        ).reshape(-1, self.vocab_tokens)

    def _write(self, row: StepRow) -> set[int]:
        pages = set()
        for offset, token in enumerate(row.tokens):
            index, place = divmod(row.position + offset, PAGE_TOKENS)
            self._pool[row.pages[index], place] = token
            pages.add(row.pages[index])
        return pages

    def _logits(self, row: StepRow, back: int) -> npt.NDArray[np.float32]:
        seen = self._pool[list(row.pages)].ravel()[: row.position + len(row.tokens) - back]
        assert (seen != EMPTY).all(), "a position was never computed"
        logits = np.zeros(self.vocab_tokens, dtype=np.float32)
        for rank, token in reversed(list(enumerate(candidates(seen.tolist(), self.says_below)))):
            logits[token] = 20.0 - rank
        return logits
