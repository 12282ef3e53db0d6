"""What the way of events asks of Kafka: ports, implemented in `kafka`, and in memory by tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Protocol

from msgspec import Struct

PLACE_HEADER = "llmos-place"
"""EPOCH/SEQUENCE of a spool's event: should its value be damaged, the consumer still knows what it was."""

Headers = tuple[tuple[str, bytes], ...]


class Topic(IntEnum):
    """Where an event goes. Spools keep these numbers in their files."""

    AUDIT = 0
    JOBS = 1
    RETRY = 2
    DEAD_LETTER = 3


class Record(Struct, frozen=True):
    """A record on its way to Kafka."""

    key: bytes
    value: bytes
    headers: Headers = ()
    topic: Topic = Topic.AUDIT


class ReceivedRecord(Struct, frozen=True):
    """A record as it came from Kafka."""

    partition: int
    offset: int
    key: bytes
    value: bytes
    headers: Headers = ()


class RecordPublisher(Protocol):
    """Publishes to the topics that records name."""

    async def publish(self, records: Sequence[Record]) -> None:
        """Returns when the broker has all of them, in order for each topic and key.

        Raises DependencyUnavailable where that is not sure; some may have been taken nevertheless. Ends in
        bounded time.
        """

    async def close(self) -> None:
        """Ends in bounded time, whatever the broker does."""


class RecordSource(Protocol):
    """Reads all partitions of one topic. Each method ends in bounded time, or raises
    DependencyUnavailable."""

    async def open(self, offsets: Mapping[int, int]) -> None:
        """Begins to read each partition at its offset; at the earliest, where there is none or it does not
        exist any more. Also begins anew."""

    async def poll(self, max_records: int, timeout_s: float) -> list[ReceivedRecord]:
        """The next records; none after `timeout_s` without any."""

    async def ends(self) -> dict[int, int]:
        """By partition: the offset after the last record that the broker has. Raises DependencyUnavailable
        also where the topic is not the one that was opened any more."""

    def positions(self) -> dict[int, int]:
        """By partition: the offset after the last record that was polled."""

    async def commit(self, offsets: Mapping[int, int]) -> None:
        """Tells the broker how far this reader is, for lag monitors. May fail without notice."""

    async def close(self) -> None: ...
