"""What an error of an attempt means for its job: it counts and is tried again, it is the end, or it was not
the job's time yet.

An outage counts attempts: an engine that loses its replica with each of its attempts must not have it for
ever. What keeps an outage from giving up everything that waits is the worker, which claims little while
nothing can be served.
"""

from __future__ import annotations

from services.gateway.jobs.ports import Failed, Postponed, Report
from services.mesh.errors import (
    AuditUnavailable,
    BudgetExhausted,
    ConcurrencyLimit,
    DataCorrupt,
    Draining,
    Internal,
    LlmosError,
    ModelNotFound,
    Overloaded,
    RateLimit,
    Status,
)

MAX_WAIT_S = 60.0
"""After that a limit is looked at again."""
BUDGET_WAIT_S = 15 * 60.0
"""An administrator may raise a budget before it is renewed."""
MAX_MESSAGE_CHARS = 1000

_FINAL = frozenset(
    {
        Status.INVALID_ARGUMENT,
        Status.NOT_FOUND,
        Status.ALREADY_EXISTS,
        Status.PERMISSION_DENIED,
        Status.UNAUTHENTICATED,
        Status.FAILED_PRECONDITION,
        Status.RESOURCE_EXHAUSTED,
        Status.OUT_OF_RANGE,
        Status.UNIMPLEMENTED,
    }
)


def report_of(error: LlmosError) -> Report:
    """Of an attempt that ended with this error."""
    if isinstance(error, BudgetExhausted):
        return Postponed(BUDGET_WAIT_S, BUDGET_WAIT_S if _is_of_tenant(error) else 0.0)
    if isinstance(error, RateLimit | ConcurrencyLimit) and error.retryable:
        wait_s = min(max(error.retry_after_s or 0.0, 1.0), MAX_WAIT_S)
        return Postponed(wait_s, wait_s if _is_of_tenant(error) else 0.0)
    if isinstance(error, Overloaded | Draining | AuditUnavailable):
        return Postponed(min(error.retry_after_s or 0.0, MAX_WAIT_S))
    return failed(error, retryable=is_passing(error))


def is_passing(error: LlmosError) -> bool:
    """Whether another attempt may do better. A gateway that has just started does not know the models of a
    replica that is away, so what it does not find may yet be there."""
    return isinstance(error, ModelNotFound) or error.status not in _FINAL


def failed(error: LlmosError, *, retryable: bool) -> Failed:
    """An attempt that counts."""
    message = "The server failed." if type(error) is Internal else error.message
    return Failed(
        error_reason=error.reason,
        status_code=int(error.status),
        message=message[:MAX_MESSAGE_CHARS],
        retryable=retryable,
        retry_after_s=min(error.retry_after_s or 0.0, MAX_WAIT_S) if retryable else 0.0,
    )


def unreadable(error: DataCorrupt) -> Failed:
    """A job whose request was not sealed for it, or was changed: no attempt opens it."""
    return failed(error, retryable=False)


def _is_of_tenant(error: LlmosError) -> bool:
    return any(violation.subject.startswith("tenant:") for violation in error.quota)
