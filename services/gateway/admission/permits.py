"""Permits to be at work: given at once where there is room, else after a short wait, or not at all.

What is a limit refuses at once (`ConcurrencyLimit`); what is capacity makes wait, and refuses with
`Overloaded` who would wait too long: those whom the queue has no room for, and those whose deadline would
pass before their first token. Nobody waits for something that is already too late, and nothing of that kind
is begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Protocol

from services.gateway.admission.claim import Claim
from services.gateway.admission.pool import Pool
from services.gateway.admission.share import Share
from services.gateway.generation import Priority
from services.mesh.clock import Clock
from services.mesh.errors import ConcurrencyLimit, DeadlineExceeded, LlmosError, Overloaded

RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0
WAIT_SAFETY = 1.5
"""Waits vary about the mean that they are foreseen by, and a refusal is of use at once, not after a wait: who
is let into the queue should hardly ever leave it in vain."""
TOO_LATE = "The answer could not begin before your deadline."


class Reason(Enum):
    """Why a request was refused."""

    CONCURRENCY = "concurrency"
    SHARE = "share"
    QUEUE_FULL = "queue_full"
    DISPLACED = "displaced"
    WAIT = "wait"
    DEADLINE = "deadline"


class Observer(Protocol):
    """Is told what happens to those who do not get a permit at once."""

    def queued(self, priority: Priority, change: int) -> None:
        """So many more wait."""

    def waited(self, priority: Priority, wait_s: float) -> None:
        """One that waited got its permit."""

    def refused(self, priority: Priority, reason: Reason) -> None:
        """One was refused, at once or after a wait."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The deployment's own. `settings.GatewaySettings` explains each."""

    max_generations: int = 512
    max_queued: int = 256
    max_queued_per_tenant: int = 128
    max_queue_wait_s: float = 10.0
    tenant_share: float = 1.0
    key_share: float = 1.0
    batch_ageing_s: float = 5.0
    batch_share: float = 0.875
    batch_alone_after_s: float = 60.0
    gateways: int = 1
    """That send work to the same replicas: each gives batch its part of the share."""


@dataclass(frozen=True, slots=True)
class BatchRoom:
    """Places for batch, over several models."""

    places: int = 0
    """That batch may have."""
    free: int = 0
    """Those of them that somebody of batch would be given now."""
    ending_per_s: float = 0.0
    """How many of them come free in a second while all are taken, by what requests took lately."""


class _State(Enum):
    NEW = 0
    WAITING = 1
    AT_WORK = 2
    ENDED = 3


