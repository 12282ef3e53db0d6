"""The errors of the client. Catch a class of the tree; the server's exact cause is its `reason`.

LlmosError
├── ConfigurationError      (local) a file, a target or a combination of options that cannot work
├── AuthenticationError     CREDENTIAL_MISSING CREDENTIAL_INVALID CREDENTIAL_EXPIRED CREDENTIAL_REVOKED
├── PermissionDenied        SCOPE_MISSING POLICY_DENIED
├── InvalidRequest          REQUEST_INVALID CONTEXT_LENGTH_EXCEEDED MESSAGE_TOO_LARGE
├── NotFound                MODEL_NOT_FOUND NOT_FOUND STREAM_NOT_FOUND
├── Conflict                ALREADY_EXISTS STATE_CONFLICT CONFLICT IDEMPOTENCY_RUNNING IDEMPOTENCY_MISMATCH
│                           NOT_CACHED
├── RateLimited             CONCURRENCY_LIMIT RATE_LIMIT BUDGET_EXHAUSTED OVERLOADED
├── Unavailable             NO_REPLICA REPLICA_LOST DRAINING DEPENDENCY_UNAVAILABLE AUDIT_UNAVAILABLE
│                           WORKER_LOST
├── DeadlineExceeded        DEADLINE_EXCEEDED
├── Cancelled               CANCELLED
├── NotImplementedByServer  NOT_IMPLEMENTED
├── ServerError             INTERNAL ENGINE_FAULT DATA_CORRUPT
└── StreamError             STREAM_LOST READER_STALLED
    ├── StreamBroken        (local) a sequence number is missing or came twice, or events are out of order
    └── StreamIncomplete    (local) the stream ended well but without Finished

The reasons are those of `llmos.common.v1.ErrorReason`. A reason of a later version, or a status that came
from gRPC itself or from a proxy, is put into the tree by its status code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "llmos"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"
LOST_STATUS = "Internal error from Core"
"""What grpc.aio says in place of the server's status where the server ends a call that is still being
written (grpc/grpc issue 36066). No server says it."""

Metadata = Iterable[tuple[str, str | bytes]]


class FieldViolation(NamedTuple):
    """One broken rule of a request."""

    field: str
    """The path, such as `spec.sampling.top_p`."""
    description: str
    """What the rule asks for."""


class LlmosError(Exception):
    """The root of the tree. `str(error)` is one sentence that can be shown to a person."""

    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        hint: str = "",
        request_id: str = "",
        trace_id: str = "",
        retryable: bool = False,
        retry_after_s: float | None = None,
        violations: Iterable[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        """What happened."""
        self.reason = reason or self.default_reason
        """The name of an ErrorReason, without its prefix."""
        self.hint = hint
        """What to do about it; may be empty."""
        self.request_id = request_id
        """Finds the request in logs, traces and the audit log; empty where no server answered."""
        self.trace_id = trace_id
        """The trace that the call belongs to, 32 hex digits."""
        self.retryable = retryable
        """Whether the same call may succeed later."""
        self.retry_after_s = retry_after_s
        """When, in seconds, as the server said; None where it did not."""
        self.violations = tuple(violations)
        """The broken rules, field by field."""
        self.metadata = dict(metadata or {})
        """What else the server said, such as `scope`."""

    @property
    def job_id(self) -> str:
        """The job that the failed request has become, where it asked for that; otherwise empty."""
        return self.metadata.get("job_id", "")

    def __str__(self) -> str:
        return f"{self.message.rstrip('.')} ({self.reason})."


class ConfigurationError(LlmosError):
    """What the client was told cannot work; nothing was sent."""

    default_reason = "CONFIGURATION"


class AuthenticationError(LlmosError):
    """No credential, or one that does not hold."""

    default_reason = "CREDENTIAL_INVALID"


class PermissionDenied(LlmosError):
    """The credential holds and does not allow this."""

    default_reason = "POLICY_DENIED"


class InvalidRequest(LlmosError):
    """The request breaks a rule; `violations` names the fields where the server did."""

    default_reason = "REQUEST_INVALID"


class NotFound(LlmosError):
    """No such model, object or stream for this caller."""

    default_reason = "NOT_FOUND"


class Conflict(LlmosError):
    """The object, or the idempotency key, is not in a state that allows this."""

    default_reason = "STATE_CONFLICT"


class RateLimited(LlmosError):
    """Too much at once, or a budget is spent. `retry_after_s` says when to come again."""

    default_reason = "OVERLOADED"


class Unavailable(LlmosError):
    """The server, or what it needs, cannot be reached now."""

    default_reason = "UNAVAILABLE"


class DeadlineExceeded(LlmosError):
    """`timeout_s`, or the server's own cap, passed."""

    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(LlmosError):
    """The call was cancelled, here or at the server."""

    default_reason = "CANCELLED"


class NotImplementedByServer(LlmosError):
    """This version of the server does not offer the method or the parameter."""

    default_reason = "NOT_IMPLEMENTED"


class ServerError(LlmosError):
    """A fault of the server; its operator finds it by `request_id`."""

    default_reason = "INTERNAL"


class StreamError(LlmosError):
    """A stream ended before its end."""

    default_reason = "STREAM_LOST"


class StreamBroken(StreamError):
    """The stream broke its own rules, so what was received cannot be trusted to be whole."""

    default_reason = "STREAM_BROKEN"


class StreamIncomplete(StreamError):
    """The stream ended without Finished: the text is only a beginning."""

    default_reason = "STREAM_INCOMPLETE"


