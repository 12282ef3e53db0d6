"""Runs sequences over a step: alone and whole, or cut and mixed at random, with pages of its own.

What a step computes must not depend on which of the two it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np

from services.inference.engine.step import PAGE_TOKENS, Logits, Step, StepRow


@dataclass
class _Sequence:
    tokens: list[int]
    ends: int
    """How many tokens it has when it is done."""
    prompt_tokens: int
    done: int = 0
    """Tokens whose keys and values are in the pages."""
    pages: list[int] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)


@dataclass
class StepDriver:
    """Without `random`: one sequence after the other, each prompt in one piece.

    With it: up to `max_rows` at once in each step, chunks of 1 to `max_chunk_tokens`, pages in any order and
    dirty from others, now and then a sequence that loses its pages and is computed again.
    """

    step: Step
    random: Random | None = None
    max_rows: int = 8
    max_chunk_tokens: int = 40
    preempted: float = 0.03
    """How probable it is that a running sequence is preempted before a step."""

    def __post_init__(self) -> None:
        self._free = list(range(self.step.pages))

    def logits(self, sequences: list[list[int]]) -> list[Logits]:
        """For each sequence the logits after each of its tokens, [tokens, vocab_tokens]."""
        tracked = [_Sequence(list(tokens), len(tokens), len(tokens)) for tokens in sequences]
        self._run(tracked, every=True)
        return [np.concatenate(each.logits) for each in tracked]

    def greedy(self, prompts: list[list[int]], max_tokens: int, eos: int | None = None) -> list[list[int]]:
        """For each prompt its continuation, up to `eos` inclusive."""
        tracked = [_Sequence(list(tokens), len(tokens) + max_tokens, len(tokens)) for tokens in prompts]
        self._run(tracked, every=False, eos=eos)
        return [each.tokens[each.prompt_tokens :] for each in tracked]

    def _run(self, sequences: list[_Sequence], *, every: bool, eos: int | None = None) -> None:
        waiting = list(sequences)
        running: list[_Sequence] = []
        while waiting or running:
            self._join(waiting, running)
            chosen = self._chosen(running)
            counts = [self._count(each) for each in chosen]
            wanted = [
                count if every else int(each.done + count == len(each.tokens))
                for each, count in zip(chosen, counts, strict=True)
            ]
            out = self.step.run(
                [
                    StepRow(tuple(each.tokens[each.done : each.done + count]), each.done, each.pages, want)
                    for each, count, want in zip(chosen, counts, wanted, strict=True)
                ]
            ).copy()
            assert out.shape == (sum(wanted), self.step.vocab_tokens)
            start = 0
            for each, count, want in zip(chosen, counts, wanted, strict=True):
                rows, start = out[start : start + want], start + want
                each.done += count
                if every:
                    each.logits.append(rows)
                elif want:
                    each.tokens.append(int(rows[0].argmax()))
                    if each.tokens[-1] == eos:
                        each.ends = len(each.tokens)
                if len(each.tokens) == each.ends and (every is False or each.done == each.ends):
                    running.remove(each)
                    self._release(each)

    def _join(self, waiting: list[_Sequence], running: list[_Sequence]) -> None:
        if self.random is not None:
            for each in [each for each in running if self.random.random() < self.preempted]:
                running.remove(each)
                waiting.append(each)
                self._release(each)
                each.done = 0
                each.logits.clear()
        most = 1 if self.random is None else self.random.randint(max(1, len(running)), self.max_rows)
        while waiting and len(running) < most:
            need = -(-waiting[0].ends // PAGE_TOKENS)
            if need > len(self._free):
                assert running, f"{need} pages for a sequence, {len(self._free)} in the pool"
                return
            if self.random is not None:
                self.random.shuffle(self._free)
            first = waiting.pop(0)
            first.pages = [self._free.pop() for _ in range(need)]
            running.append(first)

    def _release(self, sequence: _Sequence) -> None:
        self._free += sequence.pages
        sequence.pages = []

    def _chosen(self, running: list[_Sequence]) -> list[_Sequence]:
        if self.random is None:
            return list(running)
        return self.random.sample(running, self.random.randint(1, len(running)))

    def _count(self, sequence: _Sequence) -> int:
        left = len(sequence.tokens) - sequence.done
        return left if self.random is None else self.random.randint(1, min(left, self.max_chunk_tokens))
