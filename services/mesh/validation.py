"""The rules that stand in the protos, checked on requests, never per token."""

from __future__ import annotations

import protovalidate
from google.protobuf.message import Message

from services.mesh.errors import RequestInvalid, Violation

_validator = protovalidate.Validator()


def validate(request: Message) -> None:
    """Raises RequestInvalid, which names each field that breaks a rule."""
    found = _validator.collect_violations(request)
    if not found:
        return
    violations = [
        Violation(_path(violation.proto.field), violation.proto.message or "is invalid")
        for violation in found
    ]
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    name = f"`{first.field}` " if first.field else ""
    raise RequestInvalid(f"The request is invalid: {name}{first.description}{more}.", violations=violations)


def _path(field: object) -> str:
    parts: list[str] = []
    for element in getattr(field, "elements", ()):
        subscript = getattr(element, "subscript", None)
        name = element.field_name
        index = getattr(subscript, "value", None)
        parts.append(f"{name}[{index}]" if index is not None else name)
    return ".".join(parts)
