"""Admission as a test uses it: places that are set by hand, callers as tasks, and time that stands still."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from services.gateway.admission.claim import Claim
from services.gateway.admission.permits import Admission, AdmissionLimits, Reason
from services.gateway.generation import Priority
from services.mesh.clock import ManualClock
from services.mesh.errors import LlmosError

MODEL = "m"


class CountingObserver:
    """An `Observer` that counts."""

    def __init__(self) -> None:
        self.waiting = 0
        self.refusals: Counter[Reason] = Counter()
        self.waits_s: list[float] = []

    def queued(self, priority: Priority, change: int) -> None:
        self.waiting += change

    def waited(self, priority: Priority, wait_s: float) -> None:
        self.waits_s.append(wait_s)

    def refused(self, priority: Priority, reason: Reason) -> None:
        self.refusals[reason] += 1


@dataclass(eq=False)
class Guest:
    """One caller: waits, is at work until `finish`, and says how it ended."""

    claim: Claim
    arrived_s: float
    task: asyncio.Task[None] = field(init=False)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    at_work: bool = False
    begun_s: float | None = None
    error: LlmosError | None = None

    @property
    def waits(self) -> bool:
        return not self.at_work and not self.task.done()


class Restaurant:
    """Everybody who came, in order."""

    def __init__(self, capacity: int | None = 2, **limits: float) -> None:
        self.capacity = capacity
        self.clock = ManualClock()
        self.observer = CountingObserver()
        self.limits = AdmissionLimits(**limits)  # type: ignore[arg-type]
        self.admission = Admission(
            self.limits, lambda model: self.capacity if model == MODEL else None, self.clock, self.observer
        )
        self.guests: list[Guest] = []
        self.overbooked: list[str] = []

    async def arrive(
        self,
        tenant: str = "a",
        *,
        key: str = "k",
        model: str = MODEL,
        tokens: int = 100,
        sequences: int = 1,
        within_s: float = float("inf"),
        priority: Priority = Priority.INTERACTIVE,
    ) -> Guest:
        now_s = self.clock.monotonic()
        guest = Guest(Claim(model, tenant, key, tokens, sequences, now_s + within_s, priority), now_s)
        guest.task = asyncio.create_task(self._dine(guest))
        self.guests.append(guest)
        await settled()
        return guest

    async def finish(self, guest: Guest, *, first_token: bool = True) -> None:
        guest.done.set()
        await settled()

    async def leave(self, guest: Guest) -> None:
        guest.task.cancel()
        await settled()

    async def set_capacity(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.admission.capacity_changed()
        await settled()

    async def close(self) -> None:
        for guest in self.guests:
            guest.task.cancel()
        await asyncio.gather(*(guest.task for guest in self.guests), return_exceptions=True)

    @property
    def at_work(self) -> list[Guest]:
        return [guest for guest in self.guests if guest.at_work]

    @property
    def waiting(self) -> list[Guest]:
        return [guest for guest in self.guests if guest.waits]

    async def _dine(self, guest: Guest) -> None:
        try:
            async with self.admission.permit(guest.claim) as permit:
                guest.at_work, guest.begun_s = True, self.clock.monotonic()
                self._count()
                permit.first_token(self.clock.monotonic())
                await guest.done.wait()
        except LlmosError as error:
            guest.error = error
        finally:
            guest.at_work = False

    def _count(self) -> None:
        """At each beginning: no more places are taken than there are."""
        places = sum(guest.claim.sequences for guest in self.at_work if guest.claim.model == MODEL)
        if self.capacity is not None and places > self.capacity and len(self.at_work) > 1:
            self.overbooked.append(f"{places} of {self.capacity}")


async def settled() -> None:
    """Lets everybody do what they can do now."""
    for _ in range(8):
        await asyncio.sleep(0)
