"""Handing in jobs: checked and authorised as the request itself would be, sealed, and on this machine's disk
before the caller hears of it. From then on a job is not lost.

What was handed in under an idempotency key has an id that is a function of tenant, key and day, so that a
repeat finds it, at any gateway, also where the first answer was lost and the schedule is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from services.gateway.auditing import RequestRecord
from services.gateway.authorisation import Authorisation
from services.gateway.jobs.ports import JobSpool, ScheduledJob, SchedulePort, Seals
from services.gateway.jobs.room import Room
from services.gateway.jobs.work import (
    MAX_JOBS_AT_ONCE,
    ValidSubmission,
    ValidWork,
)
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import (
    DependencyUnavailable,
    IdempotencyMismatch,
    LlmosError,
    NotFound,
    RequestInvalid,
    StateConflict,
)
from services.mesh.jobs import JobKind, JobRequested, JobState, Sealed
from services.mesh.randomness import random_bytes

KNOWN_WAIT_S = 2.0
"""How long an answer waits for the schedule to know the job."""
LOOKUP_TIMEOUT_S = 2.5
MAX_TIMES_A_DAY = 8
"""An idempotency key may be used anew where its job is gone, discarded or with its result; so often."""
WINDOW = 32
"""Jobs of one call that are on their way to the disk at once."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of many jobs."""

    batch_id: str
    job_ids: tuple[str, ...]
    """Of those that were taken, in order."""
    refusals: tuple[tuple[int, LlmosError], ...]
    """(place, from 0; why) of those that were not."""


