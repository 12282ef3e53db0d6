"""The rules that stand in the protos, checked on requests, never per token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import protovalidate
from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from services.mesh import rules
from services.mesh.errors import RequestInvalid, Violation

_validator = protovalidate.Validator()
Parsed = TypeVar("Parsed")
SMALL_BYTES = 2048
"""A request of so many bytes has nothing in such numbers that checking it would take long."""


def parsed(data: bytes, parse: Callable[[bytes], Parsed]) -> Parsed:
    """Raises RequestInvalid for broken bytes."""
    try:
        return parse(data)
    except DecodeError:
        raise RequestInvalid("The request is not a valid protobuf message.") from None


def validate(request: Message) -> None:
    """Raises RequestInvalid, which names each field that breaks a rule."""
    if request.ByteSize() > SMALL_BYTES:
        _check_numbers(request)
    if rules.surely_valid(request):
        return
    try:
        found = _validator.collect_violations(request)
    except protovalidate.EvaluationError:
        raise RequestInvalid("The request is too complex to be checked.") from None
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


def _check_numbers(request: Message) -> None:
    """How many of what there may be, before each of them is looked at: 100,000 that are wrong would take
    seconds. Raises RequestInvalid."""
    for path, limit in _too_many(request, ""):
        said = f"has more than {limit} entries"
        raise RequestInvalid(f"The request is invalid: `{path}` {said}.", violations=[Violation(path, said)])


def _too_many(message: Message, path: str) -> Iterator[tuple[str, int]]:
    for name, limit, is_list, is_message in _plan(message.DESCRIPTOR):
        if not is_list:
            if message.HasField(name):
                yield from _too_many(getattr(message, name), f"{path}{name}.")
            continue
        entries: Any = getattr(message, name)
        if limit is not None and len(entries) > limit:
            yield f"{path}{name}", limit
        elif is_message:
            for index, entry in enumerate(entries):
                yield from _too_many(entry, f"{path}{name}[{index}].")


@functools.cache
def _plan(kind: Descriptor) -> tuple[tuple[str, int | None, bool, bool], ...]:
    """(name, its limit, whether it is a list or map, whether its entries are messages to look into) of the
    fields that matter."""
    found: list[tuple[str, int | None, bool, bool]] = []
    for field in kind.fields:
        limits = field.GetOptions().Extensions[validate_pb2.field]
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            found.append(
                (field.name, limits.map.max_pairs if limits.map.HasField("max_pairs") else None, True, False)
            )
        elif field.is_repeated:
            limit = limits.repeated.max_items if limits.repeated.HasField("max_items") else None
            found.append((field.name, limit, True, inner is not None))
        elif inner is not None:
            found.append((field.name, None, False, True))
    return tuple(found)


def _path(field: object) -> str:
    parts: list[str] = []
    for element in getattr(field, "elements", ()):
        subscript = getattr(element, "subscript", None)
        name = element.field_name
        index = getattr(subscript, "value", None)
        parts.append(f"{name}[{index}]" if index is not None else name)
    return ".".join(parts)
