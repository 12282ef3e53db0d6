"""One model's places: how many are taken, who waits for one, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from services.gateway.admission.claim import Claim
from services.gateway.admission.fair_queue import E, FairQueue
from services.gateway.generation import Priority

QUANTUM_TOKENS = 16
"""What a tenant may spend at its turn: less than almost any request, so that a turn is one."""
WEIGHT_OF_NEWEST = 0.125
"""In the moving means: the last twenty values or so count."""


@dataclass(slots=True)
class MovingMean:
    """An exponentially weighted mean; 0 before the first value."""

    value: float = 0.0
    _empty: bool = True

    def add(self, newest: float) -> None:
        self.value = newest if self._empty else self.value + WEIGHT_OF_NEWEST * (newest - self.value)
        self._empty = False


class Pool(Generic[E]):
    """Interactive requests go before batch; batch that has waited for `batch_ageing_s` since it was last
    served gets one turn all the same."""

    def __init__(self, *, batch_ageing_s: float, quantum_tokens: int = QUANTUM_TOKENS) -> None:
        self._batch_ageing_s = batch_ageing_s
        self._interactive: FairQueue[E] = FairQueue(quantum_tokens)
        self._batch: FairQueue[E] = FairQueue(quantum_tokens)
        self._batch_served_s = 0.0
        self.taken = 0
        """Places of those at work."""
        self.taken_by_batch = 0
        """Those of them that batch has."""
        self.first_token_s = MovingMean()
        """From a place to the first token."""
        self.place_s = MovingMean()
        """How long a request holds its places, times their number."""

    @property
    def waiting(self) -> int:
        return len(self._interactive) + len(self._batch)

    def goes_first(self, claim: Claim) -> bool:
        """Whether nobody waits whom a newcomer would pass by. Batch that waits although there is a place has
        no more of its own share, or else it would have it."""
        return not self._interactive if claim.priority is Priority.INTERACTIVE else not self.waiting

    def push(self, entry: E, now_s: float) -> None:
        if entry.claim.priority is Priority.BATCH and not self._batch:
            self._batch_served_s = now_s
        self._queue(entry.claim).push(entry)

    def head(self, now_s: float, batch_may: Callable[[Claim], bool] = lambda _: True) -> E | None:
        """Whose turn it is. Batch whose next one may not begin, however many places there are, lets the
        others pass."""
        batch_is_due = now_s - self._batch_served_s >= self._batch_ageing_s
        if self._batch and (batch_is_due or not self._interactive):
            head = self._batch.head()
            if not self._interactive or (head is not None and batch_may(head.claim)):
                return head
        return self._interactive.head()

    def pop(self, entry: E, now_s: float) -> None:
        """Takes out the head."""
        self._queue(entry.claim).pop()
        if entry.claim.priority is Priority.BATCH:
            self._batch_served_s = now_s

    def remove(self, entry: E) -> None:
        """Takes out one that waits no more."""
        self._queue(entry.claim).remove(entry)

    def length_of(self, tenant_id: str) -> int:
        return self._interactive.length_of(tenant_id) + self._batch.length_of(tenant_id)

    def displaced_by(self, claim: Claim) -> E | None:
        """Who gives way to a newcomer where the queue is full: the last one of batch, where the newcomer is
        not, else of the tenant that has the most waiting, where that is more than the newcomer would have."""
        if claim.priority is Priority.INTERACTIVE and self._batch:
            return self._batch.newest_of_longest(0)
        queue = self._queue(claim)
        return queue.newest_of_longest(queue.length_of(claim.tenant_id) + 1)

    def expected_wait_s(self, claim: Claim, capacity: int) -> float:
        """How long a newcomer would wait, by what was measured."""
        ahead = self._queue(claim).ahead_of(claim.tenant_id)
        if claim.priority is Priority.BATCH:
            ahead += len(self._interactive)
        return (ahead + 1) * self.place_s.value / capacity

    def _queue(self, claim: Claim) -> FairQueue[E]:
        return self._batch if claim.priority is Priority.BATCH else self._interactive
