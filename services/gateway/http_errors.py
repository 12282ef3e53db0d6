"""The error tree on the HTTP edge: the one mapping to status, headers and OpenAI's error object."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec
from msgspec import Struct

from services.mesh import errors
from services.mesh.errors import LlmosError, Status

_STATUS: Mapping[Status, int] = {
    Status.CANCELLED: 499,
    Status.UNKNOWN: 500,
    Status.INVALID_ARGUMENT: 400,
    Status.DEADLINE_EXCEEDED: 504,
    Status.NOT_FOUND: 404,
    Status.ALREADY_EXISTS: 409,
    Status.PERMISSION_DENIED: 403,
    Status.RESOURCE_EXHAUSTED: 429,
    Status.FAILED_PRECONDITION: 422,
    Status.ABORTED: 409,
    Status.OUT_OF_RANGE: 400,
    Status.UNIMPLEMENTED: 501,
    Status.INTERNAL: 500,
    Status.UNAVAILABLE: 503,
    Status.DATA_LOSS: 500,
    Status.UNAUTHENTICATED: 401,
}
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
# Names that clients already know.
_CODES: Mapping[str, str] = {
    "CREDENTIAL_MISSING": "invalid_api_key",
    "CREDENTIAL_INVALID": "invalid_api_key",
    "RATE_LIMIT": "rate_limit_exceeded",
    "BUDGET_EXHAUSTED": "insufficient_quota",
}


class Said(Struct):
    """An error as callers read it."""

    message: str
    type: str
    param: str | None
    code: str | None


Parameter = Callable[[str], str]
"""The name of a field of the message as the caller wrote it: the same message stands below all routes."""


_MEDIA_TYPE = "media_type"


def unsupported_media_type(text: str) -> errors.RequestInvalid:
    """For a body whose type or encoding is not read here. HTTP alone knows the difference, by its status."""
    hint = "Send JSON, not compressed, with `content-type: application/json`."
    return errors.RequestInvalid(text, hint=hint, metadata={_MEDIA_TYPE: "unsupported"})


def status(error: LlmosError) -> int:
    """The HTTP status."""
    if _MEDIA_TYPE in error.metadata:
        return 415
    if isinstance(error, errors.MessageTooLarge):
        return 413
    if isinstance(error, errors.NotCached):
        return 504  # RFC 9111, 5.2.1.7
    if isinstance(error, errors.NotImplementedYet) and _field(error):
        # A parameter, not a route: the caller can leave it out.
        return 400
    return _STATUS[error.status]


def said(error: LlmosError, parameter: Parameter = str) -> Said:
    """What a caller reads of it: nothing of our insides."""
    text = "An internal error occurred." if type(error) is errors.Internal else error.message
    field = _field(error)
    return Said(
        f"{text} {error.hint}".strip(),
        _type(status(error)),
        (parameter(field) or None) if field else None,
        _CODES.get(error.reason, error.reason.lower()),
    )


def body(error: LlmosError, parameter: Parameter = str) -> bytes:
    """`{"error": {message, type, param, code}}`, the form of every error, in streams too."""
    return _encode(said(error, parameter))


def event(error: LlmosError, parameter: Parameter = str) -> bytes:
    """The same as the last event of a broken stream."""
    return b"data: " + body(error, parameter) + b"\n\n"


def plain_body(code: int, text: str) -> bytes:
    """The same form for what HTTP itself refuses, before there is a request of ours."""
    return _encode(Said(text, _type(code), None, None))


def headers(error: LlmosError) -> list[tuple[bytes, bytes]]:
    """Whether and when to try again, and how to authenticate."""
    found = [(b"x-should-retry", b"true" if error.retryable else b"false")]
    if error.retry_after_s is not None:
        found.append((b"retry-after", b"%d" % math.ceil(error.retry_after_s)))
        found.append((b"retry-after-ms", b"%d" % math.ceil(error.retry_after_s * 1000)))
    if error.status is Status.UNAUTHENTICATED:
        found.append((b"www-authenticate", b"Bearer"))
    return found


def _encode(found: Said) -> bytes:
    return msgspec.json.encode({"error": found})


def _type(code: int) -> str:
    return _TYPES.get(code, "invalid_request_error" if code < 500 else "server_error")


def _field(error: LlmosError) -> str:
    """The field that the error names first, if any."""
    return error.violations[0].field if error.violations else error.metadata.get("field", "")
