"""What the logging service asks of a database: the port, and what goes through it.

Implemented by `stores.sqlite` and, for tests, `stores.memory`; tests/contract/test_audit_store.py holds both
to it. Times are microseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from services.mesh.audit_protocol import Place, ProducerAnswer, ProducerReport
from services.mesh.event_codec import EventRead


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What is known of one request. `started` and `ended` are serialised messages of llmos.events.v1."""

    request_id: str
    receive_time_us: int
    started: bytes | None
    ended: bytes | None
    closed_by_logging: bool
    position: int
    store_time_us: int


@dataclass(frozen=True, slots=True)
class RecordFilter:
    """Which requests; what is set must all hold."""

    request_id: str = ""
    tenant_id: str = ""
    client_id: str = ""
    outcome: int = 0
    receive_time_from_us: int | None = None
    receive_time_before_us: int | None = None
    open_only: bool = False


class Cursor(NamedTuple):
    """The last record of a page."""

    receive_time_us: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Batch:
    """What was read from Kafka in one go, in its order."""

    topic: str
    events: Sequence[EventRead] = ()
    offsets: Mapping[int, int] = field(default_factory=dict)
    """By partition: the next offset to read."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What a batch did."""

    position: int
    """The highest position in the store."""
    late_outcomes: int = 0
    """Outcomes of requests that had another one already; they are left out."""


class AuditStore(Protocol):
    """Each method is one transaction. Raises DependencyUnavailable where the database fails."""

    async def start(self) -> None:
        """Raises OSError with a sentence where it cannot be used."""

    async def stop(self) -> None: ...

    async def apply(self, batch: Batch, now_us: int) -> Applied:
        """Stores events, what is known of their epochs, and offsets: all or nothing, and durably. Repeating
        it changes nothing. Of an event that is a mere place, nothing else is kept.

        A request keeps its first intent and its first outcome. A record's position grows when it changes.
        """

    async def offsets(self, topic: str) -> dict[int, int]:
        """By partition: the next offset to read."""

    async def sync(self, report: ProducerReport, now_us: int) -> tuple[ProducerAnswer, int]:
        """Takes a producer's report: raises floors, forgets epochs that the producer no longer holds,
        closes intents that are settled and open all the same. Returns the answer, and how many it closed.
        """

    async def producers_with_open_requests(self) -> list[str]: ...

    async def fence(self, producer: str, now_us: int) -> int:
        """Closes the producer's open requests as ABORTED and fences its epoch; returns how many."""

    async def search(self, which: RecordFilter, limit: int, after: Cursor | None) -> list[RequestRecord]:
        """By the time of receipt, the newest first; `after` is where the page before ended."""

    async def newest(self, which: RecordFilter, limit: int) -> tuple[list[RequestRecord], int]:
        """The records that changed last, in order of position, and the highest position in the store."""

    async def changed(
        self, which: RecordFilter, after_position: int, limit: int
    ) -> tuple[list[RequestRecord], int]:
        """The next records in order of position, and the position up to which that is all."""

    async def other_events(self, limit: int) -> list[tuple[str, Place, str, bytes]]:
        """Events of no request, (producer, place, kind, AuditRecorded), the newest first."""
