"""`Rows` over a connection to SQLite, for one transaction.

How many jobs each tenant has is kept beside them, so that a claim finds whose turn it is without looking at
all jobs: it is counted along while the transaction runs, and written at its end.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from services.logging.schedule.job import Job
from services.logging.schedule.rows import Purpose, TenantJobs
from services.logging.schedule.store import DeadLetter, OutboxRow
from services.logging.schedule.stores.tables import CHANGING, COLUMNS, JOB, changing, job_of, values
from services.mesh.job_records import pack_news, unpack_news
from services.mesh.jobs import DeadLettered, JobKind, JobState, RetryRequested, Sealed

MAX_FALL_DUE = 1000
"""Jobs that one transaction marks as due."""
_INSERT = f"INSERT INTO jobs ({JOB}, is_due) VALUES ({', '.join('?' * (len(COLUMNS) + 1))})"  # noqa: S608
_INSERT_ENDED = f"INSERT INTO ended_jobs (webhook_id, {JOB}) VALUES ({', '.join('?' * (len(COLUMNS) + 1))})"  # noqa: S608
_UPDATE = f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in CHANGING)}, is_due = ? WHERE job_id = ?"  # noqa: S608
LETTER = (
    "dead_letter_id, error_reason, detail, create_us, expire_us, tenant_id, model, topic, partition, offset"
)


@dataclass
class _Tenant:
    waiting: int = 0
    running: int = 0
    due: int = 0
    dead_letters: int = 0
    served: int = 0
    held_until_us: int = 0

    def values(self) -> tuple[int, ...]:
        return (self.waiting, self.running, self.due, self.dead_letters, self.served, self.held_until_us)


class SqliteRows:
    """`Rows`. `flush` is called before the transaction ends."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._tenants: dict[str, tuple[_Tenant, tuple[int, ...] | None]] = {}
        """Beside each: how it is in the table."""
        self._kept: int | None = None
        self._kept_before = 0

    def flush(self) -> None:
        for tenant_id, (tenant, before) in self._tenants.items():
            now = tenant.values()
            if now == before:
                continue
            if any(now[:4]):
                self._db.execute(
                    "INSERT OR REPLACE INTO tenants VALUES (?, ?, ?, ?, ?, ?, ?)", (tenant_id, *now)
                )
            else:  # whom nothing is kept of is forgotten, whenever it was served
                self._db.execute("DELETE FROM tenants WHERE tenant_id = ?", (tenant_id,))
        self._tenants.clear()
        if self._kept is not None and self._kept != self._kept_before:
            self._db.execute("UPDATE counters SET value = ? WHERE name = 'kept'", (self._kept,))
        self._kept = None

    def _tenant(self, tenant_id: str) -> _Tenant:
        if tenant_id not in self._tenants:
            row = self._db.execute(
                "SELECT waiting, running, due, dead_letters, served, held_until_us FROM tenants"
                " WHERE tenant_id = ?",
                (tenant_id,),
            ).fetchone()
            self._tenants[tenant_id] = (_Tenant(*row) if row else _Tenant(), row)
        return self._tenants[tenant_id][0]

    def _count(self, job: Job, is_due: bool, sign: int) -> None:
        tenant = self._tenant(job.tenant_id)
        tenant.waiting += sign * (job.state is JobState.WAITING)
        tenant.running += sign * (job.state is JobState.RUNNING)
        tenant.due += sign * is_due

    def _was_due(self, job_id: str) -> bool:
        (is_due,) = self._db.execute("SELECT is_due FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return bool(is_due)

    def job(self, job_id: str) -> Job | None:
        jobs = self._jobs("job_id = ?", (job_id,), 1)
        return jobs[0] if jobs else None

    def _jobs(self, where: str, parameters: tuple[Any, ...], limit: int, order: str = "job_id") -> list[Job]:
        rows = self._db.execute(
            f"SELECT {JOB} FROM jobs WHERE {where} ORDER BY {order} LIMIT ?",  # noqa: S608
            (*parameters, limit),
        ).fetchall()
        return [self.job_of(row) for row in rows]

    def job_of(self, row: tuple[Any, ...]) -> Job:
        """Of a row with COLUMNS: with the job that it tells of."""
        return job_of(row, self._ended(row[0]) if row[2] == JobKind.WEBHOOK else None)

    def _ended(self, webhook_id: str) -> Job | None:
        row = self._db.execute(f"SELECT {JOB} FROM ended_jobs WHERE webhook_id = ?", (webhook_id,)).fetchone()  # noqa: S608
        return job_of(row) if row else None

    def is_known(self, job_id: str) -> bool:
        found = self._db.execute(
            "SELECT 1 FROM jobs WHERE job_id = ? UNION ALL SELECT 1 FROM remembered WHERE job_id = ?",
            (job_id, job_id),
        ).fetchone()
        return found is not None

    def insert(self, job: Job, now_us: int) -> None:
        is_due = job.state is JobState.WAITING and job.due_us <= now_us
        self._db.execute(_INSERT, (*values(job), is_due))
        if job.ended is not None:
            self._db.execute(_INSERT_ENDED, (job.job_id, *values(job.ended)))
        self._count(job, is_due, 1)
        self._kept = self.kept() + 1

    def update(self, old: Job, new: Job) -> None:
        was_due = old.state is JobState.WAITING and self._was_due(old.job_id)
        is_due = was_due and new.state is JobState.WAITING and new.due_us <= old.due_us
        self._db.execute(_UPDATE, (*changing(new), is_due, new.job_id))
        if (old.state, was_due) != (new.state, is_due):
            self._count(old, was_due, -1)
            self._count(new, is_due, 1)

    def remove(self, job: Job, remember_until_us: int) -> None:
        was_due = job.state is JobState.WAITING and self._was_due(job.job_id)
        for table, key in (("jobs", "job_id"), ("ended_jobs", "webhook_id"), ("seals", "job_id")):
            self._db.execute(f"DELETE FROM {table} WHERE {key} = ?", (job.job_id,))  # noqa: S608
        self._remove_letter(job.job_id, job.tenant_id)
        self._db.execute("INSERT OR REPLACE INTO remembered VALUES (?, ?)", (job.job_id, remember_until_us))
        self._count(job, was_due, -1)
        self._kept = self.kept() - 1

    def sealed(self, job_id: str, purpose: Purpose) -> Sealed | None:
        row = self._db.execute(
            "SELECT key_id, ciphertext FROM seals WHERE job_id = ? AND purpose = ?", (job_id, purpose.value)
        ).fetchone()
        return Sealed(*row) if row else None

    def put_sealed(self, job_id: str, purpose: Purpose, sealed: Sealed) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO seals VALUES (?, ?, ?, ?)",
            (job_id, purpose.value, sealed.key_id, sealed.ciphertext),
        )

    def drop_sealed(self, job_id: str, purpose: Purpose) -> None:
        self._db.execute("DELETE FROM seals WHERE job_id = ? AND purpose = ?", (job_id, purpose.value))

    def kept(self) -> int:
        if self._kept is None:
            (self._kept,) = self._db.execute("SELECT value FROM counters WHERE name = 'kept'").fetchone()
            self._kept_before = self._kept
        return self._kept

    def of_tenant(self, tenant_id: str) -> TenantJobs:
        tenant = self._tenant(tenant_id)
        return TenantJobs(tenant.waiting, tenant.running, tenant.dead_letters)

    def group_order_us(self, job: Job) -> int | None:
        (newest_us,) = self._db.execute(
            "SELECT max(order_us) FROM jobs WHERE state = 1 AND prefix_group != ''"
            " AND tenant_id = ? AND rank = ? AND prefix_group = ?",
            (job.tenant_id, job.rank, job.request.prefix_group),
        ).fetchone()
        return None if newest_us is None else int(newest_us)

    def fall_due(self, now_us: int) -> None:
        rows = self._db.execute(
            "SELECT job_id, tenant_id FROM jobs WHERE state = 1 AND is_due = 0 AND due_us <= ?"
            " ORDER BY due_us LIMIT ?",
            (now_us, MAX_FALL_DUE),
        ).fetchall()
        self._db.executemany("UPDATE jobs SET is_due = 1 WHERE job_id = ?", [(row[0],) for row in rows])
        for _, tenant_id in rows:
            self._tenant(tenant_id).due += 1

    def tenants_in_turn(self, limit: int, now_us: int) -> list[tuple[int, int, str]]:
        self.flush()
        return self._db.execute(
            "SELECT running, served, tenant_id FROM tenants WHERE due > 0 AND held_until_us <= ?"
            " ORDER BY running, served, tenant_id LIMIT ?",
            (now_us, limit),
        ).fetchall()

    def next_due(self, tenant_id: str) -> Job | None:
        order = "rank, order_us, prefix_group, create_us, job_id"
        jobs = self._jobs("is_due = 1 AND tenant_id = ?", (tenant_id,), 1, order)
        return jobs[0] if jobs else None

    def serve(self, tenant_id: str, number: int) -> None:
        self._tenant(tenant_id).served = number

    def hold(self, tenant_id: str, until_us: int) -> None:
        tenant = self._tenant(tenant_id)
        tenant.held_until_us = max(until_us, tenant.held_until_us)

    def next_due_us(self, now_us: int) -> int | None:
        self.flush()
        (later_us,) = self._db.execute(
            "SELECT min(due_us) FROM jobs WHERE state = 1 AND is_due = 0"
        ).fetchone()
        (held_us,) = self._db.execute("SELECT min(held_until_us) FROM tenants WHERE due > 0").fetchone()
        return min((each for each in (later_us, held_us) if each is not None), default=None)

    def lease_ended(self, now_us: int, limit: int) -> list[Job]:
        return self._jobs("state = 2 AND lease_us <= ?", (now_us,), limit, "lease_us, job_id")

    def time_up(self, now_us: int, limit: int) -> list[Job]:
        return self._jobs("state = 1 AND give_up_us <= ?", (now_us,), limit, "give_up_us, job_id")

    def expired(self, now_us: int, limit: int) -> list[Job]:
        return self._jobs("state > 2 AND expire_us <= ?", (now_us,), limit, "expire_us, job_id")

    def cancelling(self, limit: int) -> list[str]:
        rows = self._db.execute("SELECT batch_id FROM cancelling ORDER BY batch_id LIMIT ?", (limit,))
        return [batch_id for (batch_id,) in rows]

    def begin_cancelling(self, batch_id: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO cancelling VALUES (?)", (batch_id,))

    def end_cancelling(self, batch_id: str) -> None:
        self._db.execute("DELETE FROM cancelling WHERE batch_id = ?", (batch_id,))

    def live_of_batch(self, batch_id: str, limit: int) -> list[Job]:
        live = "batch_id = ? AND batch_id != '' AND state IN (1, 2) AND cancel_asked = 0"
        return self._jobs(live, (batch_id,), limit, "state, job_id")

    def is_batch_over(self, batch_id: str) -> bool:
        found = self._db.execute(
            "SELECT 1 FROM jobs WHERE batch_id = ? AND batch_id != '' AND state IN (1, 2) LIMIT 1",
            (batch_id,),
        ).fetchone()
        return found is None

    def dead_letter(self, dead_letter_id: str) -> DeadLetter | None:
        letters = self._letters("dead_letter_id = ?", (dead_letter_id,), 1)
        return letters[0] if letters else None

    def _letters(self, where: str, parameters: tuple[Any, ...], limit: int) -> list[DeadLetter]:
        rows = self._db.execute(
            f"SELECT {LETTER}, raw FROM dead_letters WHERE {where}"  # noqa: S608
            " ORDER BY create_us, dead_letter_id LIMIT ?",
            (*parameters, limit),
        ).fetchall()
        return [letter_of(row, self.job(row[0]) if row[5] else None) for row in rows]

    def insert_dead_letter(self, letter: DeadLetter) -> bool:
        taken = self._db.execute(
            f"INSERT OR IGNORE INTO dead_letters ({LETTER}, raw) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                letter.dead_letter_id,
                letter.error_reason,
                letter.detail,
                letter.create_us,
                letter.expire_us,
                letter.tenant_id,
                letter.model,
                letter.topic,
                letter.partition,
                letter.offset,
                letter.raw,
            ),
        ).rowcount
        self._tenant(letter.tenant_id).dead_letters += taken
        return bool(taken)

    def oldest_dead_letters(self, tenant_id: str, limit: int) -> list[DeadLetter]:
        return self._letters("tenant_id = ?", (tenant_id,), limit)

    def expired_dead_letters(self, now_us: int, limit: int) -> list[DeadLetter]:
        return self._letters("tenant_id = '' AND expire_us <= ?", (now_us,), limit)

    def remove_dead_letter(self, letter: DeadLetter) -> None:
        self._remove_letter(letter.dead_letter_id, letter.tenant_id)

    def _remove_letter(self, dead_letter_id: str, tenant_id: str) -> None:
        gone = self._db.execute(
            "DELETE FROM dead_letters WHERE dead_letter_id = ?", (dead_letter_id,)
        ).rowcount
        self._tenant(tenant_id).dead_letters -= gone

    def forget(self, now_us: int, limit: int) -> int:
        rows = self._db.execute(
            "SELECT job_id FROM remembered WHERE until_us <= ? LIMIT ?", (now_us, limit)
        ).fetchall()
        self._db.executemany("DELETE FROM remembered WHERE job_id = ?", rows)
        return len(rows)

    def outbox_size(self) -> int:
        (size,) = self._db.execute(
            "SELECT coalesce((SELECT max(number) FROM outbox) - (SELECT min(number) FROM outbox) + 1, 0)"
        ).fetchone()
        return int(size)

    def post(self, event_id: str, time_us: int, event: RetryRequested | DeadLettered) -> None:
        self._db.execute(
            "INSERT INTO outbox (event_id, time_us, event) VALUES (?, ?, ?)",
            (event_id, time_us, pack_news(event)),
        )

    def outbox(self, limit: int) -> list[OutboxRow]:
        rows = self._db.execute(
            "SELECT number, event_id, time_us, event FROM outbox ORDER BY number LIMIT ?", (limit,)
        ).fetchall()
        return [
            OutboxRow(number, event_id, time_us, unpack_news(event))
            for number, event_id, time_us, event in rows
        ]

    def remove_posted(self, number: int) -> None:
        self._db.execute("DELETE FROM outbox WHERE number = ?", (number,))


def letter_of(row: tuple[Any, ...], job: Job | None) -> DeadLetter:
    """A dead letter of a row with LETTER and, perhaps, `raw`."""
    (letter_id, reason, detail, create_us, expire_us, tenant_id, model, topic, partition, offset, *raw) = row
    return DeadLetter(
        letter_id,
        reason,
        detail,
        create_us,
        expire_us,
        tenant_id,
        model,
        job,
        raw[0] if raw else b"",
        topic,
        partition,
        offset,
    )
