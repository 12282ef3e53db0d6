"""Jobs for tests of the schedule, and stores to keep them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from services.logging.schedule.job import Failed, Job, Report, to_us
from services.logging.schedule.machine import Machine, Rules
from services.logging.schedule.store import AttemptEnd, Bounds, ReportTaken, ScheduleStore
from services.logging.schedule.stores.memory import MemoryScheduleStore
from services.logging.schedule.stores.sqlite import SqliteScheduleStore
from services.mesh.clock import ManualClock
from services.mesh.context import Identity
from services.mesh.jobs import JobKind, JobRequested, Sealed

START = ManualClock().now()
NOW = to_us(START)
S = 1_000_000
LEASE = NOW + 30 * S
RESULT = Sealed("k1", b"result")
PASSING = Failed("REPLICA_LOST", 14, "It was lost.", retryable=True)
LASTING = Failed("REQUEST_INVALID", 3, "It is wrong.", retryable=False)
MakeStore = Callable[[Bounds], ScheduleStore]
TENANT = Identity("tenant-a", "client-a", "key-a", frozenset({"generate"}))
OTHER = Identity("tenant-b", "client-b", "key-b", frozenset({"generate"}))
ADMIN = Identity("operators", "operator", "key-o", frozenset({"admin", "generate"}))


def requested(job_id: str = "job-1", **changes: Any) -> JobRequested:
    """A job of TENANT's, submitted at START, to run at once."""
    job = JobRequested(
        job_id,
        JobKind.REQUEST,
        TENANT,
        "/llmos.gateway.v1.GenerationService/Generate",
        "model-a",
        Sealed("k1", b"request of " + job_id.encode()),
        create_time=START,
        not_before=START,
        max_attempts=3,
        give_up_time=START + timedelta(hours=24),
        result_ttl_s=3600.0,
    )
    return replace(job, **changes)


def memory_store(bounds: Bounds | None = None) -> MemoryScheduleStore:
    """Its chance is none: each backoff is as long as it may be, as in the next one."""
    return MemoryScheduleStore(Machine(Rules(), lambda: 1.0), bounds or Bounds())


def sqlite_store(folder: Path, bounds: Bounds | None = None) -> SqliteScheduleStore:
    return SqliteScheduleStore(folder / "schedule.db", Machine(Rules(), lambda: 1.0), bounds or Bounds())


async def claim_ids(store: ScheduleStore, count: int, now_us: int = NOW) -> list[str]:
    """The ids of what is claimed, for 30 s."""
    claims = (await store.claim("w1", count, now_us + 30 * S, now_us)).claims
    return [claim.job.job_id for claim in claims]


async def kept(store: ScheduleStore, job_id: str = "job-1") -> Job:
    """A job that is there."""
    found = await store.get(job_id)
    assert found is not None
    return found[0]


async def report_one(
    store: ScheduleStore, job_id: str, fence: int, request_id: str, report: Report, now_us: int
) -> ReportTaken:
    """A report that comes alone."""
    (taken,) = await store.report([AttemptEnd(job_id, fence, request_id, report)], now_us)
    return taken
