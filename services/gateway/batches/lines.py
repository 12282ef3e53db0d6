"""Reads a batch's input: JSON Lines (UTF-8, a request a line), as it comes, a line at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import msgspec
from msgspec import Raw, Struct

from services.gateway.openai import parsing
from services.mesh.errors import RequestInvalid

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_ID_CHARS = 512
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class InputError:
    """What is wrong with an input."""

    line: int
    """From 1; 0 for the whole file."""
    code: str
    message: str
    param: str = ""


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line that is not blank."""

    number: int
    """From 1; blank lines count."""
    content: bytes | None
    """None where it is too long."""
    next_offset: int
    """Where the line after it begins, in bytes."""


@dataclass(frozen=True, slots=True)
class Line:
    """A request."""

    number: int
    custom_id: str
    body: bytes


class _Input(Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: Raw


_decoder = msgspec.json.Decoder(_Input)


async def split(
    chunks: AsyncIterator[bytes], *, number: int = 0, offset: int = 0, max_line_bytes: int = MAX_LINE_BYTES
) -> AsyncGenerator[RawLine, None]:
    """The lines of what begins at `offset`, after line `number`. Holds one line and one chunk."""
    held, too_long = bytearray(), False
    at_start = offset == 0

    def line(content: bytes) -> RawLine | None:
        if too_long:
            return RawLine(number, None, offset)
        return RawLine(number, content, offset) if content.strip() else None

    async for chunk in chunks:
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            held += chunk[begin:end]
            offset += end + 1 - begin
            begin, number = end + 1, number + 1
            too_long = too_long or len(held) > max_line_bytes
            content = bytes(held).removeprefix(_BOM) if at_start else bytes(held)
            at_start = False
            if (found := line(content)) is not None:
                yield found
            held.clear()
            too_long = False
        offset += len(chunk) - begin
        held += chunk[begin:]
        if len(held) > max_line_bytes:
            too_long = True
            held.clear()
    if held or too_long:
        number += 1
        content = bytes(held).removeprefix(_BOM) if at_start else bytes(held)
        if (found := line(content)) is not None:
            yield found


def read(raw: RawLine, endpoint: str) -> Line | InputError:
    """What a line says, its body not looked into."""
    if raw.content is None:
        return InputError(raw.number, "line_too_long", f"The line has more than {MAX_LINE_BYTES} bytes.")
    try:
        given = parsing.decode(_decoder, raw.content)
    except RequestInvalid as error:
        if not error.violations:
            return InputError(raw.number, "invalid_json_line", "The line is not a JSON object of a request.")
        (named, *_) = error.violations
        code = "missing_required_parameter" if named.description == "is required" else "invalid_parameter"
        return InputError(raw.number, code, f"`{named.field}` {named.description}.", named.field)
    if not 1 <= len(given.custom_id) <= MAX_ID_CHARS:
        text = f"`custom_id` must have 1 to {MAX_ID_CHARS} characters."
        return InputError(raw.number, "invalid_custom_id", text, "custom_id")
    if given.method != "POST":
        return InputError(raw.number, "invalid_method", "`method` must be `POST`.", "method")
    if given.url != endpoint:
        text = f"`url` must be the batch's endpoint, `{endpoint}`."
        return InputError(raw.number, "invalid_url", text, "url")
    return Line(raw.number, given.custom_id, bytes(given.body))


class Check:
    """Goes through a whole input before any of it runs."""

    MAX_ERRORS = 100
    """That are told."""

    def __init__(self, endpoint: str, max_lines: int) -> None:
        self._endpoint = endpoint
        self._max_lines = max_lines
        self._seen: set[str] = set()
        self.lines = 0
        self.errors: list[InputError] = []

    def add(self, raw: RawLine) -> bool:
        """Whether to go on."""
        self.lines += 1
        if self.lines > self._max_lines:
            text = f"A batch may have {self._max_lines} requests."
            self.errors.append(InputError(raw.number, "too_many_requests", text))
            return False
        found = read(raw, self._endpoint)
        if isinstance(found, InputError):
            self.errors.append(found)
        elif found.custom_id in self._seen:
            text = "`custom_id` is used by an earlier line too."
            self.errors.append(InputError(raw.number, "duplicate_custom_id", text, "custom_id"))
        else:
            self._seen.add(found.custom_id)
        return len(self.errors) < self.MAX_ERRORS

    def end(self) -> None:
        """Nothing comes after."""
        if not self.lines:
            self.errors.append(InputError(0, "empty_file", "The file holds no request."))
