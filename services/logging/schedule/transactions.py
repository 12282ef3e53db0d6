"""What each method of a store does to its rows. A store runs each in a transaction of its own."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from services.logging.schedule.job import (
    Beaten,
    CancelAsked,
    Claimed,
    GaveUp,
    HoldTenant,
    Job,
    KeepResult,
    LeaseEnded,
    Reported,
    Retried,
    Step,
    TellWebhook,
    TimeUp,
    Woken,
    us,
)
from services.logging.schedule.machine import Machine
from services.logging.schedule.rows import Purpose, Rows
from services.logging.schedule.store import (
    MAX_PAGE_BYTES,
    Accepted,
    AttemptEnd,
    Beat,
    Bounds,
    Claims,
    DeadLetter,
    JobClaim,
    OutboxRow,
    ReportTaken,
    Standing,
    Swept,
    weight_of,
)
from services.mesh.errors import AlreadyExists, NotFound, Overloaded, RequestInvalid, Violation
from services.mesh.jobs import (
    DeadLettered,
    JobEvent,
    JobKind,
    JobRequested,
    JobState,
    RetryRequested,
    Sealed,
)

GROUP_SPAN_US = 600 * 1_000_000
"""Jobs of a prefix group go together with its first one that waits, if they came at most so much later:
beyond, a group that is always added to would hold up the tenant's others."""
CANCELLED_AT_ONCE = 500
"""Jobs of a batch that end in the same transaction; the others in the sweeps that follow."""
MAX_PASSED_OVER = 1000
"""Due jobs whose time is up that one claim may come upon."""


@dataclass
class _Done:
    """What a transaction did, for whoever is to be told."""

    changed: list[str] = field(default_factory=list)
    dead: Counter[str] = field(default_factory=Counter)


