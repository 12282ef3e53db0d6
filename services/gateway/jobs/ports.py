"""What jobs need of the world: the schedule (logging over gRPC), the spool for submissions, and seals.

`clients` in this folder has the gRPC implementation of the schedule; tests have one in memory that keeps the
same rules (tests/framework/schedules.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from services.mesh.jobs import JobAttempt, JobKind, JobRequested, JobState, RetryRequested, Sealed


@dataclass(frozen=True, slots=True)
class ScheduledJob:
    """A job as the schedule knows it."""

    job: JobRequested
    """Its `request` is empty where the schedule does not return it."""
    state: JobState
    attempts: int = 0
    """A running attempt included."""
    next_attempt_time: datetime | None = None
    end_time: datetime | None = None
    history: tuple[JobAttempt, ...] = ()
    """Those that failed, the oldest first."""
    last_request_id: str = ""
    result_expire_time: datetime | None = None
    error_reason: str = ""
    progress_tokens: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True)
class JobClaim:
    """A job that this gateway may run until its lease ends."""

    scheduled: ScheduledJob
    fence: int
    lease_expire_time: datetime
    ended: ScheduledJob | None = None
    """Of a webhook: the job that has ended."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A running job, in a heartbeat."""

    job_id: str
    fence: int
    progress_tokens: int = 0
    partial: Sealed | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What has become of it."""

    job_id: str
    held: bool
    cancel: bool = False
    watched: bool = False


@dataclass(frozen=True, slots=True)
class Succeeded:
    """An attempt gave a result."""

    result: Sealed


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt failed."""

    error_reason: str
    status_code: int
    message: str
    retryable: bool
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Postponed:
    """An attempt that does not count."""

    retry_after_s: float = 0.0
    hold_tenant_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CancelledByTenant:
    """The attempt was ended on behalf of its tenant."""


Report = Succeeded | Failed | Postponed | CancelledByTenant


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """What is said of an attempt."""

    job_id: str
    fence: int
    request_id: str
    """The attempt's; empty where none began."""
    report: Report


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs; what is set must all hold."""

    states: frozenset[JobState] = frozenset()
    labels: dict[str, str] = field(default_factory=dict)
    batch_id: str = ""
    kinds: frozenset[JobKind] = frozenset({JobKind.REQUEST})


@dataclass(frozen=True, slots=True)
class DeadLetterFilter:
    """Which dead letters; what is set must all hold."""

    error_reason: str = ""
    model: str = ""
    create_time_from: datetime | None = None
    create_time_before: datetime | None = None
    unreadable: bool = False


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Something that was given up."""

    dead_letter_id: str
    job: ScheduledJob | None
    """None where the event could not be read."""
    error_reason: str
    detail: str
    create_time: datetime
    expire_time: datetime
    raw: bytes = b""
    topic: str = ""
    partition: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class JobCounts:
    """How many jobs stand where."""

    waiting: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


class SchedulePort(Protocol):
    """The schedule. Raises DependencyUnavailable where logging does not answer; NotFound for what is not
    there, or is another tenant's. What is asked on a caller's behalf is asked inside that caller's request
    (`services.mesh.context`)."""

    async def claim(
        self, worker: str, max_jobs: int, *, lease_s: float, wait_s: float
    ) -> Sequence[JobClaim]: ...

    async def heartbeat(self, beats: Sequence[Beat], *, lease_s: float) -> Sequence[Standing]: ...

    async def report(self, ends: Sequence[AttemptEnd]) -> Sequence[bool]:
        """Whether each was taken; False: the claim is another's by now. At most 64. Where it raises,
        all may have been taken, or none: repeating it changes nothing."""

    async def get(self, job_id: str, *, wait_s: float = 0.0) -> tuple[ScheduledJob, Sealed | None]:
        """A job, and its result where it has one. NotFound has the metadata `gone` where there was one: no
        other comes with its id."""

    async def list_jobs(
        self,
        which: JobFilter,
        page_size: int,
        page_token: str = "",
        *,
        with_results: bool = False,
        oldest_first: bool = False,
    ) -> tuple[Sequence[tuple[ScheduledJob, Sealed | None]], str]:
        """A page, and the token of the next one, empty on the last."""

    async def count(self, batch_id: str = "") -> JobCounts: ...

    async def cancel(self, job_id: str) -> ScheduledJob: ...

    def watch(self, job_id: str) -> AsyncGenerator[tuple[ScheduledJob, Sealed | None, Sealed | None], None]:
        """The job, its partial result and its result, at each change until it has ended."""

    async def list_dead_letters(
        self, which: DeadLetterFilter, page_size: int, page_token: str = ""
    ) -> tuple[Sequence[DeadLetter], str]: ...

    async def dead_letter(self, dead_letter_id: str) -> DeadLetter:
        """With the sealed request of its job."""

    async def replay(self, dead_letter_id: str, job: JobRequested) -> ScheduledJob: ...

    async def discard(self, dead_letter_id: str) -> None: ...


class JobSpool(Protocol):
    """The spool, as jobs use it."""

    def append_job(self, event: JobRequested | RetryRequested) -> asyncio.Future[None]:
        """The job is on this machine's disk when the future has its result: from then on it is not lost.
        The future raises AuditUnavailable where the spool is full, in either mode: a job is never dropped."""


class Seals(Protocol):
    """Encrypts for a tenant, so that only gateways can read it, and only as what it was sealed for."""

    def seal(self, plaintext: bytes, job: JobRequested, purpose: str) -> Sealed:
        """`purpose` is `request`, `result` or `partial`. Only `job_id`, `kind`, `method` and the identity's
        tenant, client and key are looked at: they are authenticated with it."""

    def open(self, sealed: Sealed, job: JobRequested, purpose: str) -> bytes:
        """Raises DataCorrupt where it was not sealed by a gateway for this job and purpose."""

    def keyed_hash(self, tenant_id: str, purpose: str, text: bytes) -> bytes:
        """32 bytes that tell nothing of `text` to who has not the key."""

    @property
    def key_id(self) -> str:
        """The key that seals now."""

    def derive(self, key_id: str, tenant_id: str, info: bytes) -> bytes:
        """32 bytes for a file of the tenant's. Raises DataCorrupt where there is no such key."""
