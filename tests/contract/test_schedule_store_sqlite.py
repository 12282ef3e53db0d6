"""The schedule in SQLite: beside the store in memory, and as a file."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from services.logging.schedule.job import (
    Postponed,
    Report,
    Succeeded,
    from_us,
)
from services.logging.schedule.machine import Machine, Rules
from services.logging.schedule.store import (
    Beat,
    Bounds,
    DeadLetterFilter,
    JobFilter,
    ScheduleStore,
)
from services.logging.schedule.stores.memory import MemoryScheduleStore
from services.mesh.errors import DependencyUnavailable
from services.mesh.jobs import (
    JobKind,
    JobPriority,
    JobState,
)
from tests.framework.schedule_jobs import (
    LASTING,
    LEASE,
    NOW,
    OTHER,
    PASSING,
    RESULT,
    START,
    TENANT,
    S,
    kept,
    report_one,
    requested,
    sqlite_store,
)


@pytest.mark.parametrize("run", range(8))
async def test_random_lives_leave_both_stores_the_same(run: int, tmp_path: Path) -> None:
    """What the stores tell after each of many steps, which begin with the same seed."""
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    bounds = Bounds(max_jobs_per_tenant=12)
    stores: list[ScheduleStore] = [
        MemoryScheduleStore(Machine(Rules(), lambda: 1.0), bounds),
        sqlite_store(tmp_path, bounds),
    ]
    told: list[list[object]] = []
    for store in stores:
        await store.start()
        told.append([])
        await _live(store, random.Random(seed), told[-1])
        await store.stop()
    for number, (one, other) in enumerate(zip(*told, strict=True)):
        assert one == other, f"seed {seed}, step {number}"


async def _live(store: ScheduleStore, rng: random.Random, log: list[object]) -> None:
    now_us, numbers, fences = NOW, 0, dict[str, int]()
    for _ in range(250):
        now_us += rng.choice([0, 1, S // 3, S, 20 * S])
        job_id = rng.choice([*fences, "none"])
        match rng.randrange(9):
            case 0 | 1:
                numbers += 1
                new = requested(
                    f"job-{numbers}",
                    identity=rng.choice([TENANT, OTHER]),
                    kind=rng.choice([JobKind.REQUEST] * 5 + [JobKind.BATCH] * (20 if numbers < 3 else 1)),
                    create_time=from_us(now_us),
                    not_before=from_us(now_us + rng.choice([0, 0, 5 * S])),
                    give_up_time=from_us(now_us + rng.choice([2, 60, 600]) * S),
                    priority=rng.choice(list(JobPriority)),
                    prefix_group=rng.choice(["", "g1", "g2"]),
                    batch_id=rng.choice(["", "job-1", "job-2"]),
                    result_ttl_s=rng.choice([5.0, 500.0]),
                    has_webhook=rng.random() < 0.3,
                )
                log.append(await store.accept([new], now_us))
            case 2 | 3:
                found = await store.claim("w", rng.randint(1, 4), now_us + 5 * S, now_us)
                log.append(found.claims)
                fences |= {claim.job.job_id: claim.job.fence for claim in found.claims}
            case 4 | 5:
                reports: list[Report] = [Succeeded(RESULT), PASSING, LASTING, Postponed(1.0, 2.0)]
                report = rng.choice(reports)
                log.append(await report_one(store, job_id, fences.get(job_id, 1), "r", report, now_us))
            case 6:
                beats = [Beat(each, fence, 3) for each, fence in fences.items()][-5:]
                log.append(await store.heartbeat(beats, now_us + 5 * S, now_us))
            case 7:
                log.append(await store.sweep(now_us, 4))
            case 8:
                try:
                    if rng.random() < 0.5:
                        log.append(await store.cancel(job_id, "", now_us))
                    else:
                        numbers += 1
                        new = requested(f"job-{numbers}", give_up_time=from_us(now_us + 60 * S))
                        log.append(await store.replay(job_id, TENANT.tenant_id, new, now_us))
                except Exception as error:
                    log.append(str(error))
        log.append(await store.totals())
    log.append(await store.list_jobs(JobFilter(kinds=frozenset(JobKind)), 1000, None, with_results=True))
    log.append(await store.dead_letters(DeadLetterFilter(), 1000, None))
    log.append([replace(row, number=0) for row in await store.outbox(1000)])
    log.append([await store.count("", batch) for batch in ("", "job-1", "job-2")])


async def test_what_was_written_is_there_after_a_kill(tmp_path: Path) -> None:
    """The file as it is while the store runs: what a killed process leaves."""
    store = sqlite_store(tmp_path)
    await store.start()
    await store.accept([requested(), requested("job-2", give_up_time=START)], NOW)
    await store.claim("w1", 1, LEASE, NOW)
    again = sqlite_store(_copied(tmp_path))
    await again.start()
    assert await kept(again) == await kept(store)
    assert [row.event for row in await again.outbox(9)] == [row.event for row in await store.outbox(9)]
    assert (await report_one(again, "job-1", 1, "r", Succeeded(RESULT), NOW)).taken
    await again.stop()
    await store.stop()


def _copied(folder: Path) -> Path:
    copy = folder / "copy"
    copy.mkdir()
    for file in folder.glob("schedule.db*"):
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


async def test_one_process_has_the_file(tmp_path: Path) -> None:
    store = sqlite_store(tmp_path)
    await store.start()
    with pytest.raises(OSError, match="in use by another process"):
        await sqlite_store(tmp_path).start()
    await store.stop()
    with pytest.raises(DependencyUnavailable):
        await store.totals()


async def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "schedule.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    store = sqlite_store(tmp_path)
    with pytest.raises(OSError, match="no schedule of this version"):
        await store.start()
    await store.stop()


async def test_a_claim_that_is_cut_off_is_handed_back(tmp_path: Path) -> None:
    store = sqlite_store(tmp_path)
    await store.start()
    await store.accept([requested()], NOW)
    claiming = asyncio.create_task(store.claim("w1", 1, LEASE, NOW))
    await asyncio.sleep(0)  # it has begun
    await asyncio.sleep(0)
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    await store.stop()
    await store.start()
    assert (await kept(store)).state is JobState.WAITING
    (claim,) = (await store.claim("w1", 1, LEASE, NOW)).claims
    assert (claim.job.attempts, claim.job.fence) == (1, 2)
    await store.stop()
