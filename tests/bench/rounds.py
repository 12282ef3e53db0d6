"""The subjects one after the other, again and again: A/B/C, A/B/C. Whoever is not measured rests."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil

from tests.bench.subject import Subject, cpu_s, run
from tests.bench.work import Batch, CannotMeasure, Work

Say = Callable[[str], None]
STOLEN = 0.02
"""A batch during which others had more of the machine is repeated, if the plan says so."""


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
    repeats: int = 0
    """How often a batch is asked again while others have the machine; the least disturbed one counts."""
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


def stolen_s() -> float:
    """What a hypervisor has given to somebody else since the system's start, over all cores; 0 where the
    system does not tell."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


async def measure(
    subjects: Mapping[int, Sequence[Subject]],
    plan: Plan,
    say: Say,
    *,
    clock: Callable[[], float] = time.monotonic,
    stolen_s: Callable[[], float] = stolen_s,
) -> Rounds:
    """Interleaved rounds. `subjects` are given by level. All of them rest at first. `stolen_s` are the
    seconds of any core that others have had so far.

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
                tries: list[Batch] = []
                for attempt in range(plan.repeats + 1):
                    # Other prompts the next time, since a cache has seen the first ones.
                    label = f"round {index} {subject.name} {attempt}"
                    asked = plan.work(level, label) if attempt else work
                    begun, before_s = time.perf_counter(), stolen_s()
                    batch = await one(subject, asked)
                    taken_s = (time.perf_counter() - begun) * (os.cpu_count() or 1)
                    tries.append(replace(batch, stolen=(stolen_s() - before_s) / taken_s))
                    say(_line(f"round {index + 1}/{plan.rounds}, {level} streams, {subject.name}", tries[-1]))
                    if tries[-1].stolen <= STOLEN:
                        break
                result.add(level, subject.name, min(tries, key=lambda batch: batch.stolen))
    return result


def _line(what: str, batch: Batch) -> str:
    disturbed = f"; others had {100 * batch.stolen:.0f} % of the machine" if batch.stolen > STOLEN else ""
    return (
        f"{what}: {batch.tokens_per_s:.1f} tokens/s, first token {batch.ttft_mean_s * 1000:.0f} ms{disturbed}"
    )


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