_BY_REASON: dict[str, type[LlmosError]] = {
    "CREDENTIAL_MISSING": AuthenticationError,
    "CREDENTIAL_INVALID": AuthenticationError,
    "CREDENTIAL_EXPIRED": AuthenticationError,
    "CREDENTIAL_REVOKED": AuthenticationError,
    "SCOPE_MISSING": PermissionDenied,
    "POLICY_DENIED": PermissionDenied,
    "REQUEST_INVALID": InvalidRequest,
    "CONTEXT_LENGTH_EXCEEDED": InvalidRequest,
    "MESSAGE_TOO_LARGE": InvalidRequest,
    "MODEL_NOT_FOUND": NotFound,
    "NOT_FOUND": NotFound,
    "STREAM_NOT_FOUND": NotFound,
    "ALREADY_EXISTS": Conflict,
    "STATE_CONFLICT": Conflict,
    "CONFLICT": Conflict,
    "IDEMPOTENCY_RUNNING": Conflict,
    "IDEMPOTENCY_MISMATCH": Conflict,
    "NOT_CACHED": Conflict,
    "CONCURRENCY_LIMIT": RateLimited,
    "RATE_LIMIT": RateLimited,
    "BUDGET_EXHAUSTED": RateLimited,
    "OVERLOADED": RateLimited,
    "NO_REPLICA": Unavailable,
    "REPLICA_LOST": Unavailable,
    "DRAINING": Unavailable,
    "DEPENDENCY_UNAVAILABLE": Unavailable,
    "AUDIT_UNAVAILABLE": Unavailable,
    "WORKER_LOST": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "NOT_IMPLEMENTED": NotImplementedByServer,
    "INTERNAL": ServerError,
    "ENGINE_FAULT": ServerError,
    "DATA_CORRUPT": ServerError,
    "STREAM_LOST": StreamError,
    "READER_STALLED": StreamError,
}

_BY_CODE: dict[grpc.StatusCode, type[LlmosError]] = {
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RateLimited,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: NotImplementedByServer,
}

_NEVER_RETRYABLE = frozenset({"BUDGET_EXHAUSTED"})


def from_status(
    code: grpc.StatusCode,
    details: str,
    trailing_metadata: Metadata,
    *,
    target: str,
    trace_id: str = "",
) -> LlmosError:
    """The error that a status stands for. `target` is for the sentence about a server out of reach."""
    request_id = ""
    status: status_pb2.Status | None = None
    for key, value in trailing_metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str):
            request_id = value
        elif key == DETAILS_KEY and isinstance(value, bytes):
            status = _parsed(value)
    info, violations, retry_after_s = _unpacked(status)
    if info is None or info.domain != DOMAIN:
        return _bare(code, details, target=target, request_id=request_id, trace_id=trace_id)
    metadata = dict(info.metadata)
    request_id = metadata.pop("request_id", "") or request_id
    hint = metadata.pop("hint", "")
    cls = _BY_REASON.get(info.reason) or _BY_CODE.get(code, ServerError)
    return cls(
        details.removesuffix(hint).strip() or hint,
        reason=info.reason,
        hint=hint,
        request_id=request_id,
        trace_id=trace_id,
        retryable=cls in (Unavailable, RateLimited) and info.reason not in _NEVER_RETRYABLE,
        retry_after_s=retry_after_s,
        violations=violations,
        metadata=metadata,
    )


def of_reason(
    reason: str,
    message: str,
    *,
    request_id: str = "",
    hint: str = "",
    metadata: Mapping[str, str] | None = None,
) -> LlmosError:
    """The error that an attempt of a job failed with."""
    cls = _BY_REASON.get(reason, ServerError)
    return cls(message, reason=reason, request_id=request_id, hint=hint, metadata=metadata)


def _bare(code: grpc.StatusCode, details: str, *, target: str, request_id: str, trace_id: str) -> LlmosError:
    """A status without our details: from gRPC itself, or from a proxy."""
    cls = _BY_CODE.get(code, ServerError)
    message, reason, hint = details or f"The call failed with {code.name}.", "", ""
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            # gRPC refuses what is over its size limits before any code of ours sees it.
            cls, reason = InvalidRequest, "MESSAGE_TOO_LARGE"
        case grpc.StatusCode.UNAVAILABLE:
            why = details.rpartition("last error: ")[2].removeprefix("UNKNOWN: ")
            message = f"The server at {target} cannot be reached: {why}"
            hint = "Check that it runs, that the target is right, and that both sides agree on TLS."
        case grpc.StatusCode.INTERNAL if details == LOST_STATUS:
            cls = Unavailable
            message = f"The server at {target} ended the call before all was sent; why was lost on the way."
            hint = "Send it again."
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            message = "The deadline passed before the answer was complete."
            hint = "Allow more time (timeout_s), or ask for fewer tokens."
        case grpc.StatusCode.CANCELLED:
            message = "The call was cancelled."
        case grpc.StatusCode.UNIMPLEMENTED:
            hint = f"Check that {target} is the gRPC port of an llmos gateway."
        case _:
            pass
    return cls(
        message,
        reason=reason,
        hint=hint,
        request_id=request_id,
        trace_id=trace_id,
        retryable=cls in (Unavailable, RateLimited),
    )


def _parsed(value: bytes) -> status_pb2.Status | None:
    try:
        return status_pb2.Status.FromString(value)
    except DecodeError:
        return None


def _unpacked(
    status: status_pb2.Status | None,
) -> tuple[error_details_pb2.ErrorInfo | None, list[FieldViolation], float | None]:
    """(ErrorInfo, BadRequest's violations, RetryInfo's delay in seconds)."""
    info: error_details_pb2.ErrorInfo | None = None
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    for detail in status.details if status else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = max(0.0, retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
    return info, violations, retry_after_s