class Transactions:
    """The store's methods, over rows."""

    def __init__(self, machine: Machine, bounds: Bounds) -> None:
        self._machine = machine
        self._bounds = bounds

    def accept(self, rows: Rows, events: Sequence[JobEvent], now_us: int) -> Accepted:
        done, new = _Done(), []
        for event in events:
            if isinstance(event, DeadLettered):
                self._bury(rows, event, now_us, done)
                continue
            request = event if isinstance(event, JobRequested) else event.job
            if rows.is_known(request.job_id):
                continue
            if rows.kept() >= self._bounds.max_jobs:
                raise Overloaded(f"The schedule has {self._bounds.max_jobs} jobs, which is the limit.")
            self._write(rows, None, self._arrive(rows, event, now_us), now_us, done, request.request)
            new.append(request.job_id)
        return Accepted(tuple(new), done.dead, tuple(done.changed))

    def claim(self, rows: Rows, worker: str, max_jobs: int, lease_us: int, now_us: int) -> Claims:
        done = _Done()
        claims: list[JobClaim] = []
        size = 0
        rows.fall_due(now_us)
        turns = rows.tenants_in_turn(max_jobs, now_us)
        heapq.heapify(turns)
        for number in range(max_jobs + MAX_PASSED_OVER):
            if not turns or len(claims) >= max_jobs or size > MAX_PAGE_BYTES:
                break
            running, _, tenant_id = heapq.heappop(turns)
            job = rows.next_due(tenant_id)
            if job is None:
                continue
            step = self._machine.step(job, TimeUp(), now_us)
            ended = step.taken
            if not ended:
                step = self._machine.step(job, Claimed(worker, lease_us), now_us)
                if not step.taken:  # the clock went back
                    continue
                running += 1
                request = rows.sealed(job.job_id, Purpose.REQUEST) or Sealed("", b"")
                claims.append(JobClaim(step.job, request))
                size += weight_of((step.job, request))
                rows.serve(tenant_id, now_us + number)
            self._write(rows, job, step, now_us, done)
            if ended:  # its end may have made its batch due
                rows.fall_due(now_us)
            heapq.heappush(turns, (running, now_us + number, tenant_id))
        return Claims(tuple(claims), rows.next_due_us(now_us), tuple(done.changed), done.dead)

    def heartbeat(self, rows: Rows, beats: Sequence[Beat], lease_us: int, now_us: int) -> list[Standing]:
        standings = []
        for beat in beats:
            job = rows.job(beat.job_id)
            if job is None:
                standings.append(Standing(False, False))
                continue
            step = self._machine.step(job, Beaten(beat.fence, lease_us, beat.progress_tokens), now_us)
            if step.taken:
                rows.update(job, step.job)
            standings.append(Standing(step.taken, step.taken and job.cancel_asked))
        return standings

    def report(self, rows: Rows, end: AttemptEnd, now_us: int) -> ReportTaken:
        job = rows.job(end.job_id)
        if job is None:
            return ReportTaken(False)
        done = _Done()
        step = self._machine.step(job, Reported(end.fence, end.request_id, end.report), now_us)
        retried = ""
        if step.taken and step.job is not job:
            self._write(rows, job, step, now_us, done)
            retried = next((e.error_reason for e in step.effects if isinstance(e, Retried)), "")
        return ReportTaken(step.taken, tuple(done.changed), done.dead, retried)

    def sweep(self, rows: Rows, now_us: int, limit: int, leases: bool) -> Swept:
        done = _Done()
        lost = rows.lease_ended(now_us, limit) if leases else []
        for job in lost:
            self._write(rows, job, self._machine.step(job, LeaseEnded(), now_us), now_us, done)
        late = rows.time_up(now_us, limit)
        for job in late:
            self._write(rows, job, self._machine.step(job, TimeUp(), now_us), now_us, done)
        cancelled = 0
        for batch_id in rows.cancelling(limit):
            cancelled += self._cancel_batch(rows, batch_id, limit - cancelled, now_us, done)
        expired = rows.expired(now_us, limit)
        for job in expired:
            self._remove(rows, job, now_us)
        letters = rows.expired_dead_letters(now_us, limit)
        for letter in letters:
            rows.remove_dead_letter(letter)
        forgotten = rows.forget(now_us, limit)
        most = max(len(lost), len(late), cancelled, len(expired), len(letters), forgotten)
        done.changed += [job.job_id for job in expired]
        return Swept(
            tuple(done.changed), len(lost), done.dead, len(expired) + len(letters), more=most >= limit
        )

    def cancel(self, rows: Rows, job_id: str, tenant_id: str, now_us: int) -> tuple[Job, tuple[str, ...]]:
        job = rows.job(job_id)
        if job is None or tenant_id not in ("", job.tenant_id):
            raise no_job()
        done = _Done()
        step = self._machine.step(job, CancelAsked(), now_us)
        if step.job is not job:
            self._write(rows, job, step, now_us, done)
            if job.request.kind is JobKind.BATCH:
                rows.begin_cancelling(job_id)
                self._cancel_batch(rows, job_id, CANCELLED_AT_ONCE, now_us, done)
        return step.job, tuple(done.changed)

    def replay(
        self, rows: Rows, dead_letter_id: str, tenant_id: str, request: JobRequested, now_us: int
    ) -> tuple[Job, tuple[str, ...]]:
        letter = _letter(rows, dead_letter_id, tenant_id)
        if letter.tenant_id not in ("", request.identity.tenant_id):
            raise RequestInvalid(
                "A dead letter is replayed for its own tenant.",
                violations=[Violation("job.identity.tenant_id", "is not the dead letter's")],
            )
        if rows.is_known(request.job_id):
            raise AlreadyExists("There is, or was, a job of that id.")
        done = _Done()
        self._remove_letter(rows, letter, now_us)
        step = self._arrive(rows, request, now_us)
        self._write(rows, None, step, now_us, done, request.request)
        return step.job, (dead_letter_id, *done.changed)

    def discard(self, rows: Rows, dead_letter_id: str, tenant_id: str, now_us: int) -> None:
        self._remove_letter(rows, _letter(rows, dead_letter_id, tenant_id), now_us)

    def outbox(self, rows: Rows, limit: int) -> list[OutboxRow]:
        """The sealed request is added here: it is kept once."""
        found = []
        for row in rows.outbox(limit):
            job = row.event.job
            if job is not None:
                sealed = rows.sealed(job.job_id, Purpose.REQUEST) or Sealed("", b"")
                row = replace(row, event=replace(row.event, job=replace(job, request=sealed)))
            found.append(row)
        return found

    def published(self, rows: Rows, numbers: Sequence[int]) -> None:
        for number in numbers:
            rows.remove_posted(number)

    def _arrive(self, rows: Rows, event: JobRequested | RetryRequested, now_us: int) -> Step:
        request = event if isinstance(event, JobRequested) else event.job
        tenant = rows.of_tenant(request.identity.tenant_id)
        if tenant.waiting + tenant.running >= self._bounds.max_jobs_per_tenant:
            detail = f"The tenant has {self._bounds.max_jobs_per_tenant} jobs, which is the limit."
            return self._machine.refuse(event, now_us, Overloaded.reason, detail)
        step = self._machine.arrive(event, now_us)
        batch = rows.job(request.batch_id) if request.batch_id else None
        if batch is not None and batch.tenant_id == step.job.tenant_id and _is_cancelled(batch):
            return step if step.effects else self._machine.step(step.job, CancelAsked(), now_us)
        if request.prefix_group:
            first_us = rows.group_order_us(step.job)
            if first_us is not None and 0 <= step.job.order_us - first_us <= GROUP_SPAN_US:
                return replace(step, job=replace(step.job, order_us=first_us))
        return step

    def _write(
        self,
        rows: Rows,
        old: Job | None,
        step: Step,
        now_us: int,
        done: _Done,
        sealed: Sealed | None = None,
    ) -> None:
        """Keeps what a step did, and carries out its effects."""
        job = step.job
        if old is None:
            rows.insert(job, now_us)
        else:
            rows.update(old, job)
        if sealed is not None:
            rows.put_sealed(job.job_id, Purpose.REQUEST, sealed)
        done.changed.append(job.job_id)
        for effect in step.effects:
            match effect:
                case Retried(request_id, reason, attempts):
                    if rows.outbox_size() < self._bounds.max_outbox:
                        news = RetryRequested(job.request, request_id, reason, attempts)
                        rows.post(f"retry/{job.job_id}/{attempts}", now_us, news)
                case GaveUp(detail):
                    self._dead_letter(rows, job, detail, done)
                case KeepResult(result):
                    rows.put_sealed(job.job_id, Purpose.RESULT, result)
                case HoldTenant(until_us):
                    rows.hold(job.tenant_id, until_us)
                case TellWebhook(webhook):
                    if not rows.is_known(webhook.job_id):
                        request = rows.sealed(job.job_id, Purpose.REQUEST)
                        self._write(rows, None, Step(webhook), now_us, done, request)
        if job.state.is_final and job.request.batch_id and old is not None:
            self._wake_batch(rows, job, now_us, done)
        # A batch's request says what its files are; a dead letter's is replayed.
        if job.state in (JobState.SUCCEEDED, JobState.CANCELLED) and job.request.kind is not JobKind.BATCH:
            rows.drop_sealed(job.job_id, Purpose.REQUEST)

    def _wake_batch(self, rows: Rows, ended: Job, now_us: int, done: _Done) -> None:
        """Whatever gathers a batch's answers need not ask again and again whether they are there."""
        if not rows.is_batch_over(ended.request.batch_id):
            return
        batch = rows.job(ended.request.batch_id)
        if batch is None or batch.request.kind is not JobKind.BATCH or batch.tenant_id != ended.tenant_id:
            return
        step = self._machine.step(batch, Woken(), now_us)
        if step.taken:
            self._write(rows, batch, step, now_us, done)

    def _dead_letter(self, rows: Rows, job: Job, detail: str, done: _Done) -> None:
        letter = DeadLetter(
            job.job_id,
            job.error_reason,
            detail,
            job.end_us,
            job.expire_us,
            tenant_id=job.tenant_id,
            model=job.request.model,
            job=job,
        )
        self._insert_letter(rows, letter, done)
        news = DeadLettered(
            job.error_reason, detail, job.job_id, job.attempts, job=job.request, history=job.history
        )
        rows.post(f"dead/{job.job_id}", job.end_us, news)

    def _bury(self, rows: Rows, event: DeadLettered, now_us: int, done: _Done) -> None:
        """An event that came dead."""
        if event.job is not None:
            if not rows.is_known(event.job.job_id):
                step = self._machine.refuse(event.job, now_us, event.error_reason, event.detail)
                self._write(rows, None, step, now_us, done, event.job.request)
            return
        letter = DeadLetter(
            unreadable_id(event),
            event.error_reason,
            event.detail,
            now_us,
            now_us + us(self._machine.rules.dead_letter_ttl_s),
            raw=event.raw,
            topic=event.topic,
            partition=event.partition,
            offset=event.offset,
        )
        if self._insert_letter(rows, letter, done):
            rows.post(f"dead/{letter.dead_letter_id}", now_us, event)

    def _insert_letter(self, rows: Rows, letter: DeadLetter, done: _Done) -> bool:
        if not rows.insert_dead_letter(letter):
            return False
        done.dead[letter.error_reason] += 1
        surplus = rows.of_tenant(letter.tenant_id).dead_letters - self._bounds.max_dead_letters_per_tenant
        if surplus > 0:
            for oldest in rows.oldest_dead_letters(letter.tenant_id, surplus):
                self._remove_letter(rows, oldest, letter.create_us)
        return True

    def _remove_letter(self, rows: Rows, letter: DeadLetter, now_us: int) -> None:
        if letter.job is not None:
            self._remove(rows, letter.job, now_us)
        else:
            rows.remove_dead_letter(letter)

    def _remove(self, rows: Rows, job: Job, now_us: int) -> None:
        rows.remove(job, max(now_us, job.give_up_us) + us(self._bounds.remember_s))

    def _cancel_batch(self, rows: Rows, batch_id: str, limit: int, now_us: int, done: _Done) -> int:
        if limit <= 0:
            return 0
        jobs = rows.live_of_batch(batch_id, limit)
        for job in jobs:
            self._write(rows, job, self._machine.step(job, CancelAsked(), now_us), now_us, done)
        if len(jobs) < limit:
            rows.end_cancelling(batch_id)
        return len(jobs)


def _is_cancelled(batch: Job) -> bool:
    return batch.cancel_asked or batch.state is JobState.CANCELLED


def no_job(*, gone: bool = False) -> NotFound:
    """Another tenant's may as well not exist."""
    return NotFound(
        "No such job.",
        hint="Check the id; a job is forgotten some time after it has ended.",
        metadata={"gone": "true"} if gone else {},
    )


def no_dead_letter() -> NotFound:
    return NotFound(
        "No such dead letter.", hint="Check the id; it may have been replayed or discarded already."
    )


def unreadable_id(event: DeadLettered) -> str:
    """A function of the record: the same bytes at the same place are the same dead letter."""
    place = f"{event.topic}/{event.partition}/{event.offset}/".encode()
    return f"raw-{hashlib.sha256(place + event.raw).hexdigest()[:32]}"


def _letter(rows: Rows, dead_letter_id: str, tenant_id: str) -> DeadLetter:
    letter = rows.dead_letter(dead_letter_id)
    if letter is None or tenant_id not in ("", letter.tenant_id):
        raise no_dead_letter()
    return letter
