"""The error tree: each class knows its status, its reason and whether a retry can help.

LlmosError
├── UNAUTHENTICATED      CredentialMissing CredentialInvalid CredentialExpired CredentialRevoked
├── PERMISSION_DENIED    ScopeMissing PolicyDenied
├── INVALID_ARGUMENT     RequestInvalid ContextLengthExceeded
├── NOT_FOUND            ModelNotFound NotFound StreamNotFound
├── ALREADY_EXISTS       AlreadyExists
├── UNIMPLEMENTED        NotImplementedYet
├── FAILED_PRECONDITION  StateConflict IdempotencyMismatch NotCached
├── RESOURCE_EXHAUSTED   MessageTooLarge ConcurrencyLimit RateLimit BudgetExhausted Overloaded
├── ABORTED              Conflict IdempotencyRunning StreamLost ReaderStalled
├── UNAVAILABLE          NoReplica ReplicaLost Draining DependencyUnavailable AuditUnavailable WorkerLost
├── DEADLINE_EXCEEDED    DeadlineExceeded
├── CANCELLED            Cancelled
├── INTERNAL             Internal EngineFault
└── DATA_LOSS            DataCorrupt

`reason` is the name of an `llmos.common.v1.ErrorReason` without its prefix. A message is for the
caller to read: it names what to change, and nothing of our insides. `status` maps the tree to gRPC,
the gateway's HTTP edge maps it to HTTP; nothing else maps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import ClassVar, NamedTuple


class Status(IntEnum):
    """The status codes of gRPC."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Violation(NamedTuple):
    """One broken rule of a request."""

    field: str
    """The path, such as `spec.sampling.top_p`."""
    description: str
    """What the rule asks for."""


class QuotaViolation(NamedTuple):
    """A limit that was reached."""

    subject: str
    """Who shares it, such as `tenant:acme`."""
    description: str
    """Which limit it is, how much there is and when there is more."""


class LlmosError(Exception):
    """The root of the tree; raise a leaf.

    `retry_after_s` says when a retry makes sense; `metadata` goes to the caller as it is; `quota` names the
    limits that were reached, and by what. `retryable` is set where a retry cannot help though one of the
    class's usually does.
    """

    status: ClassVar[Status] = Status.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    retryable: bool = False
    default_hint: ClassVar[str] = "Report the request id to your operator."
    default_retry_after_s: ClassVar[float | None] = None

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        quota: Sequence[QuotaViolation] = (),
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint
        if retryable is not None:
            self.retryable = retryable
        default_s = self.default_retry_after_s if retryable is not False else None
        self.retry_after_s = default_s if retry_after_s is None else retry_after_s
        self.quota = tuple(quota)
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)


class CredentialMissing(LlmosError):
    status = Status.UNAUTHENTICATED
    reason = "CREDENTIAL_MISSING"
    default_hint = "Send `authorization: Bearer KEY` with an API key or an access token."


class CredentialInvalid(LlmosError):
    status = Status.UNAUTHENTICATED
    reason = "CREDENTIAL_INVALID"
    default_hint = "Check the API key or access token; it must be complete and meant for this service."


class CredentialExpired(LlmosError):
    status = Status.UNAUTHENTICATED
    reason = "CREDENTIAL_EXPIRED"
    default_hint = "Get a new access token."


class CredentialRevoked(LlmosError):
    status = Status.UNAUTHENTICATED
    reason = "CREDENTIAL_REVOKED"
    default_hint = "Ask your administrator for a new credential."


class ScopeMissing(LlmosError):
    status = Status.PERMISSION_DENIED
    reason = "SCOPE_MISSING"
    default_hint = "Use a credential that has the scope."


class PolicyDenied(LlmosError):
    status = Status.PERMISSION_DENIED
    reason = "POLICY_DENIED"
    default_hint = "Ask your administrator whether this is meant to be allowed."


class RequestInvalid(LlmosError):
    status = Status.INVALID_ARGUMENT
    reason = "REQUEST_INVALID"
    default_hint = "Correct the named fields and send the request again."


class ContextLengthExceeded(LlmosError):
    status = Status.INVALID_ARGUMENT
    reason = "CONTEXT_LENGTH_EXCEEDED"
    default_hint = "Shorten the prompt or lower max_tokens."


class MessageTooLarge(LlmosError):
    status = Status.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"
    default_hint = "Send a smaller message."


class ModelNotFound(LlmosError):
    status = Status.NOT_FOUND
    reason = "MODEL_NOT_FOUND"
    default_hint = "List the models to see which ids exist."


class NotFound(LlmosError):
    status = Status.NOT_FOUND
    reason = "NOT_FOUND"
    default_hint = "Check the id."


class AlreadyExists(LlmosError):
    status = Status.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"
    default_hint = "Choose another id."


