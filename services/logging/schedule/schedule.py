"""The schedule's rules: who sees what, how work is waited for, what time does to jobs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace

from services.logging.schedule.job import Job, us
from services.logging.schedule.measures import ScheduleMeasures
from services.logging.schedule.store import (
    Accepted,
    AttemptEnd,
    Beat,
    Cursor,
    DeadLetter,
    DeadLetterFilter,
    JobClaim,
    JobFilter,
    OutboxRow,
    Page,
    ReportTaken,
    ScheduleStore,
    Standing,
)
from services.logging.schedule.transactions import no_dead_letter, no_job
from services.logging.schedule.watchers import Watchers
from services.mesh.clock import Clock, wait_at_most
from services.mesh.context import Identity
from services.mesh.errors import LlmosError
from services.mesh.jobs import JobEvent, JobRequested, JobState, Sealed

logger = logging.getLogger(__name__)

ADMIN_SCOPE = "admin"
SWEEP_EVERY_S = 1.0
SWEEP_LIMIT = 500
STALL_S = 5.0
"""A sweep that comes so late shows that this process stood still: it may not have heard those who beat."""
MAX_CLAIM_WAIT_S = 10.0
MAX_GET_WAIT_S = 5.0
MIN_NAP_S, MAX_NAP_S = 0.01, 1.0
"""The wall clock, by which jobs fall due, may jump; waiting for it is cut into such pieces."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What workers and watchers may ask for."""

    min_lease_s: float = 5.0
    max_lease_s: float = 600.0
    lease_grace_s: float = 30.0
    """After a start, or a time of standing still, no lease ends for so long: workers get to beat first."""
    max_watchers: int = 1000