class Permit:
    """Held inside `async with`, whatever ends the block."""

    __slots__ = ("_admission", "begun_s", "claim", "error", "granted", "pool", "state", "waited_s")

    def __init__(self, admission: Admission, claim: Claim) -> None:
        self._admission = admission
        self.claim = claim
        self.waited_s = 0.0
        self.state = _State.NEW
        self.begun_s = 0.0
        """Since when it waits, then since when it is at work."""
        self.pool: Pool[Permit]
        """Set on entering."""
        self.granted: asyncio.Future[None] | None = None
        self.error: LlmosError | None = None

    async def __aenter__(self) -> Permit:
        if not self._admission.enter(self):
            await self._admission.wait(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.leave(self)

    def first_token(self, arrived_s: float) -> None:
        """The first token came then, on the monotonic clock: how long that took is what later requests are
        judged by."""
        self.pool.first_token_s.add(arrived_s - self.begun_s)


class Admission:
    """Gives permits. `capacity` says how many places a model has at present, over all its replicas; None
    where nothing is known of it: then nobody waits, and routing says what is wrong."""

    def __init__(
        self,
        limits: AdmissionLimits,
        capacity: Callable[[str], int | None],
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._limits = limits
        self._capacity = capacity
        self._clock = clock
        self._observer = observer
        self._pools: dict[str, Pool[Permit]] = {}
        """Of the models that somebody is at work with or waits for, and of those that have places."""
        self._inside = 0
        self._batch_alone_from_s = clock.monotonic() + limits.batch_alone_after_s
        self._of_tenant = Share("tenant", limits.tenant_share)
        self._of_key = Share("key", limits.key_share)
        self.running = 0
        """How many are at work."""

    @property
    def waiting(self) -> int:
        return self._inside - self.running

    def permit(self, claim: Claim) -> Permit:
        """To be entered; entering it raises ConcurrencyLimit, Overloaded or DeadlineExceeded."""
        return Permit(self, claim)

    def batch_room(self, models: Iterable[str]) -> BatchRoom:
        """How much more of batch can begin at present."""
        places = free = 0
        ending_per_s = 0.0
        for model in models:
            capacity = self._capacity(model)
            if capacity is None:
                continue
            most = self._batch_places(capacity)
            places += most
            pool = self._pools.get(model)
            if pool is None:
                free += most
            elif not pool.waiting:
                free += max(min(most - pool.taken_by_batch, capacity - pool.taken), 0)
            if pool is not None and pool.place_s.value > 0:
                ending_per_s += most / pool.place_s.value
        return BatchRoom(places, free, ending_per_s)

    def capacity_changed(self) -> None:
        """There are more places than before, or fewer: whoever can begin now, does."""
        for model in tuple(self._pools):
            self._serve(self._pools[model], model)

    # -- what a permit does ---------------------------------------------------------------------------------

    def enter(self, permit: Permit) -> bool:
        """Whether the permit is granted now; else `wait` has to follow at once. Raises as the whole does."""
        claim, now_s = permit.claim, self._clock.monotonic()
        if now_s >= claim.deadline_s:
            raise DeadlineExceeded("The deadline passed before the request could begin.")
        limits = self._limits
        if claim.priority is Priority.INTERACTIVE:
            self._batch_alone_from_s = now_s + limits.batch_alone_after_s
        if self._inside >= limits.max_generations:
            self._observer.refused(claim.priority, Reason.CONCURRENCY)
            raise ConcurrencyLimit(
                f"The server has {limits.max_generations} answers running or waiting, which is its limit."
            )
        capacity = self._capacity(claim.model)
        pool = self._pools.get(claim.model)
        if pool is None:
            pool = Pool(batch_ageing_s=limits.batch_ageing_s)
        self._take_shares(claim, capacity)
        at_once = pool.goes_first(claim) and self._fits(pool, claim, capacity)
        if not at_once:
            try:
                self._check_queue(pool, claim, capacity)
            except Overloaded:
                self._give_shares(claim)
                raise
        self._pools[claim.model] = permit.pool = pool
        self._inside += 1
        permit.begun_s = now_s
        if at_once:
            self._begin(permit, now_s)
            return True
        permit.state = _State.WAITING
        pool.push(permit, now_s)
        self._observer.queued(claim.priority, 1)
        self._serve(pool, claim.model)
        return permit.state is _State.AT_WORK

    async def wait(self, permit: Permit) -> None:
        """Returns with the permit granted. Raises Overloaded."""
        queued_s = permit.begun_s
        if permit.state is _State.WAITING:
            permit.granted = asyncio.get_running_loop().create_future()
            timer = asyncio.create_task(self._expire(permit), name="queue-timer")
            try:
                await permit.granted
            except BaseException:
                # The caller leaves. It may have been given its permit, or been refused, a moment before.
                self.leave(permit)
                raise
            finally:
                timer.cancel()
        if permit.error is not None:
            raise permit.error
        permit.waited_s = permit.begun_s - queued_s
        self._observer.waited(permit.claim.priority, permit.waited_s)

    def leave(self, permit: Permit) -> None:
        """Gives back the permit, or the place in the queue."""
        pool, claim = permit.pool, permit.claim
        if permit.state is _State.ENDED:
            return
        if permit.state is _State.AT_WORK:
            pool.taken -= claim.sequences
            if claim.priority is Priority.BATCH:
                pool.taken_by_batch -= claim.sequences
            pool.place_s.add((self._clock.monotonic() - permit.begun_s) * claim.sequences)
            self.running -= 1
            self._out(permit)
        else:
            self._unqueue(permit, pool)
        self._serve(pool, claim.model)

    # -- inside ---------------------------------------------------------------------------------------------

    def _check_queue(self, pool: Pool[Permit], claim: Claim, capacity: int | None) -> None:
        """Raises Overloaded where the newcomer had better not wait."""
        limits = self._limits
        if pool.length_of(claim.tenant_id) >= limits.max_queued_per_tenant:
            raise self._refusal(
                pool,
                claim,
                Reason.QUEUE_FULL,
                f"{limits.max_queued_per_tenant} of your requests wait already.",
            )
        if capacity is not None:
            wait_s = WAIT_SAFETY * pool.expected_wait_s(claim, capacity)
            if wait_s > limits.max_queue_wait_s:
                raise self._refusal(pool, claim, Reason.WAIT, "The queue is too long at present.")
            if self._clock.monotonic() + wait_s + pool.first_token_s.value > claim.deadline_s:
                raise self._refusal(pool, claim, Reason.DEADLINE, TOO_LATE)
        if pool.waiting >= limits.max_queued:
            victim = pool.displaced_by(claim)
            if victim is None:
                raise self._refusal(pool, claim, Reason.QUEUE_FULL, "The queue is full.")
            self._shed(victim, pool, Reason.DISPLACED, "Others with fewer requests went before.")

    def _take_shares(self, claim: Claim, capacity: int | None) -> None:
        """Raises ConcurrencyLimit."""
        try:
            self._of_tenant.take(claim.model, claim.tenant_id, claim.sequences, capacity)
            try:
                self._of_key.take(claim.model, claim.key, claim.sequences, capacity)
            except ConcurrencyLimit:
                self._of_tenant.give(claim.model, claim.tenant_id, claim.sequences)
                raise
        except ConcurrencyLimit:
            self._observer.refused(claim.priority, Reason.SHARE)
            raise

    def _give_shares(self, claim: Claim) -> None:
        self._of_tenant.give(claim.model, claim.tenant_id, claim.sequences)
        self._of_key.give(claim.model, claim.key, claim.sequences)

    def _serve(self, pool: Pool[Permit], model: str) -> None:
        """Gives the free places to those whose turn it is. Called whenever that may have changed."""
        if not pool.waiting:
            if not pool.taken and self._capacity(model) is None:
                self._pools.pop(model, None)
            return
        capacity, now_s = self._capacity(model), self._clock.monotonic()

        def batch_may(claim: Claim) -> bool:
            return self._has_share(pool, claim, capacity)

        while (permit := pool.head(now_s, batch_may)) is not None:
            claim = permit.claim
            if now_s + pool.first_token_s.value >= claim.deadline_s:
                self._shed(permit, pool, Reason.DEADLINE, TOO_LATE)
                continue
            if not self._fits(pool, claim, capacity):
                return
            pool.pop(permit, now_s)
            self._observer.queued(claim.priority, -1)
            self._begin(permit, now_s)
            if permit.granted is not None:
                permit.granted.set_result(None)

    def _begin(self, permit: Permit, now_s: float) -> None:
        permit.state = _State.AT_WORK
        permit.begun_s = now_s
        permit.pool.taken += permit.claim.sequences
        if permit.claim.priority is Priority.BATCH:
            permit.pool.taken_by_batch += permit.claim.sequences
        self.running += 1

    async def _expire(self, permit: Permit) -> None:
        """Ends a wait that has become too long."""
        pool, claim = permit.pool, permit.claim
        patience_s = permit.begun_s + self._limits.max_queue_wait_s
        sensible_s = claim.deadline_s - pool.first_token_s.value
        await self._clock.sleep(min(patience_s, sensible_s) - self._clock.monotonic())
        if permit.state is _State.WAITING:
            if sensible_s <= patience_s:
                self._shed(permit, pool, Reason.DEADLINE, TOO_LATE)
            else:
                self._shed(permit, pool, Reason.WAIT, "The wait in the queue took too long.")
            self._serve(pool, claim.model)

    def _shed(self, permit: Permit, pool: Pool[Permit], reason: Reason, why: str) -> None:
        """Refuses one that waits."""
        permit.error = self._refusal(pool, permit.claim, reason, why)
        self._unqueue(permit, pool)
        if permit.granted is not None:
            permit.granted.set_result(None)

    def _unqueue(self, permit: Permit, pool: Pool[Permit]) -> None:
        pool.remove(permit)
        self._observer.queued(permit.claim.priority, -1)
        self._out(permit)

    def _out(self, permit: Permit) -> None:
        permit.state = _State.ENDED
        self._inside -= 1
        self._give_shares(permit.claim)

    def _refusal(self, pool: Pool[Permit], claim: Claim, reason: Reason, why: str) -> Overloaded:
        self._observer.refused(claim.priority, reason)
        capacity = self._capacity(claim.model) or 1
        drained_s = pool.waiting * pool.place_s.value / capacity
        return Overloaded(
            f"`{claim.model}` is at its capacity. {why}",
            retry_after_s=min(max(drained_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S),
        )

    def _fits(self, pool: Pool[Permit], claim: Claim, capacity: int | None) -> bool:
        """Whether there is room. What is larger than all places together is let in alone: whether it can be
        served is the replica's to say."""
        if capacity is None or not pool.taken:
            return True
        return pool.taken + claim.sequences <= capacity and self._has_share(pool, claim, capacity)

    def _has_share(self, pool: Pool[Permit], claim: Claim, capacity: int | None) -> bool:
        """Whether batch leaves the others what is theirs. What is larger than the whole share is let in where
        nobody else of batch is at work."""
        if capacity is None or claim.priority is Priority.INTERACTIVE or not pool.taken_by_batch:
            return True
        return pool.taken_by_batch + claim.sequences <= self._batch_places(capacity)

    def _batch_places(self, capacity: int) -> int:
        """Of a model that has one place only, batch may have that: interactive requests go first in the
        queue. Else at least one is left for them, once there have been any of late."""
        limits = self._limits
        if self._clock.monotonic() >= self._batch_alone_from_s:
            return max(capacity // limits.gateways, 1)
        return max(min(int(capacity * limits.batch_share), capacity - 1) // limits.gateways, 1)
