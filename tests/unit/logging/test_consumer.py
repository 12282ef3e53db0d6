"""The consumer stores what can be read, keeps what cannot, and notices when nothing comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.logging import consumer as consumer_module
from services.logging.schedule.store import DeadLetter, DeadLetterFilter
from services.logging.store import RecordFilter
from services.logging.stores.memory import MemoryStore
from services.logging.stores.sqlite import SqliteStore
from services.mesh.broker import ReceivedRecord, Record
from services.mesh.clock import ManualClock
from tests.framework.audit_path import (
    DirectWatermarks,
    LoggingProcess,
    make_relay,
    make_spool,
    outcomes,
    running,
    serve,
    started,
)
from tests.framework.memory_broker import MemoryBroker, MemoryPublisher, MemorySource
from tests.framework.waiting import eventually


def process(broker: MemoryBroker, clock: ManualClock | None = None, **options: float) -> LoggingProcess:
    return LoggingProcess(
        MemoryStore(), partial(MemorySource, broker), DirectWatermarks(), clock=clock, **options
    )


async def dead_letters(logging: LoggingProcess) -> list[DeadLetter]:
    """Those that belong to no tenant, with their bytes."""
    found = (await logging.scheduled.dead_letters(DeadLetterFilter(unreadable=True), 1000, None)).items
    return [(await logging.scheduled.dead_letter(letter.dead_letter_id, ""))[0] for letter in found]


async def test_poison_among_good_records_becomes_dead_letters(tmp_path: Path) -> None:
    broker = MemoryBroker()
    spool = make_spool(tmp_path / "spool")
    logging = process(broker)
    relay = make_relay(spool, MemoryPublisher(broker), logging._watermarks)
    async with running(spool, logging):
        for number in range(20):
            await broker.append(0, [Record(b"someone", b"\xff poison %d" % number)])
            await serve(spool, f"r{number}")
            await relay.publish_once()
        await eventually(lambda: logging.source.positions() == {0: 60})
        assert set((await outcomes(logging._store)).values()) == {"SUCCEEDED"}
        letters = await dead_letters(logging)
        assert {letter.raw for letter in letters} == {b"\xff poison %d" % number for number in range(20)}
        assert {letter.detail for letter in letters} == {"It cannot be read: not an EventEnvelope."}
        assert {(letter.topic, letter.error_reason) for letter in letters} == {
            ("llmos.audit.v1", "DATA_CORRUPT")
        }
        assert await logging.consumer.check()
        assert logging.source.committed == {0: 60}  # type: ignore[attr-defined]


async def test_a_damaged_event_does_not_hold_its_producer_up(tmp_path: Path) -> None:
    """Its header tells its place, so what is above can be trimmed."""
    broker = MemoryBroker()
    spool = make_spool(tmp_path / "spool")
    logging = process(broker)
    relay = make_relay(spool, MemoryPublisher(broker), logging._watermarks)
    async with running(spool):
        await serve(spool, "a", "b")
        await relay.publish_once()
        first = broker.logs[0][0]
        broker.logs[0][0] = Record(first.key, b"\xff" + first.value, first.headers)
        async with running(logging):
            await eventually(lambda: logging.source.positions() == {0: 4})
            assert await relay.sync_once() == 4
    assert await outcomes(logging._store) == {"a": "SUCCEEDED", "b": "SUCCEEDED"}


async def test_a_consumer_that_hangs_is_told_by_health_and_opened_anew(tmp_path: Path) -> None:
    broker = MemoryBroker()
    spool = make_spool(tmp_path / "spool")
    logging = process(broker, stalled_after_s=0.5)
    source = logging.source
    assert isinstance(source, MemorySource)
    relay = make_relay(spool, MemoryPublisher(broker), logging._watermarks)
    consumer_module.CHECK_EVERY_S, before = 0.05, consumer_module.CHECK_EVERY_S
    try:
        async with running(spool, logging):
            await eventually(lambda: source.opened == 1)
            source.mute = True
            await serve(spool, "a")
            await relay.publish_once()
            await eventually(lambda: logging.healthy == [True, False])
            await eventually(lambda: source.opened > 1)
            source.mute = False
            await eventually(lambda: logging.healthy == [True, False, True])
            assert await outcomes(logging._store) == {"a": "SUCCEEDED"}
    finally:
        consumer_module.CHECK_EVERY_S = before


async def test_a_broker_that_is_away_is_no_reason_to_refuse_queries() -> None:
    broker = MemoryBroker()
    broker.down = True
    logging = process(broker)
    async with running(logging):
        assert await logging._store.search(RecordFilter(), 1, None) == []
        broker.down = False
        await eventually(lambda: logging.source.opened == 1)  # type: ignore[attr-defined]
    assert logging.healthy == [True]


async def test_a_database_that_fails_is_told_by_health(tmp_path: Path) -> None:
    broker = MemoryBroker()
    store = SqliteStore(tmp_path / "audit.db")
    logging = LoggingProcess(store, partial(MemorySource, broker), DirectWatermarks())
    spool = make_spool(tmp_path / "spool")
    async with running(spool, logging):
        await eventually(lambda: logging.source.opened == 1)  # type: ignore[attr-defined]
        await store.stop()
        await serve(spool, "a")
        await make_relay(spool, MemoryPublisher(broker), DirectWatermarks()).publish_once()
        await eventually(lambda: logging.healthy == [True, False])
        await store.start()
        await eventually(lambda: logging.healthy == [True, False, True])
        assert await outcomes(store) == {"a": "SUCCEEDED"}


async def test_a_gateway_that_never_comes_back_is_fenced_once_logging_has_read_everything(
    tmp_path: Path,
) -> None:
    clock = ManualClock()
    broker = MemoryBroker()
    spool = make_spool(tmp_path / "spool")
    logging = process(broker, clock, fence_after_s=600)
    async with running(spool):
        await spool.append_started(started("left"))
        await make_relay(spool, MemoryPublisher(broker), logging._watermarks).publish_once()
    consumer = logging.consumer
    await consumer.open()
    await consumer.check()
    await clock.advance(700)
    await consumer.check()
    assert await outcomes(logging._store) == {}, "nothing was read"
    await consumer.step(10, 0)
    for _ in range(30):
        await consumer.check()
        assert await outcomes(logging._store) == {"left": "open"}
        await clock.advance(20)
    await consumer.check()
    await clock.advance(20)
    await consumer.check()
    assert await outcomes(logging._store) == {"left": "ABORTED"}


class Batches:
    """An `Intake` that keeps what it was given."""

    topic = "llmos.audit.v1"

    def __init__(self) -> None:
        self.taken: list[list[bytes]] = []

    async def offsets(self) -> dict[int, int]:
        return {}

    async def take(self, records: Sequence[ReceivedRecord], offsets: Mapping[int, int]) -> None:
        self.taken.append([record.value for record in records])

    async def read_all(self, until_s: float) -> None:
        """Nothing waits for it."""


async def test_where_batches_follow_each_other_the_next_one_is_let_grow() -> None:
    clock, broker, intake = ManualClock(), MemoryBroker(), Batches()

    async def on_health(healthy: bool) -> None:
        """Nobody asks."""

    consumer = consumer_module.TopicConsumer(
        MemorySource(broker), intake, clock, stalled_after_s=30, on_health=on_health, gather_s=0.2
    )

    async def come(*values: bytes) -> None:
        for value in values:
            await broker.append(0, [Record(b"p", value)])

    async with running(consumer):
        await come(b"alone")
        await eventually(lambda: intake.taken == [[b"alone"]])
        await come(b"next")
        await eventually(lambda: clock.sleepers == 1)
        await come(b"third")
        await come(b"fourth")
        assert intake.taken == [[b"alone"], [b"next"]]
        await clock.advance(0.2)
        await eventually(lambda: intake.taken[2:] == [[b"third", b"fourth"]])
        await eventually(lambda: clock.sleepers == 1)
        await clock.advance(2)
        await come(b"alone again")
        await eventually(lambda: intake.taken[3:] == [[b"alone again"]])
        assert clock.sleepers == 0


async def test_a_batch_links_to_the_traces_that_it_comes_from(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    broker = MemoryBroker()
    spool = make_spool(tmp_path / "spool")
    logging = process(broker)
    consumer_module._tracer, before = provider.get_tracer("test"), consumer_module._tracer
    try:
        async with running(spool):
            trace_ids = []
            for number in range(3):
                with provider.get_tracer("test").start_as_current_span("request") as span:
                    trace_ids.append(span.get_span_context().trace_id)
                    await serve(spool, f"r{number}")
            await make_relay(spool, MemoryPublisher(broker), logging._watermarks).publish_once()
        await logging.consumer.open()
        await logging.consumer.step(100, 0)
    finally:
        consumer_module._tracer = before
    (span,) = [each for each in exporter.get_finished_spans() if each.name == "process llmos.audit.v1"]
    assert span.kind is trace.SpanKind.CONSUMER
    assert span.parent is None
    assert [link.context.trace_id for link in span.links] == trace_ids
