"""Whether a step computes a sequence alike alone, among others and cut in pieces: tried, not believed.

Kernels differ between machines. What `exact_replay` says comes from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from services.inference.engine.model.matrix import thread_count
from services.inference.engine.step import PAGE_TOKENS, StepRow

_LENGTHS = (75, 6)
"""More than one block of keys, less than one page."""
_CUTS = ((1, 40, 70, 72), (1, 3))

Compute = Callable[[Sequence[StepRow]], Tensor]
"""One row of numbers for each token of each row."""


def steps_agree(
    compute: Compute, *, vocab_tokens: int, context_tokens: int, pages: int, threads: Sequence[int]
) -> bool:
    """Computes a few sequences in several ways, with each number of threads. Writes to the first pages."""
    sequences = _sequences(vocab_tokens, context_tokens, pages)
    whole = [(each, 0, len(tokens)) for each, (tokens, _) in sequences.items()]
    with thread_count(threads[0]):
        reference = _computed(compute, sequences, [[piece] for piece in whole])
    for count in threads:
        with thread_count(count):
            for steps in ([whole], _cut(sequences)) if count == threads[0] else ([whole],):
                found = _computed(compute, sequences, steps)
                if not all(torch.equal(found[each], reference[each]) for each in sequences):
                    return False
    return True


Sequences = dict[int, tuple[list[int], list[int]]]
"""Tokens and pages."""


def _sequences(vocab_tokens: int, context_tokens: int, pages: int) -> Sequences:
    """As many of the lengths as the pool holds, shorter where it holds less."""
    generator = torch.Generator().manual_seed(0)
    made: Sequences = {}
    first = 0
    for index, length in enumerate(_LENGTHS):
        fitting = min(length, context_tokens, (pages - first) * PAGE_TOKENS)
        if fitting <= 0:
            break
        last = first - (-fitting // PAGE_TOKENS)
        tokens = torch.randint(vocab_tokens, (fitting,), generator=generator).tolist()
        made[index] = (tokens, list(range(first, last)))
        first = last
    return made


def _cut(sequences: Sequences) -> list[list[tuple[int, int, int]]]:
    """Steps of (sequence, first token, end): the n-th piece of each in the n-th step."""
    steps: list[list[tuple[int, int, int]]] = []
    for each, (tokens, _) in sequences.items():
        cuts = [0, *(cut for cut in _CUTS[each] if cut < len(tokens)), len(tokens)]
        for index, (start, end) in enumerate(itertools.pairwise(cuts)):
            if index == len(steps):
                steps.append([])
            steps[index].append((each, start, end))
    return steps


def _computed(
    compute: Compute, sequences: Sequences, steps: list[list[tuple[int, int, int]]]
) -> dict[int, Tensor]:
    parts: dict[int, list[Tensor]] = {each: [] for each in sequences}
    for step in steps:
        rows = [
            StepRow(sequences[each][0][start:end], start, sequences[each][1], 0) for each, start, end in step
        ]
        found = torch.split(compute(rows), [end - start for _, start, end in step])
        for (each, _, _), part in zip(step, found, strict=True):
            parts[each].append(part)
    return {each: torch.cat(several) for each, several in parts.items()}
