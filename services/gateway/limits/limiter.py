"""The port of the limiter, and its types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct

from services.mesh.policy import BUDGETS, BudgetPeriod, LimitScope, LimitUnit

RATES = frozenset({LimitUnit.REQUESTS_PER_MINUTE, LimitUnit.TOKENS_PER_MINUTE})
"""Token buckets: they hold what is allowed in a minute, and fill at that rate. All others are sums of what is
reserved and what was used."""
MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit, as it is for one caller."""

    counter: str
    """What is counted together: unit, scope, whom it is for, model and period, but not how much there is, so
    that a plan that changes forgets nothing."""
    tenant_id: str
    unit: LimitUnit
    scope: LimitScope
    subject: str
    """Whom it is for, such as `tenant:acme`."""
    limit: int
    model: str = ""
    period: BudgetPeriod = BudgetPeriod.NONE
    is_rate: bool = field(init=False)
    is_budget: bool = field(init=False)
    """Has a period."""
    index: int = field(init=False)
    """Into `Amounts`."""

    def __post_init__(self) -> None:
        # asked for several times in each request, where an enum's hash is a good part of the time
        object.__setattr__(self, "is_rate", self.unit in RATES)
        object.__setattr__(self, "is_budget", self.unit in BUDGETS)
        object.__setattr__(self, "index", int(self.unit))


Amounts = tuple[int, int, int, int, int, int]
"""What one request takes of limits, by unit, `amounts[limit.index]`: nothing, requests, tokens, requests that
run, and tokens and money of budgets."""


def asked(tokens: int, money: int) -> Amounts:
    """What is reserved for a request."""
    return 0, 1, tokens, 1, tokens, money


def used(tokens: int, money: int) -> Amounts:
    """What a request has used, at its end."""
    return 0, 1, tokens, 0, tokens, money


NOTHING: Amounts = (0, 0, 0, 0, 0, 0)
"""What is used by a request for which no work began."""


class Standing(Struct, frozen=True):
    """How a limit stands."""

    remaining: int
    reset_s: float
    """Until it is whole again: a bucket is full, a budget's period is over. 0: it is whole now, or it counts
    what runs at the same time."""
    reserved: int = 0
    """Of what is gone, what is held for requests that have not ended."""


class Hold(Struct, eq=False):
    """What is reserved for one request, until it is settled or expires."""

    hold_id: int
    limits: Sequence[Limit]
    amounts: Amounts
    standings: Sequence[Standing]
    """Of the rates, which come first among the limits, after the reservation."""
    settled: bool = False


class Refused(Exception):
    """A limit does not allow it; nothing was reserved."""

    def __init__(
        self, limit: Limit, remaining: int, wait_s: float | None, standings: Sequence[Standing]
    ) -> None:
        """`wait_s`: when it may be allowed; None where it never is. `standings`: of each limit."""
        super().__init__(limit.counter)
        self.limit = limit
        self.remaining = remaining
        """Of that limit."""
        self.wait_s = wait_s
        self.standings = standings


class Limiter(Protocol):
    """Counts. Raises nothing but `Refused`."""

    async def reserve(self, limits: Sequence[Limit], amounts: Amounts, hold_s: float) -> Hold:
        """Takes the amounts of all limits, or raises Refused and takes nothing. What is not settled within
        `hold_s` is given back."""

    def correct(self, hold: Hold, amounts: Amounts) -> None:
        """Makes the reservation what it should have been; it may go beyond a limit."""

    def settle(self, hold: Hold, amounts: Amounts) -> None:
        """Ends the reservation: the amounts were used, the rest is given back. Repeating it changes nothing.
        It may be done a moment later (`idle`)."""

    async def remaining(self, limits: Sequence[Limit]) -> list[Standing]:
        """How they stand, without taking anything."""

    async def idle(self) -> None:
        """Returns when all that was corrected and settled is done."""
