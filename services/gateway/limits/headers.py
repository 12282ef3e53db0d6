"""What is left, in the headers of OpenAI's API; the same names and values are gRPC's trailing metadata.

Where several limits of a kind apply, that of which the least is left is shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.limits.limiter import Limit, Standing
from services.mesh.policy import LimitUnit

_KINDS = {
    int(unit): (f"x-ratelimit-limit-{name}", f"x-ratelimit-remaining-{name}", f"x-ratelimit-reset-{name}")
    for unit, name in ((LimitUnit.REQUESTS_PER_MINUTE, "requests"), (LimitUnit.TOKENS_PER_MINUTE, "tokens"))
}


def rate_limit_headers(limits: Sequence[Limit], standings: Sequence[Standing]) -> dict[str, str]:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`; without a limit of a kind, none of its.

    `standings` are of the rates, which come first among the limits; more do not matter.
    """
    tightest: dict[int, tuple[Limit, Standing]] = {}
    for limit, standing in zip(limits, standings, strict=False):
        if not limit.is_rate:
            break
        before = tightest.get(limit.index)
        if before is None or standing.remaining < before[1].remaining:
            tightest[limit.index] = limit, standing
    found: dict[str, str] = {}
    for index, (limit, standing) in tightest.items():
        of_limit, of_remaining, of_reset = _KINDS[index]
        found[of_limit] = str(limit.limit)
        found[of_remaining] = str(standing.remaining)
        found[of_reset] = duration(standing.reset_s)
    return found


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
