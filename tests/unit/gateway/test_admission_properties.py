"""Admission under any order of arrivals, ends, departures, time and changes of capacity."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.gateway.generation import Priority
from services.mesh import errors
from tests.framework.admissions import Guest, Restaurant

EXPECTED = (errors.Overloaded, errors.ConcurrencyLimit, errors.DeadlineExceeded)


def is_batch(guest: Guest) -> bool:
    return guest.claim.priority is Priority.BATCH


class AdmissionMachine(RuleBasedStateMachine):
    """The real admission on a clock that is moved by hand; each step is judged when all has come to rest."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self.room = Restaurant()
        self.settled = True
        """Capacity has always been the same: nobody is at work who began under another."""

    def run(self, step: Coroutine[Any, Any, Any]) -> None:
        self._loop.run_until_complete(step)

    @initialize(
        capacity=st.integers(1, 5),
        max_queued=st.integers(0, 6),
        max_queued_per_tenant=st.integers(0, 6),
        tenant_share=st.sampled_from([0.5, 1.0]),
    )
    def begin(self, capacity: int, max_queued: int, max_queued_per_tenant: int, tenant_share: float) -> None:
        self.room = Restaurant(
            capacity,
            max_generations=12,
            max_queued=max_queued,
            max_queued_per_tenant=max_queued_per_tenant,
            tenant_share=tenant_share,
            max_queue_wait_s=10,
        )

    @rule(
        tenant=st.sampled_from("abc"),
        tokens=st.integers(1, 9000),
        sequences=st.sampled_from([1, 1, 1, 2, 8]),
        within_s=st.sampled_from([0.0, 1.0, 5.0, float("inf")]),
        priority=st.sampled_from(list(Priority)),
    )
    def arrives(self, **fields: Any) -> None:
        self.run(self.room.arrive(**fields))

    @precondition(lambda self: self.room.at_work)
    @rule(data=st.data())
    def finishes(self, data: st.DataObject) -> None:
        self.run(self.room.finish(data.draw(st.sampled_from(self.room.at_work))))

    @precondition(lambda self: self.room.at_work or self.room.waiting)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        self.run(self.room.leave(data.draw(st.sampled_from(self.room.at_work + self.room.waiting))))

    @precondition(lambda self: self.room.at_work and self.room.waiting)
    @rule(data=st.data())
    def leaves_as_another_finishes(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.room.waiting)).task.cancel()
        self.run(self.room.finish(data.draw(st.sampled_from(self.room.at_work))))

    @rule(duration_s=st.sampled_from([0.3, 1.0, 4.0]))
    def time_passes(self, duration_s: float) -> None:
        self.run(self.room.clock.advance(duration_s))

    @rule(capacity=st.one_of(st.none(), st.integers(1, 6)))
    def replicas_change(self, capacity: int | None) -> None:
        self.settled = False
        self.run(self.room.set_capacity(capacity))

    @invariant()
    def no_more_at_work_than_places(self) -> None:
        assert not self.room.overbooked
        assert len(self.room.at_work) == self.room.admission.running

    @invariant()
    def nobody_waits_beside_a_free_place(self) -> None:
        waiting, capacity = self.room.waiting, self.room.capacity
        if not waiting:
            return
        assert capacity is not None
        assert self.room.at_work
        taken = sum(guest.claim.sequences for guest in self.room.at_work)
        by_batch = sum(guest.claim.sequences for guest in self.room.at_work if is_batch(guest))
        most = max(min(int(capacity * self.room.limits.batch_share), capacity - 1), 1)
        full = [guest for guest in waiting if taken + guest.claim.sequences > capacity]
        share = [g for g in waiting if is_batch(g) and by_batch and by_batch + g.claim.sequences > most]
        assert full or share
        if not all(map(is_batch, waiting)):
            # What keeps an interactive request waiting is never that batch has had its share.
            assert any(guest not in share for guest in full)

    @invariant()
    def batch_leaves_a_place(self) -> None:
        capacity, batch = self.room.capacity, list(filter(is_batch, self.room.at_work))
        if self.settled and capacity is not None and capacity > 1 and len(batch) > 1:
            assert sum(guest.claim.sequences for guest in batch) < capacity

    @invariant()
    def nobody_waits_past_its_time(self) -> None:
        now_s = self.room.clock.monotonic()
        for guest in self.room.waiting:
            assert now_s < guest.claim.deadline_s
            assert now_s < guest.arrived_s + self.room.limits.max_queue_wait_s
        for guest in self.room.guests:
            assert guest.begun_s is None or guest.begun_s < guest.claim.deadline_s

    @invariant()
    def the_queue_is_bounded(self) -> None:
        waiting, limits = self.room.waiting, self.room.limits
        assert len(waiting) == self.room.admission.waiting == self.room.observer.waiting
        assert len(waiting) <= limits.max_queued
        assert len(waiting) + len(self.room.at_work) <= limits.max_generations
        tenants = [guest.claim.tenant_id for guest in waiting]
        assert all(tenants.count(tenant) <= limits.max_queued_per_tenant for tenant in tenants)

    @invariant()
    def refusals_have_a_reason(self) -> None:
        for guest in self.room.guests:
            assert guest.error is None or isinstance(guest.error, EXPECTED)
            if guest.task.done() and not guest.task.cancelled():
                assert guest.task.exception() is None

    def teardown(self) -> None:
        self.run(self.room.close())
        assert (self.room.admission.running, self.room.admission.waiting) == (0, 0)
        assert self.room.observer.waiting == 0
        assert all(not pool.taken and not pool.waiting for pool in self.room.admission._pools.values())
        self._loop.close()


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=80, stateful_step_count=40, deadline=None, print_blob=True)
