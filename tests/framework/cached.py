"""Requests to the use case with a response cache, and what came of each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from services.gateway.auditing import RequestRecord
from services.gateway.cache.memory import MemoryCache
from services.gateway.generation import Delta, Event
from services.mesh.clock import ManualClock
from services.mesh.context import Identity
from services.mesh.events import RequestEnded
from tests.framework.gateway_fakes import ALICE, Bench, FakeReplica, Step, generation

TIMEOUT_S = 5


class Asked:
    """One request and what came of it."""

    def __init__(
        self, bench: Bench, identity: Identity, said: str, whole: bool, changes: dict[str, object]
    ) -> None:
        self.events: list[Event] = []
        self.record: RequestRecord | None = None
        self.changed = asyncio.Event()
        self._bench = bench
        self._identity = identity
        self._said = said
        self._whole = whole
        self._request = generation(**changes)

    async def run(self) -> Asked:
        async with self._bench.call(self._identity) as record:
            record.cache_control = self._said
            self.record = record
            if self._whole:
                answer = await self._bench.completions.generate(record, self._request)
                self.events += [Delta(1 + at, at, c.text, c.token_ids) for at, c in enumerate(answer.choices)]
                return self
            async with aclosing(self._bench.completions.stream(record, self._request)) as events:
                async for event in events:
                    self.events.append(event)
                    self.changed.set()
        return self

    async def until(self, deltas: int) -> None:
        """Returns when it has so many."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.deltas) < deltas:
                self.changed.clear()
                await self.changed.wait()

    @property
    def deltas(self) -> list[Delta]:
        return [event for event in self.events if isinstance(event, Delta)]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def metadata(self) -> dict[str, str]:
        assert self.record is not None
        return self.record.response_metadata

    @property
    def status(self) -> str:
        return self.metadata["x-llmos-cache"]

    @property
    def ended(self) -> RequestEnded:
        assert self.record is not None
        found = [e for e in self._bench.audit.ended if e.facts.request_id == self.record.request_id]
        assert len(found) == 1
        return found[0]


def bench_of(*scripts: Sequence[Step], max_entry_bytes: int = 64 * 1024, **options: object) -> Bench:
    clock = ManualClock()
    kept = MemoryCache(clock, max_bytes=1024 * 1024, max_entry_bytes=max_entry_bytes, ttl_s=60)
    return Bench([FakeReplica(*scripts)], clock=clock, kept=kept, **options)  # type: ignore[arg-type]


def asked(
    bench: Bench, said: str = "", identity: Identity = ALICE, whole: bool = False, **changes: object
) -> Asked:
    return Asked(bench, identity, said, whole, changes)


def computed(bench: Bench) -> int:
    return len(bench.replicas[0].requests)
