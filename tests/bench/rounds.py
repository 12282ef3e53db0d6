"""The subjects one after the other, again and again: A/B/C, A/B/C. Whoever is not measured rests."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.bench.subject import Subject, cpu_s, run
from tests.bench.work import Batch, CannotMeasure, Work

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. `count` gives the tokens of a text."""

    levels: tuple[int, ...]
    """How many streams at once."""
    rounds: int
    prompt_tokens: int
    max_tokens: int
    count: Callable[[str], int]
    seed: str
    until_s: float = float("inf")
    """On the monotonic clock: no round begins that would probably end after it, but the first."""

    def work(self, streams: int, label: str) -> Work:
        return Work.make(
            streams,
            f"{self.seed}/{label}/{streams}",
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.max_tokens,
            count=self.count,
        )


@dataclass(slots=True)
class Rounds:
    """What came of it: for each level and subject a batch for each round."""

    batches: dict[int, dict[str, list[Batch]]] = field(default_factory=dict)

    def add(self, level: int, subject: str, batch: Batch) -> None:
        self.batches.setdefault(level, {}).setdefault(subject, []).append(batch)

    def rates(self, level: int, subject: str) -> list[float]:
        """Tokens per second, round by round; empty where it was not measured."""
        return [batch.tokens_per_s for batch in self.batches.get(level, {}).get(subject, ())]


async def measure(
    subjects: Mapping[int, Sequence[Subject]],
    plan: Plan,
    say: Say,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Rounds:
    """Interleaved rounds. `subjects` are given by level. All of them rest at first.

    Raises CannotMeasure where a subject fails, or gives another number of tokens than it was asked for.
    """
    result = Rounds()
    begun_s = clock()
    for index in range(plan.rounds):
        if index and clock() + (clock() - begun_s) / index > plan.until_s:
            say(f"no time is left for more than {index} rounds of {plan.rounds}")
            break
        for level in plan.levels:
            work = plan.work(level, f"round {index}")
            # Another one begins in each round, so that none always follows the same neighbour.
            order = list(subjects[level])
            shift = index % len(order)
            for subject in order[shift:] + order[:shift]:
                batch = await one(subject, work)
                result.add(level, subject.name, batch)
                say(
                    f"round {index + 1}/{plan.rounds}, {level} streams, {subject.name}:"
                    f" {batch.tokens_per_s:.1f} tokens/s, first token {batch.ttft_mean_s * 1000:.0f} ms"
                )
    return result


async def one(subject: Subject, work: Work) -> Batch:
    """Wakes the subject, measures one batch, and lets it rest. Raises CannotMeasure."""
    subject.wake()
    try:
        batch = await run(subject, work)
    finally:
        subject.rest()
    wrong = [stream.tokens for stream in batch.streams if stream.tokens != work.max_tokens]
    if wrong or len(batch.streams) != len(work.prompts):
        raise CannotMeasure(f"{subject.name} gave {wrong} tokens where {work.max_tokens} were asked for")
    return batch


async def faster(
    ways: Sequence[Subject], plan: Plan, say: Say, *, most: int, tokens: int
) -> dict[int, Subject]:
    """Which way is the faster one, by level: the anchor is what its makers' best option gives.

    More than `most` streams are not asked for, nor more than so many `tokens`.
    """
    best: dict[int, Subject] = {}
    for level in plan.levels:
        asked = min(level, most)
        if asked not in best:
            work = Work(plan.work(asked, "choice").prompts, min(tokens, plan.max_tokens))
            rates = {way.name: (await one(way, work)).tokens_per_s for way in ways}
            best[asked] = max(ways, key=lambda way: rates[way.name])
            say(f"{asked} streams: " + ", ".join(f"{n} {r:.1f}" for n, r in rates.items()) + " tokens/s")
        best[level] = best[asked]
    return best


async def idle(subject: Subject, seconds: float) -> float:
    """CPU seconds per second that a subject takes while nobody asks it."""
    processes = {name: process for name, process in subject.processes().items() if name != "client"}
    before = cpu_s(processes)
    await asyncio.sleep(seconds)
    after = cpu_s(processes)
    return sum(after[name] - before[name] for name in processes) / seconds


@dataclass(frozen=True, slots=True)
class PrefixRound:
    """Times to the first token of two prompts that share their beginning."""

    cold_s: float
    cached_s: float


async def prefixes(subject: Subject, plan: Plan, *, prefix_tokens: int, say: Say) -> list[PrefixRound]:
    """Asks with a long beginning that nobody has seen, then with the same one and another end."""
    found: list[PrefixRound] = []
    for index in range(plan.rounds):
        beginning = Work.make(
            1,
            f"{plan.seed}/prefix {index}",
            prompt_tokens=prefix_tokens,
            max_tokens=2,
            count=plan.count,
        ).prompts[0]
        times: list[float] = []
        for number in range(2):
            chance = random.Random(f"{plan.seed}/end {index} {number}")
            work = Work((f"{beginning} Page {chance.randrange(10**6)} says that",), 2)
            times.append((await one(subject, work)).ttft_worst_s)
        found.append(PrefixRound(*times))
        say(
            f"prefix {index + 1}/{plan.rounds}:"
            f" cold {times[0] * 1000:.0f} ms, cached {times[1] * 1000:.0f} ms"
        )
    return found
