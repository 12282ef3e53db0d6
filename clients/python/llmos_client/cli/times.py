"""Times as arguments: a moment, an age, or a while from now."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import typer

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def ago(option: str, text: str | None) -> datetime | None:
    """A time (ISO 8601), or an age such as `10m`."""
    if text is None:
        return None
    span = _span(text)
    return _moment(option, text, "an age") if span is None else datetime.now(UTC) - span


def ahead(option: str, text: str | None) -> datetime | None:
    """A time (ISO 8601), or a while from now such as `10m`."""
    if text is None:
        return None
    span = _span(text)
    return _moment(option, text, "a while") if span is None else datetime.now(UTC) + span


def shown(moment: datetime | None) -> str:
    """To the millisecond, in UTC."""
    if moment is None:
        return "-"
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def _span(text: str) -> timedelta | None:
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    return timedelta(seconds=int(found[1]) * _SECONDS[found[2]]) if found else None


def _moment(option: str, text: str, otherwise: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a time such as 2026-11-22T05:03:00Z nor {otherwise} such as 10m",
            param_hint=option,
        ) from None
    return moment if moment.tzinfo else moment.astimezone()
