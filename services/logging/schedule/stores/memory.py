"""A schedule in memory: the reference that tests hold SQLite against. It forgets everything when stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from services.logging.schedule.job import Job, to_us
from services.logging.schedule.machine import Machine
from services.logging.schedule.rows import Purpose, Rows, TenantJobs
from services.logging.schedule.store import (
    Bounds,
    Cursor,
    DeadLetter,
    DeadLetterFilter,
    JobFilter,
    OutboxRow,
    Page,
    Totals,
    letter_weight,
    weight_of,
)
from services.logging.schedule.stores.writing import WritingStore
from services.logging.schedule.transactions import no_dead_letter
from services.mesh.jobs import DeadLettered, JobKind, JobState, RetryRequested, Sealed

T = TypeVar("T")


@dataclass
class MemoryRows:
    """`Rows` in dictionaries. What is in them never changes, so that copies of the dictionaries are
    enough."""

    jobs: dict[str, Job] = field(default_factory=dict)
    live: dict[str, Job] = field(default_factory=dict)
    """Those of them that have not ended."""
    seals: dict[tuple[str, Purpose], Sealed] = field(default_factory=dict)
    remembered: dict[str, int] = field(default_factory=dict)
    letters: dict[str, DeadLetter] = field(default_factory=dict)
    """A job's without the job."""
    batches: dict[str, None] = field(default_factory=dict)
    last_served: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    posted: dict[int, OutboxRow] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=lambda: {"posted": 0})

    def copy(self) -> MemoryRows:
        return MemoryRows(*(dict(getattr(self, each.name)) for each in fields(self)))

    def job(self, job_id: str) -> Job | None:
        return self.jobs.get(job_id)

    def is_known(self, job_id: str) -> bool:
        return job_id in self.jobs or job_id in self.remembered

    def insert(self, job: Job, now_us: int) -> None:
        self._put(job)

    def update(self, old: Job, new: Job) -> None:
        self._put(new)

    def _put(self, job: Job) -> None:
        self.jobs[job.job_id] = job
        if job.state.is_final:
            self.live.pop(job.job_id, None)
        else:
            self.live[job.job_id] = job

    def remove(self, job: Job, remember_until_us: int) -> None:
        self.jobs.pop(job.job_id)
        self.live.pop(job.job_id, None)
        self.letters.pop(job.job_id, None)
        for purpose in Purpose:
            self.seals.pop((job.job_id, purpose), None)
        self.remembered[job.job_id] = remember_until_us

    def sealed(self, job_id: str, purpose: Purpose) -> Sealed | None:
        return self.seals.get((job_id, purpose))

    def put_sealed(self, job_id: str, purpose: Purpose, sealed: Sealed) -> None:
        self.seals[job_id, purpose] = sealed

    def drop_sealed(self, job_id: str, purpose: Purpose) -> None:
        self.seals.pop((job_id, purpose), None)

    def kept(self) -> int:
        return len(self.jobs)

    def of_tenant(self, tenant_id: str) -> TenantJobs:
        states = [job.state for job in self.live.values() if job.tenant_id == tenant_id]
        letters = sum(letter.tenant_id == tenant_id for letter in self.letters.values())
        return TenantJobs(states.count(JobState.WAITING), states.count(JobState.RUNNING), letters)

    def group_order_us(self, job: Job) -> int | None:
        key = (job.tenant_id, job.rank, job.request.prefix_group)
        waiting = (each for each in self.live.values() if each.state is JobState.WAITING)
        return max(
            (w.order_us for w in waiting if (w.tenant_id, w.rank, w.request.prefix_group) == key),
            default=None,
        )

    def fall_due(self, now_us: int) -> None:
        self.numbers["now_us"] = now_us

    def _due(self) -> list[Job]:
        now_us = self.numbers["now_us"]
        return [j for j in self.live.values() if j.state is JobState.WAITING and j.due_us <= now_us]

    def tenants_in_turn(self, limit: int, now_us: int) -> list[tuple[int, int, str]]:
        tenants = {job.tenant_id for job in self._due()}
        free = [tenant for tenant in tenants if self.held.get(tenant, 0) <= now_us]
        return sorted((self.of_tenant(t).running, self.last_served.get(t, 0), t) for t in free)[:limit]

    def next_due(self, tenant_id: str) -> Job | None:
        return min((job for job in self._due() if job.tenant_id == tenant_id), key=_order, default=None)

    def serve(self, tenant_id: str, number: int) -> None:
        self.last_served[tenant_id] = number

    def forget_tenants(self) -> None:
        """Whom nothing is kept of is forgotten, whenever it was served."""
        for tenant_id in {*self.last_served, *self.held}:
            if self.of_tenant(tenant_id) == TenantJobs(0, 0, 0):
                self.last_served.pop(tenant_id, None)
                self.held.pop(tenant_id, None)

    def hold(self, tenant_id: str, until_us: int) -> None:
        self.held[tenant_id] = max(until_us, self.held.get(tenant_id, 0))

    def next_due_us(self, now_us: int) -> int | None:
        return min(
            (
                max(job.due_us, self.held.get(job.tenant_id, 0))
                for job in self.live.values()
                if job.state is JobState.WAITING
            ),
            default=None,
        )

    def lease_ended(self, now_us: int, limit: int) -> list[Job]:
        running = [j for j in self.live.values() if j.state is JobState.RUNNING and j.lease_us <= now_us]
        return sorted(running, key=lambda job: (job.lease_us, job.job_id))[:limit]

    def time_up(self, now_us: int, limit: int) -> list[Job]:
        late = [j for j in self.live.values() if j.state is JobState.WAITING and j.give_up_us <= now_us]
        return sorted(late, key=lambda job: (job.give_up_us, job.job_id))[:limit]

    def expired(self, now_us: int, limit: int) -> list[Job]:
        over = [j for j in self.jobs.values() if j.state.is_final and j.expire_us <= now_us]
        return sorted(over, key=lambda job: (job.expire_us, job.job_id))[:limit]

    def cancelling(self, limit: int) -> list[str]:
        return sorted(self.batches)[:limit]

    def begin_cancelling(self, batch_id: str) -> None:
        self.batches[batch_id] = None

    def end_cancelling(self, batch_id: str) -> None:
        self.batches.pop(batch_id, None)

    def live_of_batch(self, batch_id: str, limit: int) -> list[Job]:
        jobs = [j for j in self.live.values() if j.request.batch_id == batch_id and not j.cancel_asked]
        return sorted(jobs, key=lambda job: (job.state, job.job_id))[:limit]

    def is_batch_over(self, batch_id: str) -> bool:
        return not any(job.request.batch_id == batch_id for job in self.live.values())

    def dead_letter(self, dead_letter_id: str) -> DeadLetter | None:
        letter = self.letters.get(dead_letter_id)
        return letter and self._with_job(letter)

    def _with_job(self, letter: DeadLetter) -> DeadLetter:
        return replace(letter, job=self.jobs.get(letter.dead_letter_id))

    def insert_dead_letter(self, letter: DeadLetter) -> bool:
        if letter.dead_letter_id in self.letters:
            return False
        self.letters[letter.dead_letter_id] = replace(letter, job=None)
        return True

    def oldest_dead_letters(self, tenant_id: str, limit: int) -> list[DeadLetter]:
        of_tenant = [letter for letter in self.letters.values() if letter.tenant_id == tenant_id]
        return [self._with_job(letter) for letter in sorted(of_tenant, key=_age)[:limit]]

    def expired_dead_letters(self, now_us: int, limit: int) -> list[DeadLetter]:
        over = (letter for letter in self.letters.values() if letter.expire_us <= now_us)
        return sorted((letter for letter in over if not letter.tenant_id), key=_age)[:limit]

    def remove_dead_letter(self, letter: DeadLetter) -> None:
        self.letters.pop(letter.dead_letter_id)

    def forget(self, now_us: int, limit: int) -> int:
        over = [job_id for job_id, until_us in self.remembered.items() if until_us <= now_us][:limit]
        for job_id in over:
            self.remembered.pop(job_id)
        return len(over)

    def outbox_size(self) -> int:
        return len(self.posted)

    def post(self, event_id: str, time_us: int, event: RetryRequested | DeadLettered) -> None:
        self.numbers["posted"] = number = self.numbers["posted"] + 1
        self.posted[number] = OutboxRow(number, event_id, time_us, event)

    def outbox(self, limit: int) -> list[OutboxRow]:
        return list(self.posted.values())[:limit]

    def remove_posted(self, number: int) -> None:
        self.posted.pop(number, None)

    def jobs_where(self, which: JobFilter) -> Iterable[Job]:
        for job in self.jobs.values():
            request = job.request
            if (
                which.tenant_id in ("", job.tenant_id)
                and (not which.states or job.state in which.states)
                and which.batch_id in ("", request.batch_id)
                and request.kind in which.kinds
                and which.labels.items() <= request.labels.items()
            ):
                yield job

    def letters_where(self, which: DeadLetterFilter) -> Iterable[DeadLetter]:
        for letter in self.letters.values():
            if (
                which.tenant_id in ("", letter.tenant_id)
                and which.error_reason in ("", letter.error_reason)
                and which.model in ("", letter.model)
                and (which.create_time_from_us is None or letter.create_us >= which.create_time_from_us)
                and (which.create_time_before_us is None or letter.create_us < which.create_time_before_us)
                and not (which.unreadable and letter.tenant_id)
            ):
                yield replace(self._with_job(letter), raw=b"")


