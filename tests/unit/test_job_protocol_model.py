"""The whole way of a job under seeded crashes, reorderings, repeats and wipes (R38)."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from services.logging.schedule import transactions
from services.logging.schedule.job import Beaten, Claimed, Event, Job, Reported, Step
from services.logging.schedule.machine import Machine
from services.logging.schedule.rows import Purpose
from services.logging.schedule.store import ScheduleStore
from services.logging.schedule.stores.memory import MemoryRows
from tests.framework.job_model import JobWorld
from tests.framework.schedule_jobs import memory_store, sqlite_store

RUNS = 400


def seeds(count: int) -> range:
    first = random.SystemRandom().randrange(10**9)
    print(f"seeds from {first}, {count} of them")
    return range(first, first + count)


async def play(runs: range, steps: int = 60) -> None:
    async def as_it_was(store: ScheduleStore) -> ScheduleStore:
        return store

    for seed in runs:
        await JobWorld(seed, memory_store(), as_it_was).run(steps)


async def test_r38_each_job_ends_once_and_is_tried_as_often_as_it_may_be() -> None:
    await play(seeds(RUNS))


async def test_r38_long_lives() -> None:
    await play(seeds(8), steps=800)


async def test_r38_seeds_that_once_mattered() -> None:
    """Fixed seeds, so that a run of this test is the same everywhere."""
    await play(range(150))


async def test_r38_in_sqlite_killed_between_any_two_transactions(tmp_path: Path) -> None:
    lives = 0

    async def killed(store: ScheduleStore) -> ScheduleStore:
        """Its file as it is now, which is what a killed process leaves."""
        nonlocal lives
        before, after = tmp_path / str(lives), tmp_path / str(lives + 1)
        lives += 1
        shutil.copytree(before, after)
        await store.stop()
        again = sqlite_store(after)
        await again.start()
        return again

    for seed in seeds(8):
        lives += 1
        (tmp_path / str(lives)).mkdir()
        store = sqlite_store(tmp_path / str(lives))
        await store.start()
        world = JobWorld(seed, store, killed)
        await world.run(80)
        await world.store.stop()
    assert lives > 8


_step = Machine.step


def _any_fence(self: Machine, job: Job, event: Event, now_us: int) -> Step:
    if isinstance(event, Reported):
        event = Reported(job.fence, event.request_id, event.report)
    if isinstance(event, Beaten):
        event = Beaten(job.fence, event.lease_us)
    return _step(self, job, event, now_us)


def _claims_are_free(self: Machine, job: Job, event: Event, now_us: int) -> Step:
    step = _step(self, job, event, now_us)
    if isinstance(event, Claimed) and step.taken:
        object.__setattr__(step.job, "attempts", job.attempts)
    return step


def _same_fence(self: Machine, job: Job, event: Event, now_us: int) -> Step:
    step = _step(self, job, event, now_us)
    if isinstance(event, Claimed) and step.taken:
        object.__setattr__(step.job, "fence", max(job.fence, 1))
    return step


def _remembers_nothing(self: MemoryRows, job_id: str) -> bool:
    return job_id in self.jobs


def _takes_all(self: MemoryRows, job_id: str) -> bool:
    return False


FAULTS = {
    "reports under an older fence are taken": (Machine, "step", _any_fence),
    "claims are not counted": (Machine, "step", _claims_are_free),
    "the fence does not grow": (Machine, "step", _same_fence),
    "retries come at once": (Machine, "_backoff_us", lambda *_: 0),
    "ids of what was replayed are forgotten": (MemoryRows, "is_known", _remembers_nothing),
    "a job that comes again begins anew": (MemoryRows, "is_known", _takes_all),
    "leases never end": (MemoryRows, "lease_ended", lambda *_: []),
    "nothing is told of": (MemoryRows, "post", lambda *_: None),
    "results are not kept": (
        transactions,
        "KeepResult",
        type("Never", (), {"__match_args__": ("result",), "purpose": Purpose.RESULT}),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_model_finds_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, broken = FAULTS[fault]
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(AssertionError, match="seed"):
        await play(range(200), steps=120)