class Submissions:
    """The use case."""

    def __init__(
        self,
        *,
        schedule: SchedulePort,
        spool: JobSpool,
        seals: Seals,
        authorisation: Authorisation,
        clock: Clock,
        max_jobs_per_tenant: int,
    ) -> None:
        self._schedule = schedule
        self._spool = spool
        self._seals = seals
        self._authorisation = authorisation
        self._clock = clock
        self._room = Room(schedule, clock, max_jobs_per_tenant=max_jobs_per_tenant)

    def authorise(self, identity: Identity, source_address: str, work: ValidWork) -> None:
        """Whether policy lets the caller make the request now. Raises ScopeMissing or PolicyDenied."""
        self._authorisation.decide_request(
            identity,
            work.method,
            address=source_address,
            model=work.model,
            task=work.task,
            max_tokens=work.max_tokens,
            labels=work.labels,
        )

    def sealed(
        self, identity: Identity, submission: ValidSubmission, job_id: str, batch_id: str = ""
    ) -> JobRequested:
        """The job, ready to be sent. Raises StateConflict where this deployment offers no jobs."""
        work, now, tenant_id = submission.work, self._clock.now(), identity.tenant_id
        not_before = max(now, submission.not_before or now)
        group = self._seals.keyed_hash(tenant_id, "prefix", work.model.encode() + b"\0" + work.prefix)
        return seal_request(
            self._seals,
            work.payload,
            JobRequested(
                job_id=job_id,
                kind=JobKind.REQUEST,
                identity=identity,
                method=work.method,
                model=work.model,
                request=Sealed("", b""),
                create_time=now,
                not_before=not_before,
                max_attempts=submission.max_attempts,
                give_up_time=not_before + timedelta(seconds=submission.give_up_after_s),
                result_ttl_s=submission.result_ttl_s,
                priority=submission.priority,
                labels=submission.labels,
                prefix_group=group[:16].hex(),
                batch_id=batch_id,
                request_digest=self._digest(identity, submission),
                has_webhook=work.has_webhook,
            ),
        )

    async def submit(self, record: RequestRecord, submission: ValidSubmission) -> ScheduledJob:
        """The job as the schedule knows it; where that is away, as it will.

        Raises ScopeMissing, PolicyDenied, IdempotencyMismatch, ConcurrencyLimit, AuditUnavailable or
        StateConflict."""
        record.model, record.labels = submission.work.model, submission.labels
        found, job = await self._checked(record, submission)
        if found is None:
            await self._room.take(record.identity.tenant_id)
        record.begin()
        await record.committed()
        if found is not None:
            return found
        await self._spool.append_job(job)
        return await self._known(job)

    async def submit_all(
        self, record: RequestRecord, given: AsyncIterator[ValidSubmission | LlmosError]
    ) -> Taken:
        """Takes or refuses each on its own; an error among what is given is a refusal already.

        Raises AuditUnavailable, where the call itself cannot be recorded; StateConflict; and what reading
        raises: those that came before are jobs all the same."""
        self._seals.keyed_hash("", "probe", b"")
        record.begin()
        await record.committed()
        batch_id = ""
        taken: dict[int, JobRequested] = {}
        refused: dict[int, LlmosError] = {}
        digests: dict[str, bytes] = {}
        places = asyncio.Semaphore(WINDOW)
        broken: LlmosError | None = None

        async def one(index: int, submission: ValidSubmission) -> None:
            try:
                found, job = await self._checked(record, submission, batch_id)
                _same(digests.setdefault(job.job_id, job.request_digest), job)
                if found is None:
                    await self._room.take(record.identity.tenant_id)
                    await self._spool.append_job(job)
                # The request itself is on the disk: only its name is needed from here on.
                taken[index] = _emptied(job)
            except LlmosError as error:
                refused[index] = error
            finally:
                places.release()

        async with asyncio.TaskGroup() as group:
            try:
                index = 0
                async for each in given:
                    if index >= MAX_JOBS_AT_ONCE:
                        refused[index] = RequestInvalid(
                            f"A call takes {MAX_JOBS_AT_ONCE} jobs: those from this one on were not read."
                        )
                        break
                    if isinstance(each, LlmosError):
                        refused[index] = each
                    else:
                        batch_id = batch_id or self._batch_id(record.identity, each)
                        await places.acquire()
                        group.create_task(one(index, each))
                    index += 1
            except LlmosError as error:
                broken = error
        if broken is not None:
            raise broken
        if taken:
            # Those before it came to the schedule before it.
            last = max(taken)
            try:
                await self._known(taken[last])
            except IdempotencyMismatch as error:
                refused[last] = error
                del taken[last]
        return Taken(
            batch_id,
            tuple(taken[index].job_id for index in sorted(taken)),
            tuple((index, refused[index]) for index in sorted(refused)),
        )

    async def _checked(
        self, record: RequestRecord, submission: ValidSubmission, batch_id: str = ""
    ) -> tuple[ScheduledJob | None, JobRequested]:
        """What its idempotency key stands for already, if anything; and the job that it is."""
        identity = record.identity
        self.authorise(identity, record.source_address, submission.work)
        if not submission.idempotency_key:
            return None, self.sealed(identity, submission, new_job_id(), batch_id)
        found, job_id = await self._repeated(identity, submission)
        job = self.sealed(identity, submission, job_id, batch_id) if found is None else found.job
        return found, job

    async def _repeated(
        self, identity: Identity, submission: ValidSubmission
    ) -> tuple[ScheduledJob | None, str]:
        """The job of the last 24 hours that has the key; else the id for a new one."""
        now, digest = self._clock.now(), self._digest(identity, submission)
        today = (now - _EPOCH).days
        first = job_id = self._job_id(identity, submission.idempotency_key, today, 0)
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                for day in (today - 1, today):
                    for times in range(MAX_TIMES_A_DAY + 1):
                        job_id = self._job_id(identity, submission.idempotency_key, day, times)
                        try:
                            found, _ = await self._schedule.get(job_id)
                        except NotFound as error:
                            if error.metadata.get("gone"):
                                continue
                            break
                        if found.job.create_time > now - _DAY:
                            _same(digest, found.job)
                            return found, job_id
                        break
                    else:
                        if day == today:
                            raise StateConflict("The idempotency key was used too often today.")
        except (DependencyUnavailable, TimeoutError):
            # The id alone sees to it that a repeat is one.
            return None, first
        return None, job_id

    async def _known(self, job: JobRequested) -> ScheduledJob:
        """Waits a while for the schedule to know it. Raises IdempotencyMismatch, where the id was taken by
        another request at the same time."""
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                found, _ = await self._schedule.get(job.job_id, wait_s=KNOWN_WAIT_S)
        except (NotFound, DependencyUnavailable, TimeoutError):
            return ScheduledJob(job, JobState.WAITING, next_attempt_time=job.not_before)
        _same(job.request_digest, found.job)
        return found

    def _digest(self, identity: Identity, submission: ValidSubmission) -> bytes:
        return self._seals.keyed_hash(identity.tenant_id, "digest", submission.content)

    def _batch_id(self, identity: Identity, first: ValidSubmission) -> str:
        """A function of the first job's idempotency key and the day, where it has one: a call that is
        repeated with the same keys names the batch that its jobs belong to."""
        if not first.idempotency_key:
            return f"jobs_{random_bytes(16).hex()}"
        text = f"{(self._clock.now() - _EPOCH).days} {first.idempotency_key}".encode()
        return f"jobs_{self._seals.keyed_hash(identity.tenant_id, 'batch', text)[:16].hex()}"

    def _job_id(self, identity: Identity, key: str, day: int, times: int) -> str:
        text = f"{day} {times} {key}".encode()
        return f"job_{self._seals.keyed_hash(identity.tenant_id, 'idempotency', text)[:16].hex()}"


def new_job_id() -> str:
    """128 random bits."""
    return f"job_{random_bytes(16).hex()}"


def seal_request(seals: Seals, payload: bytes, job: JobRequested) -> JobRequested:
    """The job with its payload sealed in it."""
    return replace(job, request=seals.seal(payload, job, "request"))


def _emptied(job: JobRequested) -> JobRequested:
    return replace(job, request=Sealed("", b""))


def _same(digest: bytes, job: JobRequested) -> None:
    if job.request_digest != digest:
        raise IdempotencyMismatch(
            "The idempotency key belongs to another request.", metadata={"job_id": job.job_id}
        )
