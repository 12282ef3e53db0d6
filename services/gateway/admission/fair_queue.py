"""A queue that is fair between tenants: deficit round robin, by tokens.

The tenants that wait stand in a circle. Whose turn comes gets a quantum of tokens to spend, and sends
requests while it has any left; what the last one costs beyond that is a debt, which later turns pay first.
(Shreedhar and Varghese save first and send then. In debt, somebody who rarely asks is served at its first
turn, however much it asks for.) Who has nothing left to send leaves, without savings or debts. Two tenants
that both wait all the time so get the same work, within a quantum and a request, however many requests one of
them sends. A request's place in its own tenant's line is that of its arrival.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from services.gateway.admission.claim import Claim


class Waiting(Protocol):
    """What can stand in line."""

    @property
    def claim(self) -> Claim:
        """For whom, and at what cost."""


E = TypeVar("E", bound=Waiting)


@dataclass(slots=True)
class _Line(Generic[E]):
    """One tenant's requests, oldest first."""

    waiting: OrderedDict[int, E] = field(default_factory=OrderedDict)
    """By identity, so that one in the middle leaves at once."""
    left_tokens: int = 0

    @property
    def first(self) -> E:
        return next(iter(self.waiting.values()))

    @property
    def debt_tokens(self) -> int:
        """What it has to get before it may send: something must be left to spend."""
        return 1 - self.left_tokens


class FairQueue(Generic[E]):
    """Bounded by whoever puts something in."""

    def __init__(self, quantum_tokens: int) -> None:
        self._quantum_tokens = quantum_tokens
        self._lines: dict[str, _Line[E]] = {}
        self._circle: deque[str] = deque()
        """The tenants that wait; the turn is the first one's."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def length_of(self, tenant_id: str) -> int:
        """How many requests of the tenant wait."""
        line = self._lines.get(tenant_id)
        return len(line.waiting) if line else 0

    def ahead_of(self, tenant_id: str) -> int:
        """How many requests would be sent before a new one of the tenant, were they all of one size."""
        own = self.length_of(tenant_id)
        return sum(min(len(line.waiting), own + 1) for line in self._lines.values())

    def push(self, entry: E) -> None:
        """Adds the entry at the end of its tenant's line."""
        tenant_id = entry.claim.tenant_id
        line = self._lines.get(tenant_id)
        if line is None:
            line = self._lines[tenant_id] = _Line()
            self._circle.append(tenant_id)
            if len(self._circle) == 1:
                line.left_tokens = self._quantum_tokens
        line.waiting[id(entry)] = entry
        self._length += 1

    def head(self) -> E | None:
        """The entry whose turn it is. Stays the same until it leaves, also when others come."""
        if not self._circle:
            return None
        # Where all are in debt for several rounds, the rounds are counted, not walked.
        debt = min(line.debt_tokens for line in self._lines.values())
        rounds = max(-(-debt // self._quantum_tokens) - 1, 0)
        for line in self._lines.values():
            line.left_tokens += rounds * self._quantum_tokens
        while (line := self._lines[self._circle[0]]).debt_tokens > 0:
            self._circle.rotate(-1)
            self._lines[self._circle[0]].left_tokens += self._quantum_tokens
        return line.first

    def pop(self) -> E:
        """Takes `head` out, at its tenant's cost."""
        entry = self.head()
        if entry is None:
            raise IndexError("nobody waits")
        self._lines[entry.claim.tenant_id].left_tokens -= entry.claim.tokens
        self.remove(entry)
        return entry

    def remove(self, entry: E) -> None:
        """Takes an entry out from wherever it stands, at no cost."""
        tenant_id = entry.claim.tenant_id
        line = self._lines[tenant_id]
        del line.waiting[id(entry)]
        self._length -= 1
        if line.waiting:
            return
        del self._lines[tenant_id]
        its_turn = self._circle[0] == tenant_id
        self._circle.remove(tenant_id)
        if its_turn and self._circle:
            self._lines[self._circle[0]].left_tokens += self._quantum_tokens

    def newest_of_longest(self, longer_than: int) -> E | None:
        """The newest entry of the tenant with the most entries, if they are more than `longer_than`."""
        line = max(self._lines.values(), key=lambda line: len(line.waiting), default=None)
        if line is None or len(line.waiting) <= longer_than:
            return None
        return next(reversed(line.waiting.values()))
