"""The step: rows of (tokens, position, pages) in, logits out.

Decode, a chunk of a prompt and the verification of guessed tokens are the same call, for the whole batch.
Keys and values live in a pool of pages that the step owns; which page belongs to whom is the KV cache's
affair (`kv_cache`). What a step computes for a token depends on that token's own sequence alone where
`exact_replay` holds: not on its neighbours, not on where a prompt is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
PAGE_TOKENS = 16
"""Tokens in a page: small, so that a shared prefix is found to its end, give or take 15 tokens."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One sequence's part in a step."""

    tokens: Sequence[int]
    position: int
    """Of the first of `tokens` in the sequence: how many came before."""
    pages: Sequence[int]
    """The sequence's pages in order: page i holds positions i * PAGE_TOKENS and on. Room for `tokens`."""
    logits: int
    """How many of the last tokens' logits are wanted: none, one, or several for verification."""


class Step(Protocol):
    """A model with its pool of KV pages."""

    vocab_tokens: int
    context_tokens: int
    pages: int
    """Pages in the pool, from 0."""
    numerics: str
    """Names dtype, kernels and instruction set."""
    exact_replay: bool

    def run(self, rows: Sequence[StepRow]) -> Logits:
        """float32 [sum of rows' `logits`, vocab_tokens], in the order of the rows; valid until the next call.

        Writes the keys and values of all tokens into their pages. Rows are of different sequences; a page
        that two rows share is written by neither. Raises ValueError, before anything is computed, where a
        token, position or page is out of range.
        """


def check_row(row: StepRow, *, vocab_tokens: int, context_tokens: int, pages: int) -> None:
    """Raises ValueError where a step must not be given this row: no bad index reaches a kernel."""
    end = row.position + len(row.tokens)
    if not row.tokens or row.position < 0 or end > context_tokens:
        raise ValueError(f"positions {row.position} to {end} do not fit a context of {context_tokens}")
    if not 0 <= row.logits <= len(row.tokens):
        raise ValueError(f"{row.logits} logits of {len(row.tokens)} tokens")
    if min(row.tokens) < 0 or max(row.tokens) >= vocab_tokens:
        raise ValueError(f"token ids end at {vocab_tokens - 1}")
    if len(row.pages) * PAGE_TOKENS < end:
        raise ValueError(f"{len(row.pages)} pages cannot hold {end} tokens")
    if min(row.pages) < 0 or max(row.pages) >= pages:
        raise ValueError(f"pages end at {pages - 1}")
