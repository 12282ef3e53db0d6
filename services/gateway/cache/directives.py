"""What a request says in `cache-control`, on both edges: the words of HTTP (RFC 9111, 5.2.1) that have a
meaning here. Others mean nothing to an exact cache and are passed over."""

from __future__ import annotations

from dataclasses import dataclass

MAX_AGE_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Directives:
    """What the caller asks of the cache."""

    no_cache: bool = False
    """A new answer, which is kept for others."""
    no_store: bool = False
    """A new answer, which is not kept."""
    only_if_cached: bool = False
    """A kept answer or none."""
    max_age_s: int | None = None
    """A kept answer that is no older."""


NONE = Directives()


def parse(text: str) -> Directives:
    """An age that cannot be read is the strictest one, as RFC 9111 (4.2.1) would have it."""
    if not text:
        return NONE
    names: dict[str, str] = {}
    for part in text.lower().split(","):
        name, _, value = part.strip().partition("=")
        names[name.strip()] = value.strip().strip('"')
    max_age_s = None
    if "max-age" in names:
        value = names["max-age"]
        readable = value.isascii() and value.isdecimal()
        max_age_s = int(value[:MAX_AGE_DIGITS]) if readable else 0
    return Directives("no-cache" in names, "no-store" in names, "only-if-cached" in names, max_age_s)