class MemoryScheduleStore(WritingStore):
    """A `ScheduleStore`."""

    def __init__(self, machine: Machine, bounds: Bounds) -> None:
        super().__init__(machine, bounds)
        self._rows = MemoryRows()

    async def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Nothing to do."""

    async def _writing(self, work: Callable[[Rows], T]) -> T:
        before = self._rows.copy()
        try:
            done = work(self._rows)
            self._rows.forget_tenants()
            return done
        except BaseException:
            self._rows = before
            raise

    async def _reading(self, work: Callable[[Rows], T]) -> T:
        return work(self._rows)

    async def get(self, job_id: str) -> tuple[Job, Sealed | None, Sealed | None] | None:
        rows = self._rows
        job = rows.job(job_id)
        if job is None:
            return None
        return job, rows.sealed(job_id, Purpose.REQUEST), rows.sealed(job_id, Purpose.RESULT)

    async def is_gone(self, job_id: str) -> bool:
        return self._rows.is_known(job_id) and self._rows.job(job_id) is None

    async def list_jobs(
        self,
        which: JobFilter,
        limit: int,
        after: Cursor | None,
        *,
        with_results: bool = False,
        oldest_first: bool = False,
    ) -> Page[tuple[Job, Sealed | None]]:
        found = sorted(self._rows.jobs_where(which), key=_place, reverse=not oldest_first)
        if after is not None:
            found = [j for j in found if (_place(j) > after if oldest_first else _place(j) < after)]
        sealed = self._rows.sealed
        listed = [(job, sealed(job.job_id, Purpose.RESULT) if with_results else None) for job in found]
        return Page.cut(listed, limit, weight_of)

    async def count(self, tenant_id: str, batch_id: str = "") -> dict[JobState, int]:
        kinds = frozenset(JobKind) if batch_id else frozenset({JobKind.REQUEST})
        counts: dict[JobState, int] = {}
        for job in self._rows.jobs_where(JobFilter(tenant_id, batch_id=batch_id, kinds=kinds)):
            counts[job.state] = counts.get(job.state, 0) + 1
        return counts

    async def dead_letters(
        self, which: DeadLetterFilter, limit: int, after: Cursor | None
    ) -> Page[DeadLetter]:
        found = sorted(self._rows.letters_where(which), key=_age, reverse=True)
        found = [letter for letter in found if after is None or _age(letter) < after]
        return Page.cut(found, limit, letter_weight)

    async def dead_letter(self, dead_letter_id: str, tenant_id: str) -> tuple[DeadLetter, Sealed | None]:
        letter = self._rows.dead_letter(dead_letter_id)
        if letter is None or tenant_id not in ("", letter.tenant_id):
            raise no_dead_letter()
        return letter, self._rows.sealed(dead_letter_id, Purpose.REQUEST)

    async def totals(self) -> Totals:
        rows = self._rows
        waiting = [job.due_us for job in rows.live.values() if job.state is JobState.WAITING]
        return Totals(
            len(waiting),
            len(rows.live) - len(waiting),
            len(rows.jobs),
            min(waiting, default=None),
            len(rows.letters),
            len(rows.posted),
        )


def _order(job: Job) -> tuple[int, int, str, int, str]:
    request = job.request
    return (job.rank, job.order_us, request.prefix_group, to_us(request.create_time), job.job_id)


def _place(job: Job) -> Cursor:
    return Cursor(to_us(job.request.create_time), job.job_id)


def _age(letter: DeadLetter) -> Cursor:
    return Cursor(letter.create_us, letter.dead_letter_id)
