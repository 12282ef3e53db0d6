"""What the machine speaks of: a job, what can happen to it, and what comes of that.

Times are microseconds since 1970. What is sealed (request, result) is no part of a `Job`: stores keep it
apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from services.mesh.jobs import JobAttempt, JobKind, JobRequested, JobState, Sealed

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND_US = 1_000_000
NOTHING_SEALED = Sealed("", b"")


def to_us(time: datetime) -> int:
    return (time - EPOCH) // timedelta(microseconds=1)


def from_us(time_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=time_us)


def us(duration_s: float) -> int:
    return round(duration_s * SECOND_US)


@dataclass(frozen=True, slots=True)
class Job:
    """A job and where it stands."""

    request: JobRequested
    """As it came in, with nothing in `request`."""
    state: JobState = JobState.WAITING
    attempts: int = 0
    """A running one included; postponed ones are not."""
    fence: int = 0
    """One more at each claim."""
    due_us: int = 0
    """While it waits: not before."""
    lease_us: int = 0
    """While it runs: until when the worker may be silent."""
    worker: str = ""
    start_us: int = 0
    """When the running attempt began."""
    end_us: int = 0
    expire_us: int = 0
    """Once it has ended: when it is forgotten."""
    history: tuple[JobAttempt, ...] = ()
    last_request_id: str = ""
    """Of the attempt that succeeded."""
    error_reason: str = ""
    progress_tokens: int = 0
    version: int = 1
    cancel_asked: bool = False
    reported_fence: int = 0
    """The claim whose report was taken last, so that a repeat of it is known."""
    order_us: int = 0
    """By which jobs of the same tenant and priority are handed out."""
    ended: Job | None = None
    """Of a webhook: the job that has ended, as it was then."""

    @property
    def job_id(self) -> str:
        return self.request.job_id

    @property
    def tenant_id(self) -> str:
        return self.request.identity.tenant_id

    @property
    def give_up_us(self) -> int:
        return to_us(self.request.give_up_time)

    @property
    def rank(self) -> int:
        """Which of a tenant's jobs go first. What gathers or tells of others does not queue behind them."""
        return 0 if self.request.kind is not JobKind.REQUEST else int(self.request.priority)


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
class Claimed:
    """A worker takes it."""

    worker: str
    lease_us: int
    """When the lease ends."""


@dataclass(frozen=True, slots=True)
class Beaten:
    """Its worker lives."""

    fence: int
    lease_us: int
    progress_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Reported:
    """Its worker says how the attempt ended."""

    fence: int
    request_id: str
    report: Report


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """Its worker was silent for too long."""


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Its tenant wants it ended."""


@dataclass(frozen=True, slots=True)
class TimeUp:
    """Its give-up time has come."""


@dataclass(frozen=True, slots=True)
class Woken:
    """What it waits for may have happened."""


Event = Claimed | Beaten | Reported | LeaseEnded | CancelAsked | TimeUp | Woken


@dataclass(frozen=True, slots=True)
class Retried:
    """It is to be told that an attempt failed and another follows."""

    request_id: str
    error_reason: str
    attempts: int


@dataclass(frozen=True, slots=True)
class GaveUp:
    """It is a dead letter now; `detail` is for a person."""

    detail: str


@dataclass(frozen=True, slots=True)
class KeepResult:
    """Its result is to be kept."""

    result: Sealed


@dataclass(frozen=True, slots=True)
class HoldTenant:
    """None of its tenant's jobs is handed out until then."""

    until_us: int


@dataclass(frozen=True, slots=True)
class TellWebhook:
    """This job, which tells of the end, is to be made."""

    job: Job


Effect = Retried | GaveUp | KeepResult | HoldTenant | TellWebhook


@dataclass(frozen=True, slots=True)
class Step:
    """What an event did."""

    job: Job
    effects: tuple[Effect, ...] = ()
    taken: bool = True
    """False: the event is none for a job that stands there; nothing has changed."""
