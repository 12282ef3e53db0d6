"""Files with one job a line: a JSON object, or the prompt as plain text.

A JSON object has `prompt` or `messages` (each with `role` and `content`), and any of the options below by
their names in the Python client. It begins with `{`; every other line is a prompt. Empty lines are passed
over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from llmos_client.generation_types import Message, Role
from llmos_client.job_calls import MAX_JOBS
from llmos_client.job_options import NewJob, SubmitOptions
from llmos_client.job_types import JobPriority

MAX_LINE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Line:
    """A line, read: a job, or what is wrong with it."""

    number: int
    """From 1."""
    job: NewJob | None
    fault: str = ""


def read(lines: Iterable[bytes]) -> list[Line]:
    """Each line that is not empty; at most one more than a call takes, so that whoever asks can see it."""
    found: list[Line] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(Line(number, _job(line)))
        except (ValueError, RecursionError) as error:
            found.append(Line(number, None, str(error) or "it is nested too deeply"))
        if len(found) > MAX_JOBS:
            break
    return found


def _job(line: bytes) -> NewJob:
    """Raises ValueError with what is wrong."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"it is longer than {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8") from None
    if not text.startswith("{"):
        return NewJob(text)
    try:
        fields = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} at character {error.pos + 1}") from None
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError("it needs either `prompt` or `messages`")
    if "prompt" in fields:
        work: str | list[Message] = _text("prompt", fields.pop("prompt"))
    else:
        work = _messages(fields.pop("messages"))
    options = {name: _option(name, value) for name, value in fields.items()}
    return NewJob(work, **cast(SubmitOptions, options))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field comes twice")
    return found


def _option(name: str, value: Any) -> Any:
    reader = _OPTIONS.get(name)
    if reader is None:
        raise ValueError(f"`{name}` is none of prompt, messages, {', '.join(_OPTIONS)}")
    return reader(name, value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{name}` must be a text")
    return value


def _whole(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    raise ValueError(f"`{name}` must be a whole number")


def _number(name: str, value: Any) -> float:
    if type(value) in (int, float):
        return float(value)
    raise ValueError(f"`{name}` must be a number")


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        value = [value]
    return [_text(name, one) for one in value]


def _labels(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ValueError(f"`{name}` must be an object of texts")
    return value


def _time(name: str, value: Any) -> datetime:
    try:
        moment = datetime.fromisoformat(_text(name, value))
    except ValueError:
        raise ValueError(f"`{name}` must be a time such as 2026-11-22T05:03:00Z") from None
    return moment if moment.tzinfo else moment.astimezone()


def _priority(name: str, value: Any) -> JobPriority:
    try:
        return JobPriority(value)
    except ValueError:
        raise ValueError(f"`{name}` must be one of {', '.join(JobPriority)}") from None


def _messages(value: Any) -> list[Message]:
    roles = ("system", "user", "assistant")
    if not isinstance(value, list) or not value:
        raise ValueError("`messages` must be a list of objects with `role` and `content`")
    for one in value:
        if not isinstance(one, dict) or one.keys() != {"role", "content"} or one["role"] not in roles:
            raise ValueError(f"each of `messages` needs `role`, one of {', '.join(roles)}, and `content`")
    return [Message(cast(Role, one["role"]), _text("content", one["content"])) for one in value]


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "system": _text,
    "max_tokens": _whole,
    "temperature": _number,
    "top_p": _number,
    "top_k": _whole,
    "seed": _whole,
    "stop": _texts,
    "n": _whole,
    "end_user": _text,
    "labels": _labels,
    "idempotency_key": _text,
    "not_before": _time,
    "max_attempts": _whole,
    "give_up_after_s": _number,
    "priority": _priority,
    "result_ttl_s": _number,
}
