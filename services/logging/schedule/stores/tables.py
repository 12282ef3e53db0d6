"""The tables of the schedule in SQLite, and jobs as their rows."""

from __future__ import annotations

from typing import Any

from services.logging.schedule.job import Job, to_us
from services.mesh.job_records import pack_history, pack_job, unpack_history, unpack_job
from services.mesh.jobs import JobState

FORMAT = 1
COLUMNS = (
    "job_id",
    "tenant_id",
    "kind",
    "batch_id",
    "rank",
    "order_us",
    "prefix_group",
    "create_us",
    "give_up_us",
    "state",
    "attempts",
    "fence",
    "due_us",
    "lease_us",
    "worker",
    "start_us",
    "end_us",
    "expire_us",
    "last_request_id",
    "error_reason",
    "progress_tokens",
    "version",
    "cancel_asked",
    "reported_fence",
    "history",
    "body",
)
"""Of a job: up to `state` what it came with, then what changes."""
CHANGING = COLUMNS[COLUMNS.index("state") : COLUMNS.index("body")]
JOB = ", ".join(COLUMNS)
_COLUMNS_SQL = ",\n    ".join(
    f"{name} {'BLOB' if name in ('history', 'body') else 'TEXT' if name in texts else 'INTEGER'} NOT NULL"
    for texts in [
        {"job_id", "tenant_id", "batch_id", "prefix_group", "worker", "last_request_id", "error_reason"}
    ]
    for name in COLUMNS[1:]
)

SCHEMA = f"""
CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY,
    {_COLUMNS_SQL},
    is_due INTEGER NOT NULL
);
CREATE INDEX jobs_due ON jobs (tenant_id, rank, order_us, prefix_group, create_us, job_id) WHERE is_due = 1;
CREATE INDEX jobs_waiting ON jobs (is_due, due_us) WHERE state = 1;
CREATE INDEX jobs_given_up ON jobs (give_up_us, job_id) WHERE state = 1;
CREATE INDEX jobs_running ON jobs (lease_us, job_id) WHERE state = 2;
CREATE INDEX jobs_ended ON jobs (expire_us, job_id) WHERE state > 2;
CREATE INDEX jobs_in_groups ON jobs (tenant_id, rank, prefix_group, order_us)
    WHERE state = 1 AND prefix_group != '';
CREATE INDEX jobs_by_time ON jobs (create_us, job_id);
CREATE INDEX jobs_of_tenant ON jobs (tenant_id, create_us, job_id);
CREATE INDEX jobs_of_tenant_by_state ON jobs (tenant_id, kind, state);
CREATE INDEX jobs_of_batch ON jobs (batch_id, create_us, job_id) WHERE batch_id != '';
CREATE INDEX jobs_of_batch_by_state ON jobs (batch_id, state, cancel_asked, job_id) WHERE batch_id != '';
CREATE TABLE ended_jobs (
    webhook_id TEXT PRIMARY KEY,
    job_id TEXT NOT NULL,
    {_COLUMNS_SQL}
);
CREATE TABLE seals (
    job_id TEXT NOT NULL,
    purpose TEXT NOT NULL,
    key_id TEXT NOT NULL,
    ciphertext BLOB NOT NULL,
    PRIMARY KEY (job_id, purpose)
);
CREATE TABLE tenants (
    tenant_id TEXT PRIMARY KEY,
    waiting INTEGER NOT NULL,
    running INTEGER NOT NULL,
    due INTEGER NOT NULL,
    dead_letters INTEGER NOT NULL,
    served INTEGER NOT NULL,
    held_until_us INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX tenants_in_turn ON tenants (running, served, tenant_id, held_until_us) WHERE due > 0;
CREATE TABLE dead_letters (
    dead_letter_id TEXT PRIMARY KEY,
    tenant_id TEXT NOT NULL,
    error_reason TEXT NOT NULL,
    model TEXT NOT NULL,
    detail TEXT NOT NULL,
    create_us INTEGER NOT NULL,
    expire_us INTEGER NOT NULL,
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    raw BLOB NOT NULL
);
CREATE INDEX dead_letters_by_time ON dead_letters (create_us, dead_letter_id);
CREATE INDEX dead_letters_of_tenant ON dead_letters (tenant_id, create_us, dead_letter_id);
CREATE INDEX dead_letters_of_nobody ON dead_letters (expire_us, dead_letter_id) WHERE tenant_id = '';
CREATE TABLE remembered (job_id TEXT PRIMARY KEY, until_us INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX remembered_until ON remembered (until_us);
CREATE TABLE cancelling (batch_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL,
    time_us INTEGER NOT NULL,
    event BLOB NOT NULL
);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counters VALUES ('kept', 0);
"""  # noqa: S608


def values(job: Job) -> tuple[Any, ...]:
    """As COLUMNS says."""
    request = job.request
    return (
        job.job_id,
        job.tenant_id,
        int(request.kind),
        request.batch_id,
        job.rank,
        job.order_us,
        request.prefix_group,
        to_us(request.create_time),
        job.give_up_us,
        *changing(job),
        pack_job(request),
    )


def changing(job: Job) -> tuple[Any, ...]:
    """As CHANGING says."""
    return (
        int(job.state),
        job.attempts,
        job.fence,
        job.due_us,
        job.lease_us,
        job.worker,
        job.start_us,
        job.end_us,
        job.expire_us,
        job.last_request_id,
        job.error_reason,
        job.progress_tokens,
        job.version,
        job.cancel_asked,
        job.reported_fence,
        pack_history(job.history) if job.history else b"",
    )


def job_of(row: tuple[Any, ...], ended: Job | None = None) -> Job:
    """A job of a row with COLUMNS."""
    (state, attempts, fence, due_us, lease_us, worker, start_us, end_us, expire_us) = row[9:18]
    (request_id, reason, tokens, version, cancel_asked, reported_fence, history, body) = row[18:26]
    return Job(
        unpack_job(body),
        JobState(state),
        attempts,
        fence,
        due_us,
        lease_us,
        worker,
        start_us,
        end_us,
        expire_us,
        unpack_history(history),
        request_id,
        reason,
        tokens,
        version,
        bool(cancel_asked),
        reported_fence,
        row[5],
        ended,
    )
