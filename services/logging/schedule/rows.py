"""What a store offers inside one transaction: rows to read and write, without rules.

Whatever is written is kept together, or nothing of it where the transaction raises.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

from services.logging.schedule.job import Job
from services.logging.schedule.store import DeadLetter, OutboxRow
from services.mesh.jobs import DeadLettered, RetryRequested, Sealed


class Purpose(Enum):
    """What is sealed."""

    REQUEST = "request"
    RESULT = "result"


class TenantJobs(NamedTuple):
    """How many of a tenant's jobs have not ended, and of its dead letters there are."""

    waiting: int
    running: int
    dead_letters: int


class Rows(Protocol):
    """Times are microseconds since 1970."""

    def job(self, job_id: str) -> Job | None: ...

    def is_known(self, job_id: str) -> bool:
        """Whether it is there, or was and is remembered."""

    def insert(self, job: Job, now_us: int) -> None: ...

    def update(self, old: Job, new: Job) -> None: ...

    def remove(self, job: Job, remember_until_us: int) -> None:
        """With all that is sealed in it, and its dead letter."""

    def sealed(self, job_id: str, purpose: Purpose) -> Sealed | None: ...

    def put_sealed(self, job_id: str, purpose: Purpose, sealed: Sealed) -> None: ...

    def drop_sealed(self, job_id: str, purpose: Purpose) -> None: ...

    def kept(self) -> int:
        """All jobs."""

    def of_tenant(self, tenant_id: str) -> TenantJobs: ...

    def group_order_us(self, job: Job) -> int | None:
        """The newest `order_us` of waiting jobs of its tenant, rank and prefix group."""

    def fall_due(self, now_us: int) -> None:
        """Waiting jobs whose time has come are handed out from now on."""

    def tenants_in_turn(self, limit: int, now_us: int) -> list[tuple[int, int, str]]:
        """(running, last served, tenant) of those who have due jobs and are not held, in that order."""

    def next_due(self, tenant_id: str) -> Job | None:
        """Of the tenant's due jobs, the first by rank, `order_us`, prefix group, time of submission and
        id."""

    def serve(self, tenant_id: str, number: int) -> None:
        """Notes when the tenant was served last."""

    def hold(self, tenant_id: str, until_us: int) -> None:
        """Never shortens a hold."""

    def next_due_us(self, now_us: int) -> int | None:
        """When there is something to hand out that is not yet: jobs fall due, or holds end."""

    def lease_ended(self, now_us: int, limit: int) -> list[Job]:
        """Running jobs whose lease has ended, the longest first, as in the next ones."""

    def time_up(self, now_us: int, limit: int) -> list[Job]:
        """Waiting jobs whose give-up time has come."""

    def expired(self, now_us: int, limit: int) -> list[Job]:
        """Jobs that ended long enough ago."""

    def cancelling(self, limit: int) -> list[str]:
        """Batches whose jobs are being ended."""

    def begin_cancelling(self, batch_id: str) -> None: ...

    def end_cancelling(self, batch_id: str) -> None: ...

    def live_of_batch(self, batch_id: str, limit: int) -> list[Job]:
        """Its jobs that have not ended and of which nobody has asked that they do."""

    def is_batch_over(self, batch_id: str) -> bool:
        """Whether all of its jobs, as far as they are known, have ended."""

    def dead_letter(self, dead_letter_id: str) -> DeadLetter | None:
        """With its job and its bytes."""

    def insert_dead_letter(self, letter: DeadLetter) -> bool:
        """False where it is there already."""

    def oldest_dead_letters(self, tenant_id: str, limit: int) -> list[DeadLetter]: ...

    def expired_dead_letters(self, now_us: int, limit: int) -> list[DeadLetter]:
        """Of those that are no job's."""

    def remove_dead_letter(self, letter: DeadLetter) -> None:
        """Of one that is no job's."""

    def forget(self, now_us: int, limit: int) -> int:
        """No longer remembers ids whose time is over; returns how many."""

    def outbox_size(self) -> int: ...

    def post(self, event_id: str, time_us: int, event: RetryRequested | DeadLettered) -> None:
        """Puts news in the outbox; what is sealed is added when it is read."""

    def outbox(self, limit: int) -> list[OutboxRow]: ...

    def remove_posted(self, number: int) -> None: ...
