"""Before anything is timed: do the subjects answer alike?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.bench.rounds import one
from tests.bench.subject import Subject
from tests.bench.work import CannotMeasure, Stream, Work

Decode = Callable[[Sequence[int]], str]


async def compare(
    reference: Subject, others: Sequence[Subject], work: Work, *, exact: bool, decode: Decode
) -> dict[str, float]:
    """The share of tokens before the first difference, by subject.

    The reference answers each prompt by itself, so that nothing is padded. `exact`: greedy in float32, where
    all have to give the same tokens. Raises CannotMeasure where they do not.
    """
    expected: list[Stream] = []
    for prompt in work.prompts:
        expected += (await one(reference, Work((prompt,), work.max_tokens))).streams
    shares: dict[str, float] = {}
    for subject in others:
        found = (await one(subject, work)).streams
        agreed = [_agreement(right, stream, decode) for right, stream in zip(expected, found, strict=True)]
        shares[subject.name] = sum(agreed) / len(agreed)
        if exact and shares[subject.name] < 1:
            index = min(range(len(agreed)), key=agreed.__getitem__)
            raise CannotMeasure(
                f"{subject.name} does not say what {reference.name} says:"
                f"\n  {decode(expected[index].token_ids)!r}\n  {_text(found[index], decode)!r}"
            )
    return shares


def _agreement(right: Stream, found: Stream, decode: Decode) -> float:
    if not found.token_ids:
        # It tells its text only.
        return float(found.text.strip() == decode(right.token_ids).strip())
    same = 0
    for expected, token in zip(right.token_ids, found.token_ids, strict=False):
        if expected != token:
            break
        same += 1
    return same / max(len(right.token_ids), len(found.token_ids))


def _text(stream: Stream, decode: Decode) -> str:
    return decode(stream.token_ids) if stream.token_ids else stream.text
