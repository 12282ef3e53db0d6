"""Limiters under test: in memory, and in a real Valkey, with limits made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

from services.gateway.limits.limiter import Amounts, Limit, Limiter, Refused, asked
from services.mesh.policy import BudgetPeriod, LimitScope, LimitUnit

_subjects = itertools.count()

RPM, TPM = LimitUnit.REQUESTS_PER_MINUTE, LimitUnit.TOKENS_PER_MINUTE
CONCURRENT, BUDGET, MONEY = LimitUnit.CONCURRENT_REQUESTS, LimitUnit.BUDGET_TOKENS, LimitUnit.BUDGET_MONEY


def limits(**given: int) -> tuple[Limit, ...]:
    """Of a caller whom nobody shares them with: `limits(rpm=60, tokens_a_day=1000)`; rates come first."""
    subject = f"tenant:t{next(_subjects)}"
    kinds = {
        "rpm": (RPM, BudgetPeriod.NONE),
        "tpm": (TPM, BudgetPeriod.NONE),
        "concurrent": (CONCURRENT, BudgetPeriod.NONE),
        "tokens_a_day": (BUDGET, BudgetPeriod.DAY),
        "money_a_month": (MONEY, BudgetPeriod.MONTH),
    }
    return tuple(
        Limit(
            counter=f"{name}:{subject}",
            tenant_id=subject,
            unit=unit,
            scope=LimitScope.TENANT,
            subject=subject,
            limit=given[name],
            period=period,
        )
        for name, (unit, period) in kinds.items()
        if name in given
    )


class Under:
    """A limiter, and time as the limiter sees it."""

    def __init__(self, limiter: Limiter, pass_time: Callable[[float], Awaitable[None]]) -> None:
        self.limiter = limiter
        self.pass_time = pass_time

    async def admits(self, on: tuple[Limit, ...], amounts: Amounts, hold_s: float = 60) -> bool:
        """Whether it lets so much through; it stays reserved."""
        try:
            await self.limiter.reserve(on, amounts, hold_s)
        except Refused:
            return False
        return True

    async def left(self, on: tuple[Limit, ...]) -> list[int]:
        await self.limiter.idle()
        return [stands.remaining for stands in await self.limiter.remaining(on)]

    async def reserved(self, on: tuple[Limit, ...]) -> list[int]:
        await self.limiter.idle()
        return [stands.reserved for stands in await self.limiter.remaining(on)]


ONE = asked(10, 100)
"""A request of 10 tokens and 100 millionths."""
