"""Jobs as tests hand them in."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from services.gateway.jobs.seals import KEY_BYTES, PayloadSeals
from services.mesh.context import Identity
from services.mesh.jobs import JobKind, JobRequested, Sealed

GENERATE = "/llmos.gateway.v1.GenerationService/Generate"


def new_seals() -> PayloadSeals:
    """Under a key of their own."""
    return PayloadSeals([os.urandom(KEY_BYTES)])


def a_job(**changes: Any) -> JobRequested:
    """A job of acme's, with fields changed."""
    now = datetime(2030, 1, 1, tzinfo=UTC)
    job = JobRequested(
        job_id="job_1",
        kind=JobKind.REQUEST,
        identity=Identity("acme", "alice", "key_1", frozenset({"generate"})),
        method=GENERATE,
        model="echo-1",
        request=Sealed("", b""),
        create_time=now,
        not_before=now,
        max_attempts=5,
        give_up_time=now + timedelta(days=1),
        result_ttl_s=86_400,
    )
    return replace(job, **changes)
