"""Jobs for tests, and strategies of hypothesis that make any."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

from services.mesh.context import Identity
from services.mesh.event_codec import REASONS
from services.mesh.jobs import (
    DeadLettered,
    JobAttempt,
    JobEvent,
    JobKind,
    JobPriority,
    JobRequested,
    RetryRequested,
    Sealed,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SUBMITTER = Identity("tenant-a", "client-a", "key-a", frozenset({"generate"}))


def job(job_id: str = "job_1", *, create_time: datetime = NOW, **fields: Any) -> JobRequested:
    """A job that may run at once, for an hour."""
    made = JobRequested(
        job_id=job_id,
        kind=JobKind.REQUEST,
        identity=SUBMITTER,
        method="/llmos.gateway.v1.GenerationService/Generate",
        model="echo",
        request=Sealed("key-1", b"sealed " + job_id.encode()),
        create_time=create_time,
        not_before=create_time,
        max_attempts=3,
        give_up_time=create_time + timedelta(hours=1),
        result_ttl_s=3600.0,
    )
    return replace(made, **fields)


names = st.text(max_size=40)
some_names = st.text(min_size=1, max_size=40)
times = st.integers(-(10**16), 2 * 10**17).map(
    lambda us: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
)
numbers = st.integers(0, 2**32 - 1)
reasons = st.sampled_from(["", *REASONS])
texts = st.dictionaries(some_names, names, max_size=16)
identities = st.builds(
    Identity,
    tenant_id=some_names,
    client_id=some_names,
    key_id=names,
    scopes=st.frozensets(some_names, max_size=5),
    roles=st.frozensets(some_names, max_size=5),
    token_id=names,
    issued_at_s=st.integers(0, 2**33),
)
seals = st.builds(Sealed, names, st.binary(max_size=300))
jobs = st.builds(
    JobRequested,
    job_id=some_names,
    kind=st.sampled_from(JobKind),
    identity=identities,
    method=names,
    model=names,
    request=seals,
    create_time=times,
    not_before=times,
    max_attempts=st.integers(1, 20),
    give_up_time=times,
    result_ttl_s=st.integers(0, 2592000).map(float) | st.sampled_from([0.5, 0.001, 86_400.25]),
    priority=st.sampled_from(JobPriority),
    labels=texts,
    prefix_group=names,
    batch_id=names,
    request_digest=st.binary(max_size=32),
    has_webhook=st.booleans(),
)
attempts = st.builds(
    JobAttempt,
    number=numbers,
    request_id=names,
    worker=names,
    start_time=times,
    end_time=times,
    error_reason=reasons,
    status_code=st.integers(0, 16),
    message=names,
)
job_events: st.SearchStrategy[JobEvent] = st.one_of(
    jobs,
    st.builds(RetryRequested, jobs, names, reasons, numbers),
    st.builds(
        DeadLettered,
        error_reason=reasons,
        detail=names,
        job_id=names,
        attempts=numbers,
        job=st.none() | jobs,
        history=st.lists(attempts, max_size=3).map(tuple),
        raw=st.binary(max_size=300),
        topic=names,
        partition=st.integers(0, 2**31 - 1),
        offset=st.integers(0, 2**63 - 1),
    ),
)
