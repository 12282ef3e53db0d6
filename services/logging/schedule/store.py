"""What the schedule asks of a database: the port, and what goes through it.

Implemented by `stores.sqlite` and, for tests, `stores.memory`; tests/contract/test_schedule_store.py holds
both to it. Times are microseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from services.logging.schedule.job import Job, Report
from services.mesh.jobs import (
    DeadLettered,
    JobEvent,
    JobKind,
    JobRequested,
    JobState,
    RetryRequested,
    Sealed,
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much there may be."""

    max_jobs_per_tenant: int = 100_000
    """That wait or run; one more is given up as it comes (OVERLOADED)."""
    max_jobs: int = 1_000_000
    """In all, ended ones too; beyond, nothing is taken in until there is room: it waits in Kafka."""
    max_dead_letters_per_tenant: int = 10_000
    """The oldest are forgotten beyond that; likewise of those that belong to no tenant."""
    max_outbox: int = 100_000
    """Beyond, news of retries is left out, and of what was given up is kept."""
    remember_s: float = 7 * 86_400.0
    """How long the id of a job that is gone is remembered, so that its event, coming again, changes
    nothing."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """What events did."""

    job_ids: tuple[str, ...] = ()
    """Jobs that are new."""
    dead: Mapping[str, int] = field(default_factory=dict)
    """How many dead letters are new, by reason."""
    changed: tuple[str, ...] = ()
    """All jobs that changed."""


@dataclass(frozen=True, slots=True)
class JobClaim:
    """A job that a worker may run. Its fence is `job.fence`; its lease ends at `job.lease_us`."""

    job: Job
    request: Sealed


@dataclass(frozen=True, slots=True)
class Claims:
    """Work, if there was any."""

    claims: tuple[JobClaim, ...]
    next_due_us: int | None
    """When a job falls due that is not yet, or the past: there are more; None: none waits."""
    changed: tuple[str, ...] = ()
    dead: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Beat:
    """A running job whose worker lives."""

    job_id: str
    fence: int
    progress_tokens: int = 0


class Standing(NamedTuple):
    """What has become of it."""

    held: bool
    cancel: bool


class AttemptEnd(NamedTuple):
    """What a worker says of an attempt."""

    job_id: str
    fence: int
    request_id: str
    report: Report


@dataclass(frozen=True, slots=True)
class ReportTaken:
    """What a report did."""

    taken: bool
    changed: tuple[str, ...] = ()
    dead: Mapping[str, int] = field(default_factory=dict)
    retried: str = ""
    """Why it is tried again, if it is."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What time did to jobs."""

    changed: tuple[str, ...] = ()
    lost: int = 0
    """Leases that ended."""
    dead: Mapping[str, int] = field(default_factory=dict)
    forgotten: int = 0
    more: bool = False
    """There was more to do than was asked for."""


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs; what is set must all hold."""

    tenant_id: str = ""
    states: frozenset[JobState] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    batch_id: str = ""
    kinds: frozenset[JobKind] = frozenset({JobKind.REQUEST})


MAX_PAGE_BYTES = 2 * 1024 * 1024
"""Of what a page or a claim holds, about: with one more item than that, an answer still fits 4 MiB."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some of what was asked for."""

    items: list[T]
    more: bool
    """Whether there is another one after it."""

    @classmethod
    def cut(cls, items: Iterable[T], limit: int, weight: Callable[[T], int]) -> Page[T]:
        """The first `limit` items, or fewer that weigh MAX_PAGE_BYTES; one at least, if there is any."""
        page: list[T] = []
        size = 0
        for item in items:
            size += weight(item)
            if page and (len(page) >= limit or size > MAX_PAGE_BYTES):
                return cls(page, True)
            page.append(item)
        return cls(page, False)


class Cursor(NamedTuple):
    """The last row of a page."""

    time_us: int
    row_id: str


@dataclass(frozen=True, slots=True)
class DeadLetterFilter:
    """Which dead letters; what is set must all hold."""

    tenant_id: str = ""
    error_reason: str = ""
    model: str = ""
    create_time_from_us: int | None = None
    create_time_before_us: int | None = None
    unreadable: bool = False
    """Those that belong to no tenant."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Something that was given up. That of a job has the job's id."""

    dead_letter_id: str
    error_reason: str
    detail: str
    create_us: int
    expire_us: int
    tenant_id: str = ""
    """Empty where the event could not be read."""
    model: str = ""
    job: Job | None = None
    raw: bytes = b""
    topic: str = ""
    partition: int = 0
    offset: int = 0


def weight_of(listed: tuple[Job, Sealed | None]) -> int:
    """About how many bytes it takes in an answer."""
    job, sealed = listed
    labels = sum(len(name) + len(value) for name, value in job.request.labels.items())
    history = sum(300 + 2 * len(attempt.message) for attempt in job.history)
    return 1000 + labels + history + (len(sealed.ciphertext) if sealed else 0)


