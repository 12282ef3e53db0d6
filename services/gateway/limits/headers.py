"""What is left, in the headers of OpenAI's API; the same names and values are gRPC's trailing metadata.

Where several limits of a kind apply, that of which the least is left is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.gateway.limits.limiter import Limit, Standing
from services.mesh.policy import LimitUnit

_NAMES = {LimitUnit.REQUESTS_PER_MINUTE: "requests", LimitUnit.TOKENS_PER_MINUTE: "tokens"}


def rate_limit_headers(limits: Sequence[Limit], standings: Iterable[Standing]) -> tuple[tuple[str, str], ...]:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`; without a limit of a kind, none of its."""
    tightest: dict[str, tuple[Limit, Standing]] = {}
    for limit, standing in zip(limits, standings, strict=True):
        kind = _NAMES.get(limit.unit)
        if kind is not None and (kind not in tightest or standing.remaining < tightest[kind][1].remaining):
            tightest[kind] = limit, standing
    found: list[tuple[str, str]] = []
    for kind, (limit, standing) in tightest.items():
        found.append((f"x-ratelimit-limit-{kind}", str(limit.limit)))
        found.append((f"x-ratelimit-remaining-{kind}", str(standing.remaining)))
        found.append((f"x-ratelimit-reset-{kind}", duration(standing.reset_s)))
    return tuple(found)


def duration(seconds: float) -> str:
    """As OpenAI writes it: `0s`, `120ms`, `1s`, `8.64s`, `6m0s`, `1h0m0s`."""
    ms = round(seconds * 1000)
    if ms <= 0:
        return "0s"
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    rest = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}"
    return f"{minutes}m{rest}" if minutes else rest
