"""Kafka in memory: the ports of `services.mesh.broker`, with faults that a test orders."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.mesh.broker import ReceivedRecord, Record, Topic
from services.mesh.errors import DependencyUnavailable
from tests.framework.audit_trace import Fate


@dataclass
class MemoryBroker:
    """Losing its data, repeating a record and delaying a batch are a call each."""

    partitions: int = 1
    topics: dict[Topic, list[list[Record]]] = field(init=False)
    """By topic and partition."""
    delayed: list[tuple[int, Record]] = field(default_factory=list)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    down: bool = False

    def __post_init__(self) -> None:
        self.topics = {topic: [[] for _ in range(self.partitions)] for topic in Topic}

    @property
    def logs(self) -> list[list[Record]]:
        """Of the audit topic."""
        return self.topics[Topic.AUDIT]

    async def append(self, partition: int, records: Sequence[Record]) -> None:
        for record in records:
            self.topics[record.topic][partition].append(record)
        async with self.arrived:
            self.arrived.notify_all()

    def wipe(self) -> None:
        for topic in self.topics.values():
            for log in topic:
                log.clear()

    async def land_delayed(self) -> None:
        for partition, record in self.delayed:
            await self.append(partition, [record])
        self.delayed.clear()

    async def duplicate(self, partition: int, back: int) -> None:
        for topic in self.topics.values():
            log = topic[partition]
            if log:
                await self.append(partition, [log[-min(back, len(log))]])


@dataclass
class MemoryPublisher:
    """A `RecordPublisher`. `fate` is what becomes of the next batches."""

    broker: MemoryBroker
    partition: int = 0
    fate: Fate = Fate.TAKEN
    batches: int = 0

    async def publish(self, records: Sequence[Record]) -> None:
        self.batches += 1
        if self.broker.down or self.fate is Fate.LOST:
            raise DependencyUnavailable("the broker is away")
        if self.fate is Fate.DELAYED:
            self.broker.delayed += [(self.partition, record) for record in records]
        else:
            landed = len(records) // 2 if self.fate is Fate.TORN else len(records)
            await self.broker.append(self.partition, records[:landed])
        if self.fate is not Fate.TAKEN:
            raise DependencyUnavailable("no answer from the broker")

    async def close(self) -> None:
        """Nothing to close."""


@dataclass
class MemorySource:
    """A `RecordSource`. Where `only` is set, the next poll reads that partition alone."""

    broker: MemoryBroker
    topic: Topic = Topic.AUDIT
    only: int | None = None
    mute: bool = False
    """Gives nothing, without a sign: as a consumer that hangs."""
    opened: int = 0
    committed: dict[int, int] = field(default_factory=dict)
    _next: dict[int, int] = field(default_factory=dict)

    async def open(self, offsets: Mapping[int, int]) -> None:
        if self.broker.down:
            raise DependencyUnavailable("the broker is away")
        self.opened += 1
        self._next = {partition: offsets.get(partition, 0) for partition in range(self.broker.partitions)}

    async def poll(self, max_records: int, timeout_s: float) -> list[ReceivedRecord]:
        found = self._poll(max_records)
        if not found and timeout_s > 0:
            try:
                async with asyncio.timeout(timeout_s), self.broker.arrived:
                    await self.broker.arrived.wait()
            except TimeoutError:
                return []
            found = self._poll(max_records)
        return found

    def _poll(self, max_records: int) -> list[ReceivedRecord]:
        if self.broker.down:
            raise DependencyUnavailable("the broker is away")
        found: list[ReceivedRecord] = []
        for partition, log in enumerate(self.broker.topics[self.topic]):
            if self.mute or (self.only is not None and partition != self.only):
                continue
            offset = self._next[partition]
            if offset > len(log):  # out of range: from the earliest
                offset = 0
            for record in log[offset : offset + max_records - len(found)]:
                found.append(ReceivedRecord(partition, offset, record.key, record.value, record.headers))
                offset += 1
            self._next[partition] = offset
        return found

    async def ends(self) -> dict[int, int]:
        if self.broker.down:
            raise DependencyUnavailable("the broker is away")
        return {partition: len(log) for partition, log in enumerate(self.broker.topics[self.topic])}

    def positions(self) -> dict[int, int]:
        return dict(self._next)

    async def commit(self, offsets: Mapping[int, int]) -> None:
        self.committed.update(offsets)

    async def close(self) -> None:
        """Nothing to close."""
