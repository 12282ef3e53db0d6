"""Reads a body into a type, and names in every error the parameter as the caller wrote it.

Three kinds of fields: those that are understood, those that are tolerated because they change nothing of
the answer, and those that are refused because ignoring them would. What stands in no list is refused too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from services.mesh.errors import RequestInvalid, Violation

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Given = Raw | UnsetType
"""The value of a field that is looked at only where it is given."""
Harmless = Mapping[str, tuple[Any, ...]]
"""What is not offered, with the values that ask for nothing and pass."""

_MAX_NAME_CHARS = 128
_AT = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`", re.DOTALL)


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream brings beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Given = UNSET
    """Tolerated: padding against a listener who counts bytes."""


class Sampled(Struct, kw_only=True, forbid_unknown_fields=True):
    """What all requests have in common. Not OpenAI's: top_k, min_p, repetition_penalty, ignore_eos,
    stop_token_ids, and with some routes others that the engine has."""

    model: str
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[U32, float] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None

    top_k: U32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[U32] | None = None

    def parameter(self, field: str) -> str:
        """The name of a field of the message (`spec.…`) as this caller wrote it."""
        for ours, theirs in _RENAMED:
            if field.startswith(ours):
                return theirs + field.removeprefix(ours)
        return field


_RENAMED = (
    ("spec.prompt.chat.messages", "messages"),
    ("spec.prompt.chat", "messages"),
    ("spec.prompt.text", "prompt"),
    ("spec.sampling.", ""),
    ("spec.end_user", "user"),
    ("spec.labels", "metadata"),
    ("spec.", ""),
)

Body = TypeVar("Body", bound=Struct)


def decode(decoder: msgspec.json.Decoder[Body], body: bytes) -> Body:
    """Raises RequestInvalid."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestInvalid(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise RequestInvalid("The body is nested too deeply.") from None


def refuse(field: str, description: str) -> RequestInvalid:
    """The error for one parameter."""
    return RequestInvalid(f"`{field}` {description}.", violations=[Violation(field, description)])


class Unoffered:
    """Fields that are not offered, each with the values that ask for nothing and pass."""

    def __init__(self, harmless: Harmless) -> None:
        self._harmless = harmless
        self._values = attrgetter(*harmless)
        self._none = (UNSET,) * len(harmless)

    def asked(self, given: Struct, path: str = "") -> Sequence[str]:
        """Those that ask for something."""
        values: tuple[Given, ...] = self._values(given)
        if values == self._none:  # as of nearly all
            return ()
        fields = zip(values, self._harmless.items(), strict=True)
        return [path + name for value, (name, harmless) in fields if asks(value, harmless)]


def asks(given: Given, harmless: tuple[Any, ...]) -> bool:
    """Whether a value that stands for something that is not offered asks for it."""
    if isinstance(given, UnsetType):
        return False
    try:
        value = msgspec.json.decode(given)
    except (msgspec.DecodeError, RecursionError):
        return True
    return value is not None and not any(value == each and type(value) is type(each) for each in harmless)


def check_stream_options(stream: bool | None, options: StreamOptions | None) -> None:
    """Raises RequestInvalid."""
    if options is not None and not stream:
        raise refuse("stream_options", "is only allowed when stream is true")


def _invalid(text: str) -> RequestInvalid:
    """Turns `Expected `int`, got `str` - at `$.messages[0].role`` into an error that names the parameter."""
    found = _AT.search(text)
    path = found.group(1) if found else ""
    said = text[: found.start()] if found else text
    if named := _UNKNOWN.match(said) or _MISSING.match(said):
        path = f"{path}.{named.group(1)}" if path else named.group(1)
        said = "is not a known parameter" if said.startswith("Object contains") else "is required"
    else:
        said = said[:1].lower() + said[1:]
    path = path[:_MAX_NAME_CHARS]
    if not path:
        return RequestInvalid(f"The body is invalid: {said}.")
    return refuse(path, said)
