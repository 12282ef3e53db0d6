"""The arithmetic of limits. `value` is what a bucket holds, for a rate, and what was used, for a sum.

The script that Redis runs does the same in Lua; one contract suite keeps them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.limits.limiter import MINUTE_S, Limit, Refused, Standing
from services.mesh.policy import LimitUnit

CONCURRENCY_WAIT_S = 1.0
"""When to try again where too many requests run: nobody knows when one ends."""


@dataclass(slots=True, eq=False)
class Counter:
    """What is counted for a limit."""

    value: float
    """What a bucket held `at_s`; of a sum, what was used."""
    at_s: float
    reserved: int = 0

    def refill(self, limit: Limit, now_s: float) -> None:
        """What has flowed into a bucket since."""
        self.value = min(limit.limit, self.value + (now_s - self.at_s) * limit.limit / MINUTE_S)
        self.at_s = now_s

    def end(self, limit: Limit, now_s: float, taken: int, amount: int) -> None:
        """Of what was `taken`, the amount was used."""
        self.reserved -= taken
        if not limit.is_rate:
            self.value += amount
        elif taken != amount:
            self.refill(limit, now_s)
            self.value = min(limit.limit, self.value + taken - amount)


def fits(limit: Limit, value: float, reserved: int, amount: int) -> bool:
    """Whether so much may be taken."""
    return value >= amount if limit.is_rate else value + reserved + amount <= limit.limit


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
