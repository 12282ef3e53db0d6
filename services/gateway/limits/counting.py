"""The arithmetic of limits. `value` is what a bucket holds, for a rate, and what was used, for a sum.

The script that Redis runs does the same in Lua; one contract suite keeps them so.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.limits.limiter import MINUTE_S, Limit, Refused, Standing
from services.mesh.policy import LimitUnit

CONCURRENCY_WAIT_S = 1.0
"""When to try again where too many requests run: nobody knows when one ends."""


def fits(limit: Limit, value: float, reserved: int, amount: int) -> bool:
    """Whether so much may be taken."""
    return value >= amount if limit.is_rate else value + reserved + amount <= limit.limit


def refilled(limit: Limit, value: float, elapsed_s: float) -> float:
    """What a bucket holds after a time."""
    return min(float(limit.limit), value + elapsed_s * limit.limit / MINUTE_S)


def settled(limit: Limit, value: float, taken: int, amount: int) -> float:
    """The value when `taken` was reserved, and `amount` was used."""
    return min(float(limit.limit), value + taken - amount) if limit.is_rate else value + amount


def standing(limit: Limit, value: float, reserved: int, left_s: float) -> Standing:
    """How a limit stands; `left_s` is what is left of a budget's period."""
    if limit.is_rate:
        missing = limit.limit - value
        reset_s = missing * MINUTE_S / limit.limit if missing > 0 and limit.limit else 0.0
        return Standing(max(0, int(value)), reset_s, reserved)
    left = max(0, limit.limit - int(value) - reserved)
    whole = not limit.is_budget or left == limit.limit
    return Standing(left, 0.0 if whole else left_s, reserved)


def refusal(
    limits: Sequence[Limit],
    values: Sequence[float],
    amounts: Sequence[int],
    lefts_s: Sequence[float],
    standings: Sequence[Standing],
) -> Refused:
    """Of the limits that do not allow it, the one that has to be waited for longest."""
    longest: tuple[float, Limit, int] | None = None
    for limit, value, amount, left_s, stands in zip(limits, values, amounts, lefts_s, standings, strict=True):
        if not fits(limit, value, stands.reserved, amount):
            wait_s = _wait_s(limit, value, amount, left_s)
            if longest is None or wait_s > longest[0]:
                longest = wait_s, limit, stands.remaining
    if longest is None:
        raise ValueError("nothing refuses it")
    wait_s, limit, remaining = longest
    return Refused(limit, remaining, None if wait_s == float("inf") else wait_s, standings)


def _wait_s(limit: Limit, value: float, amount: int, left_s: float) -> float:
    if amount > limit.limit:
        return float("inf")
    if limit.is_rate:
        return (amount - value) * MINUTE_S / limit.limit
    return CONCURRENCY_WAIT_S if limit.unit is LimitUnit.CONCURRENT_REQUESTS else left_s
