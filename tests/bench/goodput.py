"""Requests that arrive by chance, at a rate below what the platform can take: how many of them go well.

A request goes well where its first token, and each one after it, take at most three times as long as with
the anchor for one request alone: one bound for both, which is not ours to set. Arrivals are a Poisson
process; both get the same ones, and times count from the arrival, whether or not the subject was free.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.bench.figures import Aim, ratio
from tests.bench.rounds import Plan, Say
from tests.bench.subject import Subject
from tests.bench.work import CannotMeasure, Stream

LOAD = 0.7
"""Of what the platform takes with the most streams."""
SLOWER = 3.0
SECONDS = 20.0
ALONE = 3
"""Requests that tell how long one alone takes; the median counts."""


class Askable(Subject, Protocol):
    """A subject that takes requests one by one."""

    async def ask(self, prompt: str, max_tokens: int, due_s: float) -> Stream:
        """Times of the answer count from `due_s` of time.perf_counter. Raises CannotMeasure."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an answer comes, in seconds."""

    first_s: float
    each_s: float

    @classmethod
    def of(cls, stream: Stream) -> Pace:
        return cls(stream.first_s, (stream.last_s - stream.first_s) / max(stream.tokens - 1, 1))

    def allows(self, other: Pace) -> bool:
        """Whether the other is at most three times as slow."""
        return other.first_s <= SLOWER * self.first_s and other.each_s <= SLOWER * self.each_s


@dataclass(frozen=True, slots=True)
class Goodput:
    """Of one subject in one round."""

    requests: int
    good: int
    seconds: float


def arrivals(per_s: float, seconds: float, seed: str) -> list[float]:
    """Seconds from the start; at least one."""
    chance = random.Random(seed)
    found = [chance.expovariate(per_s)]
    while found[-1] < seconds:
        found.append(found[-1] + chance.expovariate(per_s))
    return found[:-1] or found


async def measure(
    ours: Askable, anchor: Askable, plan: Plan, per_s: float, say: Say, *, seconds: float = SECONDS
) -> list[tuple[Goodput, Goodput]]:
    """Ours and the anchor's in each round; none begins after the plan's time. Raises CannotMeasure."""
    found: list[tuple[Goodput, Goodput]] = []
    begun_s = time.monotonic()
    for index in range(plan.rounds):
        if index and time.monotonic() + (time.monotonic() - begun_s) / index > plan.until_s:
            break
        bound = await _alone(anchor, plan, f"alone {index}")
        due = arrivals(per_s, seconds, f"{plan.seed}/goodput {index}")
        made: dict[str, Goodput] = {}
        for subject in (ours, anchor) if index % 2 else (anchor, ours):
            streams = await _arrive(subject, plan, due, f"goodput {index} {subject.name}")
            good = sum(bound.allows(Pace.of(stream)) for stream in streams)
            made[subject.name] = Goodput(len(streams), good, seconds)
            say(
                f"goodput {index + 1}/{plan.rounds}, {per_s:.2f} requests/s, {subject.name}:"
                f" {good} of {len(streams)} went well"
            )
        found.append((made[ours.name], made[anchor.name]))
    return found


async def _alone(subject: Askable, plan: Plan, label: str) -> Pace:
    subject.wake()
    try:
        paces = [
            Pace.of(await subject.ask(prompt, plan.max_tokens, time.perf_counter()))
            for prompt in plan.work(ALONE, label).prompts
        ]
    finally:
        subject.rest()
    first_s = statistics.median(pace.first_s for pace in paces)
    return Pace(first_s, statistics.median(pace.each_s for pace in paces))


async def _arrive(subject: Askable, plan: Plan, due: Sequence[float], label: str) -> list[Stream]:
    prompts = plan.work(len(due), label).prompts
    subject.wake()
    try:
        begun_s = time.perf_counter()

        async def arrive(after_s: float, prompt: str) -> Stream:
            await asyncio.sleep(begun_s + after_s - time.perf_counter())
            return await subject.ask(prompt, plan.max_tokens, begun_s + after_s)

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(arrive(after_s, prompt))
                for after_s, prompt in zip(due, prompts, strict=True)
            ]
    finally:
        subject.rest()
    streams = [task.result() for task in tasks]
    if any(stream.tokens != plan.max_tokens for stream in streams):
        raise CannotMeasure(f"{subject.name} gave another number of tokens than was asked for")
    return streams


def aim(found: Sequence[tuple[Goodput, Goodput]], anchor: str) -> Aim:
    """At least as much as the anchor; where that did nothing well, as much as one request of its."""
    ours = [one.good / one.seconds for one, _ in found]
    theirs = [max(other.good, 1) / other.seconds for _, other in found]
    return Aim(f"goodput_vs_{anchor}", ratio(ours, theirs), 1.0)
