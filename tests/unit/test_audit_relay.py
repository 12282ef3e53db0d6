"""The relay publishes at once, trims what is stored, repeats what is not, and waits for nobody at a stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from services.logging.stores.memory import MemoryStore
from services.mesh.audit_protocol import Place, PublishPlan
from services.mesh.broker import Record
from services.mesh.clock import ManualClock
from services.mesh.relay import BUSY_GATHER_S, GATHER_S, HEARTBEAT_S, Relay
from services.mesh.spool import Spool
from tests.framework.audit_path import (
    DirectWatermarks,
    LoggingProcess,
    ended,
    make_relay,
    make_spool,
    outcomes,
    running,
    serve,
    started,
)
from tests.framework.audit_trace import Fate
from tests.framework.memory_broker import MemoryBroker, MemoryPublisher, MemorySource
from tests.framework.waiting import eventually


class World:
    """All parts, with a broker in memory and loops that run."""

    def __init__(self, folder: Path, **options: float) -> None:
        self.broker = MemoryBroker()
        self.publisher = MemoryPublisher(self.broker)
        self.watermarks = DirectWatermarks()
        self.spool = make_spool(folder / "spool")
        self.relay = make_relay(self.spool, self.publisher, self.watermarks, **options)
        self.store = MemoryStore()
        self.logging = LoggingProcess(self.store, partial(MemorySource, self.broker), self.watermarks)

    def empty(self) -> bool:
        return not self.spool.ledger.held_events

    async def has(self, expected: dict[str, str]) -> bool:
        return await outcomes(self.store) == expected


async def test_what_is_appended_is_stored_and_then_trimmed(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with running(world.spool, world.relay, world.logging):
        await serve(world.spool, "a", "b")
        await eventually(lambda: world.has({"a": "SUCCEEDED", "b": "SUCCEEDED"}))
        await eventually(world.empty)
        records = world.broker.logs[0]
        assert {record.key for record in records} == {world.spool.producer.encode()}
        assert [dict(record.headers)["llmos-place"] for record in records] == [
            f"1/{n}".encode() for n in range(1, 5)
        ]


async def test_logging_hears_of_a_producer_before_it_has_events(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with running(world.spool, world.logging, world.relay):
        await eventually(lambda: world.watermarks.reports)
        assert world.watermarks.reports[0].settled_before == Place(1, 1)


async def test_publishing_goes_on_while_logging_is_away_and_the_other_way_round(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with running(world.spool, world.relay):
        await serve(world.spool, "a")
        await eventually(lambda: len(world.broker.logs[0]) == 2)
        async with running(world.logging):
            world.broker.down = True
            heard = len(world.watermarks.reports)
            await serve(world.spool, "b")
            await eventually(lambda: len(world.watermarks.reports) > heard + 1)
            world.broker.down = False
            await eventually(lambda: world.has({"a": "SUCCEEDED", "b": "SUCCEEDED"}))
            await eventually(world.empty)


async def test_what_the_broker_lost_is_published_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with running(world.spool, world.relay):
        await serve(world.spool, "a")
        await eventually(lambda: len(world.broker.logs[0]) == 2)
        world.broker.wipe()
        async with running(world.logging):
            await eventually(lambda: world.has({"a": "SUCCEEDED"}))
            await eventually(world.empty)


async def test_an_answer_that_never_comes_makes_duplicates_and_no_harm(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.publisher.fate = Fate.UNACKNOWLEDGED
    async with running(world.spool, world.relay, world.logging):
        await serve(world.spool, "a")
        await eventually(lambda: world.publisher.batches >= 3)
        world.publisher.fate = Fate.TAKEN
        await eventually(world.empty)
        assert await outcomes(world.store) == {"a": "SUCCEEDED"}


async def test_a_fenced_producer_goes_on_in_a_new_epoch(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with running(world.spool, world.logging):
        await world.spool.append_started(started("long"))
        await world.relay.publish_once()
        await eventually(lambda: world.has({"long": "open"}))
        await world.store.fence(world.spool.producer, 0)
        async with running(world.relay):
            await eventually(lambda: world.spool.ledger.epoch == 2)
            await world.spool.append_ended(ended("long"))
            await serve(world.spool, "next")
            await eventually(world.empty)
    assert await outcomes(world.store) == {"long": "ABORTED", "next": "SUCCEEDED"}


async def test_a_stop_publishes_what_is_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with running(world.spool):
        async with running(world.relay):
            await serve(world.spool, *(f"r{n}" for n in range(600)))
        assert len(world.broker.logs[0]) == 1200


async def test_r28_a_stop_does_not_wait_for_a_broker_that_hangs(tmp_path: Path) -> None:
    class Hanging:
        closed = False

        async def publish(self, records: Sequence[Record]) -> None:
            await asyncio.Event().wait()

        async def close(self) -> None:
            self.closed = True

    publisher = Hanging()
    spool = make_spool(tmp_path / "spool")
    relay = make_relay(spool, publisher, DirectWatermarks(), stop_timeout_s=0.2)
    async with running(spool):
        await relay.start()
        await serve(spool, "a")
        begun = time.monotonic()
        await relay.stop()
        assert time.monotonic() - begun < 2
        assert publisher.closed
        assert spool.ledger.held_events == 2


async def test_what_comes_while_a_batch_is_published_is_gathered(tmp_path: Path) -> None:
    """Under a steady load batches would follow each other at once, each with what little came meanwhile."""

    class Slow(MemoryPublisher):
        sizes: list[int]

        async def publish(self, records: Sequence[Record]) -> None:
            self.sizes.append(len(records))
            await taken.wait()

    clock, taken = ManualClock(), asyncio.Event()
    publisher = Slow(MemoryBroker())
    publisher.sizes = []
    spool = make_spool(tmp_path / "spool", clock)
    plan = PublishPlan()
    relay = Relay(spool, publisher, DirectWatermarks(), clock, plan=plan)
    async with running(spool, relay):
        await serve(spool, "a")
        await clock.advance(GATHER_S)
        await eventually(lambda: publisher.sizes == [2])
        await serve(spool, "b")
        taken.set()
        await eventually(lambda: plan.mark == Place(1, 2))
        await serve(spool, "c")
        await clock.advance(BUSY_GATHER_S - 0.01)
        await serve(spool, "d")
        assert publisher.sizes == [2]
        await clock.advance(0.02)
        await eventually(lambda: publisher.sizes == [2, 6])


async def test_a_silent_producer_reports_all_the_same(tmp_path: Path) -> None:
    """Logging would fence it otherwise."""
    clock = ManualClock()
    watermarks = DirectWatermarks()
    spool = Spool.open(
        tmp_path / "spool",
        source="gateway",
        instance="g",
        mode="permissive",
        max_bytes=1 << 20,
        clock=clock,
    )
    relay = Relay(spool, MemoryPublisher(MemoryBroker()), watermarks, clock, plan=PublishPlan())
    logging = LoggingProcess(MemoryStore(), partial(MemorySource, MemoryBroker()), watermarks, clock=clock)
    async with running(spool, logging, relay):
        await eventually(lambda: len(watermarks.reports) == 1)
        for number in range(2, 5):
            await clock.advance(HEARTBEAT_S + 0.1)
            await eventually(lambda number=number: len(watermarks.reports) >= number)
