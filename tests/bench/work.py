"""What the subjects are given, and what they made of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SUBJECTS = ("The river", "A lighthouse", "The old library", "Our garden", "The night train", "A young baker")
VERBS = ("remembers", "describes", "repairs", "measures", "paints", "forgets", "counts", "explains")
OBJECTS = (
    "the harbour",
    "a broken clock",
    "seven letters",
    "the winter sky",
    "a map",
    "some recipes",
)
ENDS = (
    "because the road is closed",
    "before anybody wakes",
    "with great patience",
    "although nobody asked",
    "while it rains",
    "in a quiet voice",
)


def prompt_of(tokens: int, chance: random.Random, count: Callable[[str], int]) -> str:
    """A text of about so many tokens, which no other call gives: it begins with a number of its own."""
    text = f"Notebook {chance.randrange(10**9)}."
    while True:
        sentence = " ".join(chance.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, ENDS))
        sentence = f" {sentence}."
        if count(text + sentence) > tokens:
            return text
        text += sentence


@dataclass(frozen=True, slots=True)
class Work:
    """One batch: all streams begin at once, greedy, each with exactly `max_tokens` out."""

    prompts: tuple[str, ...]
    max_tokens: int

    @classmethod
    def make(
        cls, streams: int, seed: str, *, prompt_tokens: int, max_tokens: int, count: Callable[[str], int]
    ) -> Work:
        """The same `seed` gives the same prompts; another gives others, so that no cache knows them."""
        chance = random.Random(seed)
        return cls(tuple(prompt_of(prompt_tokens, chance, count) for _ in range(streams)), max_tokens)


@dataclass(frozen=True, slots=True)
class Stream:
    """What one stream gave; times in seconds from the moment at which the whole batch was due."""

    first_s: float
    last_s: float
    tokens: int
    token_ids: tuple[int, ...] = ()
    """Empty where the subject tells no ids, but their number."""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a batch gave."""

    streams: Sequence[Stream]
    cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU seconds, by process."""
    stolen: float = 0.0
    """The share of all cores' time that a hypervisor gave to somebody else."""

    @property
    def tokens(self) -> int:
        return sum(stream.tokens for stream in self.streams)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(stream.last_s for stream in self.streams)

    @property
    def ttft_mean_s(self) -> float:
        return sum(stream.first_s for stream in self.streams) / len(self.streams)

    @property
    def ttft_worst_s(self) -> float:
        return max(stream.first_s for stream in self.streams)


class CannotMeasure(Exception):
    """A subject does not run, or does not do what the others do; the message says why."""
