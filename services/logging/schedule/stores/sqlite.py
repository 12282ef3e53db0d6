"""The schedule in one SQLite file."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from services.logging.schedule.job import Job, Postponed
from services.logging.schedule.machine import Machine
from services.logging.schedule.rows import Purpose, Rows
from services.logging.schedule.store import (
    AttemptEnd,
    Bounds,
    Claims,
    Cursor,
    DeadLetter,
    DeadLetterFilter,
    JobFilter,
    Page,
    Totals,
    letter_weight,
    weight_of,
)
from services.logging.schedule.stores.sqlite_rows import LETTER, SqliteRows, letter_of
from services.logging.schedule.stores.tables import FORMAT, JOB, SCHEMA
from services.logging.schedule.stores.writing import WritingStore
from services.logging.schedule.transactions import no_dead_letter
from services.logging.stores.sqlite_file import SqliteFile
from services.mesh.errors import LlmosError, Overloaded
from services.mesh.jobs import JobKind, JobState, Sealed

logger = logging.getLogger(__name__)

MAX_LOOKED_AT = 20_000
"""Jobs that one search by labels may look at."""

T = TypeVar("T")


class SqliteScheduleStore(WritingStore):
    """A `ScheduleStore`; one process at a time may have a file."""

    def __init__(self, path: Path, machine: Machine, bounds: Bounds) -> None:
        super().__init__(machine, bounds)
        self._file = SqliteFile(path, "schedule", SCHEMA, FORMAT)
        self._handing_back: set[asyncio.Task[None]] = set()
        self._counted: tuple[int, Totals] | None = None
        """With the changes of the file up to which it holds."""

    async def start(self) -> None:
        await self._file.start()

    async def stop(self) -> None:
        await asyncio.gather(*self._handing_back)
        await self._file.stop()

    async def claim(self, worker: str, max_jobs: int, lease_us: int, now_us: int) -> Claims:
        """Whoever is cut off meanwhile does not hear of what was claimed: that is handed back."""
        claiming = asyncio.ensure_future(super().claim(worker, max_jobs, lease_us, now_us))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            task = asyncio.create_task(self._hand_back(claiming), name="schedule-hand-back")
            self._handing_back.add(task)
            task.add_done_callback(self._handing_back.discard)
            raise

    async def _hand_back(self, claiming: asyncio.Future[Claims]) -> None:
        try:
            jobs = [claim.job for claim in (await claiming).claims]
            if jobs:
                ends = [AttemptEnd(job.job_id, job.fence, "", Postponed()) for job in jobs]
                await self.report(ends, jobs[0].start_us)
        except LlmosError as error:
            logger.warning("a claim that nobody hears of is not taken back: %s; its lease ends it", error)

    async def _writing(self, work: Callable[[Rows], T]) -> T:
        def run(db: sqlite3.Connection) -> T:
            rows = SqliteRows(db)
            done = work(rows)
            rows.flush()
            return done

        return await self._file.writing(run)

    async def _reading(self, work: Callable[[Rows], T]) -> T:
        return await self._file.reading(lambda db: work(SqliteRows(db)))

    async def get(self, job_id: str) -> tuple[Job, Sealed | None, Sealed | None] | None:
        def find(rows: Rows) -> tuple[Job, Sealed | None, Sealed | None] | None:
            job = rows.job(job_id)
            if job is None:
                return None
            return job, rows.sealed(job_id, Purpose.REQUEST), rows.sealed(job_id, Purpose.RESULT)

        return await self._reading(find)

    async def is_gone(self, job_id: str) -> bool:
        return await self._reading(lambda rows: rows.is_known(job_id) and rows.job(job_id) is None)

    async def list_jobs(
        self,
        which: JobFilter,
        limit: int,
        after: Cursor | None,
        *,
        with_results: bool = False,
        oldest_first: bool = False,
    ) -> Page[tuple[Job, Sealed | None]]:
        where, parameters = _jobs_where(which)
        direction, beyond = ("ASC", ">") if oldest_first else ("DESC", "<")
        if after is not None:
            where.append(f"(create_us, job_id) {beyond} (?, ?)")
            parameters += after
        sql = (
            f"SELECT {JOB} FROM jobs WHERE {' AND '.join(where) or '1'}"  # noqa: S608
            f" ORDER BY create_us {direction}, job_id {direction}"
        )

        def find(db: sqlite3.Connection) -> Page[tuple[Job, Sealed | None]]:
            rows = SqliteRows(db)
            jobs = (rows.job_of(row) for row in _bounded(db.execute(sql, parameters)))
            listed = (
                (job, rows.sealed(job.job_id, Purpose.RESULT) if with_results else None)
                for job in jobs
                if which.labels.items() <= job.request.labels.items()
            )
            return Page.cut(listed, limit, weight_of)

        return await self._file.reading(find)

    async def count(self, tenant_id: str, batch_id: str = "") -> dict[JobState, int]:
        kinds = frozenset(JobKind) if batch_id else frozenset({JobKind.REQUEST})
        where, parameters = _jobs_where(JobFilter(tenant_id, batch_id=batch_id, kinds=kinds))
        sql = f"SELECT state, count(*) FROM jobs WHERE {' AND '.join(where) or '1'} GROUP BY state"  # noqa: S608
        rows = await self._file.reading(lambda db: db.execute(sql, parameters).fetchall())
        return {JobState(state): count for state, count in rows}

    async def dead_letters(
        self, which: DeadLetterFilter, limit: int, after: Cursor | None
    ) -> Page[DeadLetter]:
        conditions: list[tuple[str, Any]] = [
            ("tenant_id = ?", which.tenant_id or None),
            ("error_reason = ?", which.error_reason or None),
            ("model = ?", which.model or None),
            ("create_us >= ?", which.create_time_from_us),
            ("create_us < ?", which.create_time_before_us),
            ("tenant_id = ?", "" if which.unreadable else None),
        ]
        where = [condition for condition, value in conditions if value is not None]
        parameters = [value for _, value in conditions if value is not None]
        if after is not None:
            where.append("(create_us, dead_letter_id) < (?, ?)")
            parameters += after
        sql = (
            f"SELECT {LETTER} FROM dead_letters WHERE {' AND '.join(where) or '1'}"  # noqa: S608
            " ORDER BY create_us DESC, dead_letter_id DESC"
        )

        def find(db: sqlite3.Connection) -> Page[DeadLetter]:
            rows = SqliteRows(db)
            found = (
                letter_of(row, rows.job(row[0]) if row[5] else None) for row in db.execute(sql, parameters)
            )
            return Page.cut(found, limit, letter_weight)

        return await self._file.reading(find)

    async def dead_letter(self, dead_letter_id: str, tenant_id: str) -> tuple[DeadLetter, Sealed | None]:
        def find(rows: Rows) -> tuple[DeadLetter, Sealed | None]:
            letter = rows.dead_letter(dead_letter_id)
            if letter is None or tenant_id not in ("", letter.tenant_id):
                raise no_dead_letter()
            return letter, rows.sealed(dead_letter_id, Purpose.REQUEST)

        return await self._reading(find)

    async def totals(self) -> Totals:
        """Asked every second: counted only where something was written since."""
        changes = self._file.changes
        if self._counted is None or self._counted[0] != changes:
            self._counted = changes, await self._count()
        return self._counted[1]

    async def _count(self) -> Totals:
        def find(db: sqlite3.Connection) -> Totals:
            rows = SqliteRows(db)
            waiting, running, letters = db.execute(
                "SELECT coalesce(sum(waiting), 0), coalesce(sum(running), 0), coalesce(sum(dead_letters), 0)"
                " FROM tenants"
            ).fetchone()
            oldest = [
                db.execute("SELECT min(due_us) FROM jobs WHERE state = 1 AND is_due = ?", (due,)).fetchone()[
                    0
                ]
                for due in (0, 1)
            ]
            oldest_us = min((each for each in oldest if each is not None), default=None)
            return Totals(waiting, running, rows.kept(), oldest_us, letters, rows.outbox_size())

        return await self._file.reading(find)


def _jobs_where(which: JobFilter) -> tuple[list[str], list[Any]]:
    """Conditions in SQL, all but labels."""
    where: list[str] = []
    parameters: list[Any] = []
    if which.tenant_id:
        where.append("tenant_id = ?")
        parameters.append(which.tenant_id)
    if which.batch_id:
        where.append("batch_id = ? AND batch_id != ''")
        parameters.append(which.batch_id)
    for column, chosen in (("state", which.states), ("kind", which.kinds)):
        if chosen and not (column == "kind" and len(chosen) == len(JobKind)):
            where.append(f"{column} IN ({', '.join('?' * len(chosen))})")
            parameters += [int(each) for each in chosen]
    return where, parameters


def _bounded(rows: sqlite3.Cursor) -> Iterator[tuple[Any, ...]]:
    """Raises Overloaded where too many would have to be looked at."""
    for number, row in enumerate(rows):
        if number >= MAX_LOOKED_AT:
            raise Overloaded(
                "The query looks at too many jobs.",
                hint="Narrow it: by state, or by batch instead of labels.",
            )
        yield row
