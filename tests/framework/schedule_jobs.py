"""Jobs for tests of the schedule."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

from services.mesh.clock import ManualClock
from services.mesh.context import Identity
from services.mesh.jobs import JobKind, JobRequested, Sealed

START = ManualClock().now()
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