class Schedule:
    """A component: it sweeps while it runs. What it is asked may raise DependencyUnavailable."""

    def __init__(self, store: ScheduleStore, clock: Clock, limits: Limits) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits
        self._watchers = Watchers(limits.max_watchers)
        self._measures = ScheduleMeasures()
        self._work = asyncio.Event()
        self._news = asyncio.Event()
        self._swept_s = float("-inf")
        self._leases_from_s = float("-inf")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._measures.observe()
        self._task = asyncio.create_task(self._run(), name="schedule-sweep")

    async def stop(self) -> None:
        self._measures.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    # What comes from Kafka and goes there.

    async def accept(self, events: Sequence[JobEvent]) -> Accepted:
        """Takes in what was read from Kafka; when it returns, that is durable. Raises Overloaded too."""
        accepted = await self._store.accept(events, self._now_us())
        self._measures.accepted(len(accepted.job_ids))
        self._tell(accepted.changed, accepted.dead)
        return accepted

    async def outbox(self, limit: int) -> list[OutboxRow]:
        """What Kafka has to be told, the oldest first."""
        return await self._store.outbox(limit)

    async def published(self, numbers: Sequence[int]) -> None:
        """Kafka has taken them."""
        await self._store.published(numbers)

    async def news(self) -> None:
        """Returns when there may be something in the outbox that was not there at the last call."""
        await self._news.wait()
        self._news.clear()

    # What workers ask.

    async def claim(self, worker: str, max_jobs: int, *, lease_s: float, wait_s: float) -> list[JobClaim]:
        """Due jobs, at once or as soon as there are any within the wait; else none."""
        end_s = self._clock.monotonic() + min(wait_s, MAX_CLAIM_WAIT_S)
        while True:
            work = self._work
            now_us = self._now_us()
            found = await self._store.claim(worker, max_jobs, now_us + self._lease_us(lease_s), now_us)
            self._tell(found.changed, found.dead)
            if found.claims:
                self._measures.claimed(found.claims)
                return list(found.claims)
            left_s = end_s - self._clock.monotonic()
            if left_s <= 0:
                return []
            if found.next_due_us is not None:
                due_s = max((found.next_due_us - now_us) / 1e6, MIN_NAP_S)
                left_s = min(left_s, due_s, MAX_NAP_S)
            await wait_at_most(self._clock, work, left_s)

    async def heartbeat(
        self, beats: Sequence[Beat], partials: dict[str, Sealed], *, lease_s: float
    ) -> list[tuple[Standing, bool]]:
        """What has become of each, and whether it is watched. A partial result is for those who do."""
        now_us = self._now_us()
        standings = await self._store.heartbeat(beats, now_us + self._lease_us(lease_s), now_us)
        answers = []
        for beat, standing in zip(beats, standings, strict=True):
            if standing.held:
                if beat.job_id in partials:
                    self._watchers.partial(beat.job_id, partials[beat.job_id])
                self._watchers.changed((beat.job_id,))
            answers.append((standing, standing.held and self._watchers.is_watched(beat.job_id)))
        return answers

    async def report(self, ends: Sequence[AttemptEnd]) -> list[ReportTaken]:
        """All or none; one answer for each, in order."""
        found = await self._store.report(ends, self._now_us())
        dead: Counter[str] = Counter()
        for end, taken in zip(ends, found, strict=True):
            self._measures.reported(end.report, taken)
            dead.update(taken.dead)
        self._tell([job_id for taken in found for job_id in taken.changed], dead)
        return found

    # What callers ask: each sees its own tenant's, an administrator all.

    async def get(
        self, reader: Identity, job_id: str, *, wait_s: float = 0.0
    ) -> tuple[Job, Sealed | None, Sealed | None]:
        """A job, its sealed request and its result, as far as they are kept. Raises NotFound; its metadata
        has `gone` where there was such a job, so that none can come with this id."""
        found = await self._visible(reader, job_id)
        if found is None and await self._store.is_gone(job_id):
            raise no_job(gone=True)
        if found is not None or wait_s <= 0:
            return _or_none(found)
        end_s = self._clock.monotonic() + min(wait_s, MAX_GET_WAIT_S)
        with self._watchers.watching(job_id, wants_partial=False) as watcher:
            while True:
                watcher.changed.clear()
                found = await self._visible(reader, job_id)
                left_s = end_s - self._clock.monotonic()
                if found is not None or left_s <= 0:
                    return _or_none(found)
                await wait_at_most(self._clock, watcher.changed, left_s)

    async def list_jobs(
        self,
        reader: Identity,
        which: JobFilter,
        limit: int,
        after: Cursor | None,
        *,
        with_results: bool = False,
        oldest_first: bool = False,
    ) -> Page[tuple[Job, Sealed | None]]:
        which = replace(which, tenant_id=_tenant(reader))
        return await self._store.list_jobs(
            which, limit, after, with_results=with_results, oldest_first=oldest_first
        )

    async def count(self, reader: Identity, batch_id: str = "") -> dict[JobState, int]:
        return await self._store.count(_tenant(reader), batch_id)

    async def cancel(self, reader: Identity, job_id: str) -> Job:
        """Raises NotFound."""
        job, changed = await self._store.cancel(job_id, _tenant(reader), self._now_us())
        self._tell(changed)
        return job

    async def watch(
        self, reader: Identity, job_id: str
    ) -> AsyncGenerator[tuple[Job, Sealed | None, Sealed | None], None]:
        """The job, its partial result and its result: as it is, then at each change, until it has ended.

        Raises NotFound, also where it is forgotten meanwhile, and ConcurrencyLimit.
        """
        with self._watchers.watching(job_id, wants_partial=True) as watcher:
            while True:
                watcher.changed.clear()
                job, _, result = _or_none(await self._visible(reader, job_id))
                partial = watcher.partial if job.state is JobState.RUNNING else None
                yield job, partial, result
                if job.state.is_final:
                    return
                await watcher.changed.wait()

    async def dead_letters(
        self, reader: Identity, which: DeadLetterFilter, limit: int, after: Cursor | None
    ) -> Page[DeadLetter]:
        if which.unreadable and ADMIN_SCOPE not in reader.scopes:
            return Page([], False)
        which = replace(which, tenant_id=_tenant(reader))
        return await self._store.dead_letters(which, limit, after)

    async def dead_letter(self, reader: Identity, dead_letter_id: str) -> tuple[DeadLetter, Sealed | None]:
        """Raises NotFound."""
        return await self._store.dead_letter(dead_letter_id, _tenant(reader))

    async def replay(self, reader: Identity, dead_letter_id: str, job: JobRequested) -> Job:
        """Raises NotFound, AlreadyExists and RequestInvalid."""
        tenant_id = _tenant(reader)
        if tenant_id not in ("", job.identity.tenant_id):
            raise no_dead_letter()
        new, changed = await self._store.replay(dead_letter_id, tenant_id, job, self._now_us())
        self._measures.replayed()
        self._tell(changed)
        return new

    async def discard(self, reader: Identity, dead_letter_id: str) -> None:
        """Raises NotFound."""
        await self._store.discard(dead_letter_id, _tenant(reader), self._now_us())
        self._tell((dead_letter_id,))

    # What time does.

    async def sweep(self) -> bool:
        """Does what is due by now; True: there is more."""
        now_s = self._clock.monotonic()
        if now_s - self._swept_s > STALL_S:
            self._leases_from_s = now_s + self._limits.lease_grace_s
        self._swept_s = now_s
        swept = await self._store.sweep(self._now_us(), SWEEP_LIMIT, leases=now_s >= self._leases_from_s)
        self._measures.lost(swept.lost)
        if swept.lost:
            logger.warning("%d jobs lost their workers", swept.lost)
        self._tell(swept.changed, swept.dead)
        return swept.more

    async def _run(self) -> None:
        failing = False
        while True:
            more = False
            try:
                more = await self.sweep()
                if not more:
                    self._measures.totals(await self._store.totals(), self._now_us())
                failing = False
            except LlmosError as error:
                if not failing:
                    logger.warning("the schedule is not swept: %s; trying again until it is", error)
                failing = True
            except Exception:
                logger.exception("the schedule is not swept")
            await self._clock.sleep(0.0 if more else SWEEP_EVERY_S)

    def _tell(self, changed: Sequence[str], dead: Mapping[str, int] | None = None) -> None:
        """Wakes whom a change may concern."""
        if not changed and not dead:
            return
        self._measures.dead(dead or {})
        self._watchers.changed(changed)
        work, self._work = self._work, asyncio.Event()
        work.set()
        self._news.set()

    async def _visible(
        self, reader: Identity, job_id: str
    ) -> tuple[Job, Sealed | None, Sealed | None] | None:
        found = await self._store.get(job_id)
        return None if found is None or _tenant(reader) not in ("", found[0].tenant_id) else found

    def _lease_us(self, lease_s: float) -> int:
        return us(min(max(lease_s, self._limits.min_lease_s), self._limits.max_lease_s))

    def _now_us(self) -> int:
        return int(self._clock.now().timestamp() * 1_000_000)


def _tenant(reader: Identity) -> str:
    """Whose jobs a reader sees; empty: everybody's."""
    return "" if ADMIN_SCOPE in reader.scopes else reader.tenant_id


def _or_none(
    found: tuple[Job, Sealed | None, Sealed | None] | None,
) -> tuple[Job, Sealed | None, Sealed | None]:
    if found is None:
        raise no_job()
    return found
