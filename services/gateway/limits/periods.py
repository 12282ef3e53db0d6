"""When budgets are renewed: at midnight and on the first of the month, UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from services.mesh.clock import Clock
from services.mesh.policy import BudgetPeriod


class Periods:
    """Which day and which month it is. Both are worked out when they begin, not for each request."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._names = {BudgetPeriod.NONE: "", BudgetPeriod.DAY: "", BudgetPeriod.MONTH: ""}
        self._from = self._until = datetime.min.replace(tzinfo=UTC)
        self._ends = {BudgetPeriod.DAY: self._until, BudgetPeriod.MONTH: self._until}

    def name(self, period: BudgetPeriod) -> str:
        """Of the present one, such as `:2026-11-22`."""
        self._look()
        return self._names[period]

    def left_s(self, period: BudgetPeriod) -> float:
        """Until it ends."""
        return (self._ends[period] - self._look()).total_seconds()

    def _look(self) -> datetime:
        now = self._clock.now()
        if not self._from <= now < self._until:
            today = now.replace(hour=0, minute=0, second=0, microsecond=0)
            self._from, self._until = today, today + timedelta(days=1)
            next_month = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
            self._ends = {BudgetPeriod.DAY: self._until, BudgetPeriod.MONTH: next_month}
            self._names[BudgetPeriod.DAY] = f":{today:%Y-%m-%d}"
            self._names[BudgetPeriod.MONTH] = f":{today:%Y-%m}"
        return now
