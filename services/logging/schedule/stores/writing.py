"""The half of a store that writes, over whatever runs a piece of work on rows in one transaction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

from services.logging.schedule.job import Job
from services.logging.schedule.machine import Machine
from services.logging.schedule.rows import Rows
from services.logging.schedule.store import (
    Accepted,
    AttemptEnd,
    Beat,
    Bounds,
    Claims,
    OutboxRow,
    ReportTaken,
    Standing,
    Swept,
)
from services.logging.schedule.transactions import Transactions
from services.mesh.jobs import JobEvent, JobRequested

T = TypeVar("T")


class WritingStore(ABC):
    """The methods of `ScheduleStore` that write."""

    def __init__(self, machine: Machine, bounds: Bounds) -> None:
        self._transactions = Transactions(machine, bounds)

    @abstractmethod
    async def _writing(self, work: Callable[[Rows], T]) -> T:
        """Keeps all that the work writes, durably, or nothing where it raises."""

    @abstractmethod
    async def _reading(self, work: Callable[[Rows], T]) -> T:
        """Work that writes nothing."""

    async def accept(self, events: Sequence[JobEvent], now_us: int) -> Accepted:
        return await self._writing(lambda rows: self._transactions.accept(rows, events, now_us))

    async def claim(self, worker: str, max_jobs: int, lease_us: int, now_us: int) -> Claims:
        return await self._writing(
            lambda rows: self._transactions.claim(rows, worker, max_jobs, lease_us, now_us)
        )

    async def heartbeat(self, beats: Sequence[Beat], lease_us: int, now_us: int) -> list[Standing]:
        return await self._writing(lambda rows: self._transactions.heartbeat(rows, beats, lease_us, now_us))

    async def report(self, ends: Sequence[AttemptEnd], now_us: int) -> list[ReportTaken]:
        return await self._writing(
            lambda rows: [self._transactions.report(rows, end, now_us) for end in ends]
        )

    async def sweep(self, now_us: int, limit: int, *, leases: bool = True) -> Swept:
        return await self._writing(lambda rows: self._transactions.sweep(rows, now_us, limit, leases))

    async def cancel(self, job_id: str, tenant_id: str, now_us: int) -> tuple[Job, tuple[str, ...]]:
        return await self._writing(lambda rows: self._transactions.cancel(rows, job_id, tenant_id, now_us))

    async def replay(
        self, dead_letter_id: str, tenant_id: str, job: JobRequested, now_us: int
    ) -> tuple[Job, tuple[str, ...]]:
        return await self._writing(
            lambda rows: self._transactions.replay(rows, dead_letter_id, tenant_id, job, now_us)
        )

    async def discard(self, dead_letter_id: str, tenant_id: str, now_us: int) -> None:
        await self._writing(lambda rows: self._transactions.discard(rows, dead_letter_id, tenant_id, now_us))

    async def outbox(self, limit: int) -> list[OutboxRow]:
        return await self._reading(lambda rows: self._transactions.outbox(rows, limit))

    async def published(self, numbers: Sequence[int]) -> None:
        await self._writing(lambda rows: self._transactions.published(rows, numbers))