class NotImplementedYet(LlmosError):
    status = Status.UNIMPLEMENTED
    reason = "NOT_IMPLEMENTED"
    default_hint = "This version of the server does not offer it; leave it out."


class StateConflict(LlmosError):
    status = Status.FAILED_PRECONDITION
    reason = "STATE_CONFLICT"
    default_hint = "Look at the object's state first."


class Conflict(LlmosError):
    status = Status.ABORTED
    reason = "CONFLICT"
    default_hint = "Read the object again, and make the change to what it is now."


class ConcurrencyLimit(LlmosError):
    status = Status.RESOURCE_EXHAUSTED
    reason = "CONCURRENCY_LIMIT"
    retryable = True
    default_hint = "Too many requests at once: wait, or send fewer in parallel."
    default_retry_after_s = 1.0


class RateLimit(LlmosError):
    status = Status.RESOURCE_EXHAUSTED
    reason = "RATE_LIMIT"
    retryable = True
    default_hint = "Slow down, or ask for a higher limit."
    default_retry_after_s = 1.0


class BudgetExhausted(LlmosError):
    status = Status.RESOURCE_EXHAUSTED
    reason = "BUDGET_EXHAUSTED"
    default_hint = "The budget is spent; ask your administrator when it is renewed."


class Overloaded(LlmosError):
    status = Status.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"
    retryable = True
    default_hint = "The server is busy: wait before you retry."
    default_retry_after_s = 1.0


class IdempotencyRunning(LlmosError):
    status = Status.ABORTED
    reason = "IDEMPOTENCY_RUNNING"
    default_hint = "The first request with this key still runs; attach to its stream or wait for it."


class IdempotencyMismatch(LlmosError):
    status = Status.FAILED_PRECONDITION
    reason = "IDEMPOTENCY_MISMATCH"
    default_hint = "The key belongs to another request; use a new one."


class NotCached(LlmosError):
    status = Status.FAILED_PRECONDITION
    reason = "NOT_CACHED"
    default_hint = "Ask again without `only-if-cached`."


class StreamNotFound(LlmosError):
    status = Status.NOT_FOUND
    reason = "STREAM_NOT_FOUND"
    default_hint = "Check the stream id, or begin anew."


class StreamLost(LlmosError):
    status = Status.ABORTED
    reason = "STREAM_LOST"
    default_hint = "The stream is gone; begin anew."


class NoReplica(LlmosError):
    status = Status.UNAVAILABLE
    reason = "NO_REPLICA"
    retryable = True
    default_hint = "No replica can serve the model now; retry later."
    default_retry_after_s = 1.0


class ReplicaLost(LlmosError):
    status = Status.UNAVAILABLE
    reason = "REPLICA_LOST"
    retryable = True
    default_hint = "The replica was lost; what was received is valid. Retry."
    default_retry_after_s = 1.0


class Draining(LlmosError):
    status = Status.UNAVAILABLE
    reason = "DRAINING"
    retryable = True
    default_hint = "The server is shutting down; retry, another one will answer."
    default_retry_after_s = 0.1


class DependencyUnavailable(LlmosError):
    status = Status.UNAVAILABLE
    reason = "DEPENDENCY_UNAVAILABLE"
    retryable = True
    default_hint = "A part of the platform does not answer; retry later."
    default_retry_after_s = 1.0


class AuditUnavailable(LlmosError):
    status = Status.UNAVAILABLE
    reason = "AUDIT_UNAVAILABLE"
    retryable = True
    default_hint = "The audit log cannot take more now, and this deployment serves nothing unaudited."
    default_retry_after_s = 5.0


class DeadlineExceeded(LlmosError):
    status = Status.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"
    default_hint = "Allow more time, or ask for fewer tokens."


class Cancelled(LlmosError):
    status = Status.CANCELLED
    reason = "CANCELLED"
    default_hint = "The caller ended the request."


class ReaderStalled(LlmosError):
    status = Status.ABORTED
    reason = "READER_STALLED"
    default_hint = "Read the stream faster."


class WorkerLost(LlmosError):
    """No caller is answered with it: it stands in the history of a job."""

    status = Status.UNAVAILABLE
    reason = "WORKER_LOST"
    default_hint = "The job is tried again, as long as it has attempts left."


class Internal(LlmosError):
    """A fault of ours. Its message reaches no caller."""


class EngineFault(LlmosError):
    reason = "ENGINE_FAULT"
    default_hint = "The engine failed on this request; report the request id to your operator."


class DataCorrupt(LlmosError):
    status = Status.DATA_LOSS
    reason = "DATA_CORRUPT"


def leaves(root: type[LlmosError] = LlmosError) -> Iterator[type[LlmosError]]:
    """All classes of the tree that are raised."""
    for cls in root.__subclasses__():
        yield cls
        yield from leaves(cls)


BY_REASON: Mapping[str, type[LlmosError]] = {cls.reason: cls for cls in leaves()}