def letter_weight(letter: DeadLetter) -> int:
    """As `weight_of`."""
    return 1000 + 2 * len(letter.detail) + (weight_of((letter.job, None)) if letter.job else 0)


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """News that Kafka is to be told."""

    number: int
    """Grows."""
    event_id: str
    """A function of what it says: the same at each publication."""
    time_us: int
    event: RetryRequested | DeadLettered
    """With the sealed request, as long as there is one."""


@dataclass(frozen=True, slots=True)
class Totals:
    """How things stand, for metrics."""

    waiting: int = 0
    running: int = 0
    kept: int = 0
    """All jobs, ended ones too."""
    oldest_due_us: int | None = None
    """Since when the job that waits longest could run."""
    dead_letters: int = 0
    outbox: int = 0


class ScheduleStore(Protocol):
    """Each method is one transaction. Raises DependencyUnavailable where the database fails."""

    async def start(self) -> None:
        """Raises OSError with a sentence where it cannot be used."""

    async def stop(self) -> None: ...

    async def accept(self, events: Sequence[JobEvent], now_us: int) -> Accepted:
        """Takes in what came from Kafka: all or nothing, and durably. Repeating it changes nothing.

        A job whose id is known, or was, changes nothing. One whose give-up time has passed becomes a dead
        letter (DEADLINE_EXCEEDED), as does a `DeadLettered`: an event that could not be read (`raw`, `topic`,
        `partition` and `offset` tell it from others), or a job that nobody vouches for (`job`). Raises
        Overloaded where the schedule is full; then nothing of it is stored.
        """

    async def claim(self, worker: str, max_jobs: int, lease_us: int, now_us: int) -> Claims:
        """Hands out due jobs until `lease_us`: in turn to the tenants with the fewest running ones."""

    async def heartbeat(self, beats: Sequence[Beat], lease_us: int, now_us: int) -> list[Standing]:
        """Prolongs leases until `lease_us`; one answer for each beat, in order."""

    async def report(self, ends: Sequence[AttemptEnd], now_us: int) -> list[ReportTaken]:
        """Takes reports, all or none; one answer for each, in order."""

    async def sweep(self, now_us: int, limit: int, *, leases: bool = True) -> Swept:
        """Ends leases (where `leases`) and waits whose time is up, goes on ending the jobs of cancelled
        batches, and forgets what has expired: at most `limit` of each."""

    async def get(self, job_id: str) -> tuple[Job, Sealed | None, Sealed | None] | None:
        """A job, its sealed request where it is still there, and its result."""

    async def is_gone(self, job_id: str) -> bool:
        """Whether there was such a job, and its id is still remembered."""

    async def list_jobs(
        self,
        which: JobFilter,
        limit: int,
        after: Cursor | None,
        *,
        with_results: bool = False,
        oldest_first: bool = False,
    ) -> Page[tuple[Job, Sealed | None]]:
        """By the time of submission; `after` is where the page before ended."""

    async def count(self, tenant_id: str, batch_id: str = "") -> dict[JobState, int]:
        """Of a batch, or of the tenant's jobs of kind REQUEST; an empty tenant is any."""

    async def cancel(self, job_id: str, tenant_id: str, now_us: int) -> tuple[Job, tuple[str, ...]]:
        """Ends a job or asks its worker to, and those of a batch with it: some at once, the others in
        `sweep`. Returns it and the ids that changed. Raises NotFound where the tenant (empty: any) has none
        of that id."""

    async def dead_letters(
        self, which: DeadLetterFilter, limit: int, after: Cursor | None
    ) -> Page[DeadLetter]:
        """The newest first, without `raw`; `after` is where the page before ended."""

    async def dead_letter(self, dead_letter_id: str, tenant_id: str) -> tuple[DeadLetter, Sealed | None]:
        """With its bytes or its sealed request. Raises NotFound as `cancel` does."""

    async def replay(
        self, dead_letter_id: str, tenant_id: str, job: JobRequested, now_us: int
    ) -> tuple[Job, tuple[str, ...]]:
        """Puts a new job in a dead letter's place; returns it, and the ids that changed. Raises NotFound as
        `cancel` does, AlreadyExists where the new job's id is known, RequestInvalid where it is another
        tenant's."""

    async def discard(self, dead_letter_id: str, tenant_id: str, now_us: int) -> None:
        """Raises NotFound as `cancel` does."""

    async def outbox(self, limit: int) -> list[OutboxRow]:
        """What Kafka has to be told, the oldest first."""

    async def published(self, numbers: Sequence[int]) -> None:
        """Forgets what Kafka has taken."""

    async def totals(self) -> Totals: ...
