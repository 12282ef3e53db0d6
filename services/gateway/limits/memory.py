"""The limiter in this process. It also serves several gateways that have lost what they share: then each
counts what it takes `weight` times, as if all took the same, so that together they keep within the limits."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from msgspec import field

from services.gateway.limits import counting
from services.gateway.limits.counting import Counter
from services.gateway.limits.limiter import Amounts, Hold, Limit, Refused, Standing
from services.gateway.limits.periods import Periods
from services.mesh.clock import Clock

MAX_COUNTERS = 65_536
"""Callers whose limits are counted. Beyond, those that were not used for longest begin anew."""
SWEEP_S = 1.0
"""How often it looks for reservations that have expired."""


class _MemoryHold(Hold, eq=False):
    counters: list[Counter] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    expires_s: float = 0.0


class MemoryLimiter:
    """A `Limiter` that waits for nothing."""

    def __init__(self, clock: Clock, *, weight: int = 1, max_counters: int = MAX_COUNTERS) -> None:
        self._clock = clock
        self._weight = weight
        self._max_counters = max_counters
        self._periods = Periods(clock)
        self._counters: OrderedDict[str, Counter] = OrderedDict()
        self._held: dict[int, _MemoryHold] = {}
        """Bounded by the requests that run."""
        self._ids = itertools.count(1)
        self._sweep_at_s = 0.0

    async def reserve(self, limits: Sequence[Limit], amounts: Amounts, hold_s: float) -> Hold:
        return self.take(limits, amounts, hold_s)

    def take(self, limits: Sequence[Limit], amounts: Amounts, hold_s: float, *, force: bool = False) -> Hold:
        """As `reserve`; `force` takes without asking."""
        now_s = self._clock.monotonic()
        if now_s >= self._sweep_at_s:
            self._sweep(now_s)
        counters: list[Counter] = []
        taken = self._taken(limits, amounts)
        fits = True
        for limit, amount in zip(limits, taken, strict=True):
            counter = self._counter(limit, now_s)
            counters.append(counter)
            fits = fits and counting.fits(limit, counter.value, counter.reserved, amount)
        if not (fits or force):
            raise self._refusal(limits, counters, taken)
        standings: list[Standing] = []
        for limit, counter, amount in zip(limits, counters, taken, strict=True):
            counter.reserved += amount
            if limit.is_rate:
                counter.value -= amount
                standings.append(counting.standing(limit, counter.value, counter.reserved, 0.0))
        hold = _MemoryHold(
            next(self._ids), limits, amounts, standings, False, counters, taken, now_s + hold_s
        )
        self._held[hold.hold_id] = hold
        return hold

    def correct(self, hold: Hold, amounts: Amounts) -> None:
        held = self._held.get(hold.hold_id)
        if held is None:
            return
        taken = self._taken(held.limits, amounts)
        for limit, counter, before, after in zip(held.limits, held.counters, held.taken, taken, strict=True):
            more = after - before
            if more:
                counter.reserved += more
                if limit.is_rate:
                    counter.value -= more
        held.amounts, held.taken = amounts, taken

    def settle(self, hold: Hold, amounts: Amounts) -> None:
        if hold.settled or not isinstance(hold, _MemoryHold):
            return
        hold.settled = True
        self._held.pop(hold.hold_id, None)
        now_s = self._clock.monotonic()
        used = self._taken(hold.limits, amounts)
        for limit, counter, taken, amount in zip(hold.limits, hold.counters, hold.taken, used, strict=True):
            counter.end(limit, now_s, taken, amount)

    async def remaining(self, limits: Sequence[Limit]) -> list[Standing]:
        return self.standings(limits)

    def standings(self, limits: Sequence[Limit]) -> list[Standing]:
        """As `remaining`."""
        now_s = self._clock.monotonic()
        self._sweep(now_s)
        return [self._standing(limit, self._counter(limit, now_s)) for limit in limits]

    async def idle(self) -> None:
        """Nothing is ever left to do."""

    def observe(self, limit: Limit, value: float) -> None:
        """Elsewhere, the limit's value is this."""
        self._counter(limit, self._clock.monotonic()).value = value

    def value(self, limit: Limit) -> float:
        """The limit's value here."""
        return self._counter(limit, self._clock.monotonic()).value

    def name(self, limit: Limit) -> str:
        """What the limit's counter is called, in this period."""
        if not limit.is_budget:
            return limit.counter
        return limit.counter + self._periods.name(limit.period)

    def left_s(self, limit: Limit) -> float:
        """What is left of a budget's period; 0 for what has none."""
        return 0.0 if not limit.is_budget else self._periods.left_s(limit.period)

    def _taken(self, limits: Sequence[Limit], amounts: Amounts) -> list[int]:
        if self._weight == 1:
            return [amounts[limit.index] for limit in limits]
        return [self._weighted(limit, amounts[limit.index]) for limit in limits]

    def _weighted(self, limit: Limit, amount: int) -> int:
        """At least one request of a limit goes through, however many gateways there are."""
        return max(amount, min(amount * self._weight, limit.limit))

    def _counter(self, limit: Limit, now_s: float) -> Counter:
        """With what has flowed in meanwhile."""
        name = self.name(limit) if limit.is_budget else limit.counter
        counter = self._counters.get(name)
        if counter is None:
            counter = self._counters[name] = Counter(float(limit.limit) if limit.is_rate else 0.0, now_s)
            self._make_room()
        else:
            self._counters.move_to_end(name)
            if limit.is_rate:
                counter.refill(limit, now_s)
        return counter

    def _make_room(self) -> None:
        """Drops what was not used for longest, and holds nothing."""
        for name in tuple(itertools.islice(self._counters, 16)):
            if len(self._counters) <= self._max_counters:
                return
            if not self._counters[name].reserved:
                del self._counters[name]

    def _sweep(self, now_s: float) -> None:
        """Gives back what has expired."""
        self._sweep_at_s = now_s + SWEEP_S
        for hold in [hold for hold in self._held.values() if hold.expires_s <= now_s]:
            del self._held[hold.hold_id]
            for index, (limit, counter) in enumerate(zip(hold.limits, hold.counters, strict=True)):
                counter.end(limit, now_s, hold.taken[index], 0)
                hold.taken[index] = 0

    def _standing(self, limit: Limit, counter: Counter) -> Standing:
        return counting.standing(limit, counter.value, counter.reserved, self.left_s(limit))

    def _refusal(self, limits: Sequence[Limit], counters: Sequence[Counter], taken: Sequence[int]) -> Refused:
        values = [counter.value for counter in counters]
        standings = [self._standing(*each) for each in zip(limits, counters, strict=True)]
        return counting.refusal(limits, values, taken, [self.left_s(limit) for limit in limits], standings)
