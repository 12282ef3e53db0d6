"""Jobs as gateways and logging speak of them: what goes through Kafka, and where a job stands.

`job_codec` turns them into the messages of `llmos.events.v1`, whose comments are the reference.
docs/decisions/0080-jobs.md tells the whole way of a job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from services.mesh.context import Identity


class JobKind(IntEnum):
    """What a job is."""

    REQUEST = 1
    BATCH = 2
    WEBHOOK = 3


class JobPriority(IntEnum):
    """Which of a tenant's waiting jobs go first."""

    HIGH = 1
    NORMAL = 2
    LOW = 3


class JobState(IntEnum):
    """Where a job stands."""

    WAITING = 1
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    """Given up: it is a dead letter."""
    CANCELLED = 5

    @property
    def is_final(self) -> bool:
        return self > JobState.RUNNING


@dataclass(frozen=True, slots=True)
class Sealed:
    """What only gateways can open."""

    key_id: str
    ciphertext: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class JobRequested:
    """A job, as it was submitted."""

    job_id: str
    kind: JobKind
    identity: Identity
    """Who submitted it; authorised again, against that day's policy, when it runs."""
    method: str
    """The full gRPC method name to run."""
    model: str
    request: Sealed
    create_time: datetime
    not_before: datetime
    max_attempts: int
    give_up_time: datetime
    result_ttl_s: float
    priority: JobPriority = JobPriority.NORMAL
    labels: Mapping[str, str] = field(default_factory=dict)
    prefix_group: str = ""
    batch_id: str = ""
    request_digest: bytes = b""
    has_webhook: bool = False


@dataclass(frozen=True, slots=True)
class JobAttempt:
    """An attempt that failed."""

    number: int
    """The first is 1."""
    request_id: str
    worker: str
    start_time: datetime
    end_time: datetime
    error_reason: str
    """Of the tree in `errors`."""
    status_code: int
    """gRPC's."""
    message: str


@dataclass(frozen=True, slots=True)
class RetryRequested:
    """A failed request is to be tried again."""

    job: JobRequested
    request_id: str
    error_reason: str
    attempts: int


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """Something was given up: a job, or an event that could not be read."""

    error_reason: str
    detail: str
    job_id: str = ""
    attempts: int = 0
    job: JobRequested | None = None
    history: tuple[JobAttempt, ...] = ()
    raw: bytes = b""
    topic: str = ""
    partition: int = 0
    offset: int = 0


JobEvent = JobRequested | RetryRequested | DeadLettered
