"""The one mapping between the error tree and gRPC statuses with google.rpc details."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from services.mesh import errors
from services.mesh.errors import LlmosError, QuotaViolation, Status, Violation

DOMAIN = "llmos"
DETAILS_KEY = "grpc-status-details-bin"
MAX_VIOLATIONS = 32


def to_status(error: LlmosError, request_id: str) -> status_pb2.Status:
    """What a caller reads of `error`: ErrorInfo always; BadRequest, QuotaFailure, RetryInfo where they help.

    The message of `Internal` is replaced: it may speak of our insides.
    """
    internal = type(error) is errors.Internal
    message = "An internal error occurred." if internal else error.message
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    info.metadata.update({} if internal else error.metadata)
    info.metadata["request_id"] = request_id
    info.metadata["hint"] = error.hint
    details: list[Message] = [info]
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[:MAX_VIOLATIONS]:
            bad.field_violations.add(field=violation.field, description=violation.description)
        details.append(bad)
    if error.quota:
        exhausted = error_details_pb2.QuotaFailure()
        for entry in error.quota[:MAX_VIOLATIONS]:
            exhausted.violations.add(subject=entry.subject, description=entry.description)
        details.append(exhausted)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=int(error.status), message=f"{message} {error.hint}".strip())
    for detail in details:
        status.details.add().Pack(detail)
    return status


def code_of(error: LlmosError) -> grpc.StatusCode:
    return _CODES[error.status]


def from_rpc_error(error: grpc.aio.AioRpcError) -> LlmosError:
    """The error that the other service raised, or the one that stands for its loss."""
    status = _parsed(error)
    found = None if status is None else _from_status(status)
    return _bare(error) if found is None else found


def from_details(data: bytes) -> LlmosError:
    """The error that a service of ours raised, from what it says under DETAILS_KEY."""
    try:
        found = _from_status(status_pb2.Status.FromString(data))
    except DecodeError:
        found = None
    return errors.Internal("a service raised an error that cannot be read") if found is None else found


def _from_status(status: status_pb2.Status) -> LlmosError | None:
    """None where it is not one of ours."""
    info, bad, exhausted, retry = (
        _unpacked(status.details, kind)
        for kind in (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.QuotaFailure(),
            error_details_pb2.RetryInfo(),
        )
    )
    if isinstance(info, error_details_pb2.ErrorInfo) and info.domain == DOMAIN:
        metadata = dict(info.metadata)
        metadata.pop("request_id", None)
        hint = metadata.pop("hint", "")
        cls = errors.BY_REASON.get(info.reason, errors.Internal)
        violations = bad.field_violations if isinstance(bad, error_details_pb2.BadRequest) else ()
        quota = exhausted.violations if isinstance(exhausted, error_details_pb2.QuotaFailure) else ()
        return cls(
            status.message.removesuffix(hint).strip(),
            hint=hint,
            metadata=metadata,
            retry_after_s=_seconds(retry),
            violations=[Violation(v.field, v.description) for v in violations],
            quota=[QuotaViolation(entry.subject, entry.description) for entry in quota],
        )
    return None


def _seconds(retry: Message | None) -> float | None:
    if not isinstance(retry, error_details_pb2.RetryInfo):
        return None
    return float(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)


def _bare(error: grpc.aio.AioRpcError) -> LlmosError:
    """A status without our details: it came from gRPC itself, or from a proxy."""
    code, text = error.code(), error.details() or ""
    match code:
        case grpc.StatusCode.CANCELLED:
            return errors.Cancelled("The call was cancelled.")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineExceeded("The deadline passed before the answer was complete.")
        case grpc.StatusCode.UNAVAILABLE:
            return errors.DependencyUnavailable("A service of the platform cannot be reached.")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.MessageTooLarge("A message is larger than the limit.")
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.NotImplementedYet("The method does not exist on this server.")
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return errors.Internal(f"a service refused this one: {code.name}: {text}")
        case _:
            return errors.Internal(f"unexpected status {code.name}: {text}")


def _parsed(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _unpacked(details: Iterable[any_pb2.Any], kind: Message) -> Message | None:
    """`kind`, filled from the first detail of its type."""
    return next((kind for detail in details if detail.Unpack(kind)), None)


_CODES = {Status(code.value[0]): code for code in grpc.StatusCode}
