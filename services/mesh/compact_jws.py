"""Reading the parts of a compact JWS (RFC 7515, section 7.1), with one reading for each text.

Two texts of one value, or two values of one text, are how a check and what it guards come to disagree. So
base64url is canonical, a name occurs once in a JSON object, and NaN is no number.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any, NoReturn

_SEGMENT = re.compile(r"[A-Za-z0-9_-]+")


class Malformed(ValueError):
    """Says what is wrong, in words that fit after `it was refused: `, and repeats nothing of the text."""


def is_base64url(segment: str) -> bool:
    """Whether it is made of base64url's characters, and not empty."""
    return _SEGMENT.fullmatch(segment) is not None


def decode(segment: str) -> bytes:
    """The bytes of a segment. Raises Malformed."""
    data: bytes | None = None
    if is_base64url(segment):
        try:
            data = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
        except (binascii.Error, ValueError):
            data = None
    if data is None:
        raise Malformed("it is not base64url")
    # unused bits in the last character must be zero
    if base64.urlsafe_b64encode(data).rstrip(b"=") != segment.encode("ascii"):
        raise Malformed("it is not canonical base64url")
    return data


def parse_object(data: bytes, part: str) -> dict[str, Any]:
    """The JSON object of the `part`, `header` or `payload`. Raises Malformed."""
    value: Any = None
    fault = f"its {part} is not a JSON object"
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        fault = f"its {part} is not JSON"
    if not isinstance(value, dict):
        raise Malformed(fault)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _no_constant(_name: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")
