"""What is handed in: a request that was checked as if it were called directly, and how it is to be run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from services.mesh.errors import MessageTooLarge
from services.mesh.jobs import JobPriority

GENERATE = "/llmos.gateway.v1.GenerationService/Generate"
MAX_JOB_BYTES = 896 * 1024
"""Of what is sealed, so that its event fits Kafka's usual message of 1 MiB."""
MAX_JOBS_AT_ONCE = 10_000
"""Of one call."""
DEFAULT_MAX_ATTEMPTS = 5
DAY_S = 86_400.0
MAX_AHEAD_DAYS = 366
PREFIX_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class ValidWork:
    """A request that a job may run."""

    method: str
    """The full gRPC method name."""
    model: str
    task: str
    """What policy calls it."""
    max_tokens: int
    """Over all choices."""
    labels: Mapping[str, str]
    """The request's own."""
    prefix: bytes = field(repr=False)
    """How its prompt begins: those that are equal share the prefix cache."""
    payload: bytes = field(repr=False)
    """A llmos.jobs.v1.RequestPayload, to be sealed."""
    has_webhook: bool = False

    def __post_init__(self) -> None:
        """Raises MessageTooLarge."""
        if len(self.payload) > MAX_JOB_BYTES:
            raise MessageTooLarge(f"A job may have {MAX_JOB_BYTES} bytes; this one has {len(self.payload)}.")


@dataclass(frozen=True, slots=True)
class ValidSubmission:
    """A job, as it was handed in."""

    work: ValidWork
    content: bytes = field(repr=False)
    """All that a repeat must have in common with it."""
    idempotency_key: str = ""
    not_before: datetime | None = None
    """None: at once."""
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    give_up_after_s: float = DAY_S
    """After it may first run."""
    result_ttl_s: float = DAY_S
    priority: JobPriority = JobPriority.NORMAL
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Again:
    """How a dead letter is to be run again."""

    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    give_up_after_s: float = DAY_S
    model: str = ""
    """Empty: as it was."""
    max_tokens: int = 0
    """For each choice; 0: as it was."""
    temperature: float | None = None
    """None: as it was."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """What becomes of a request that fails for a passing reason."""

    max_attempts: int
    """The first included."""
    give_up_after_s: float = DAY_S
