"""What every store of logging must do; run by the one in memory and by SQLite, and on SQLite for its file."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from llmos.events.v1 import events_pb2

from services.logging.store import (
    AuditStore,
    Batch,
    Cursor,
    RecordFilter,
    RequestRecord,
)
from services.logging.stores import sqlite_file
from services.logging.stores.memory import MemoryStore
from services.logging.stores.sqlite import SqliteStore
from services.mesh.audit_protocol import HeldEpoch, Place, ProducerReport
from services.mesh.errors import DependencyUnavailable, Overloaded
from services.mesh.event_codec import EventRead, IntentRead, OtherRead, OutcomeRead, PlaceRead
from services.mesh.events import Outcome

TOPIC = "llmos.audit.v1"
NOW_US = 1_900_000_000_000_000
EVERYTHING = RecordFilter()


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AuditStore]:
    store: AuditStore = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "audit.db")
    await store.start()
    yield store
    await store.stop()


def intent(
    request_id: str,
    place: tuple[int, int] = (1, 1),
    *,
    producer: str = "p",
    floor: int = 1,
    time_us: int = 1000,
) -> EventRead:
    started = events_pb2.RequestStarted()
    started.facts.request_id = request_id
    started.facts.identity.tenant_id = "tenant-a"
    record = IntentRead(request_id, "tenant-a", "client-a", time_us, started.SerializeToString())
    return EventRead(producer, Place(*place), floor, record)


def outcome(
    request_id: str,
    place: tuple[int, int] = (1, 2),
    *,
    producer: str = "p",
    how: Outcome = Outcome.SUCCEEDED,
    floor: int = 1,
    tenant_id: str = "tenant-a",
    time_us: int = 1000,
) -> EventRead:
    ended = events_pb2.RequestEnded(outcome=int(how))  # type: ignore[arg-type]
    ended.facts.request_id = request_id
    record = OutcomeRead(request_id, tenant_id, "client-a", time_us, int(how), ended.SerializeToString())
    return EventRead(producer, Place(*place), floor, record)


def note(place: tuple[int, int], body: bytes = b"x") -> EventRead:
    return EventRead("p", Place(*place), 1, OtherRead("gap", 5, body))


async def take(store: AuditStore, *events: EventRead) -> int:
    return (await store.apply(Batch(TOPIC, events), NOW_US)).position


async def one(store: AuditStore, request_id: str) -> RequestRecord:
    (record,) = await store.search(RecordFilter(request_id=request_id), 2, None)
    return record


def how(record: RequestRecord) -> str:
    if record.ended is None:
        return "open"
    return Outcome(events_pb2.RequestEnded.FromString(record.ended).outcome).name


def report(
    *held: tuple[int, int, int], epoch: int = 1, settled: tuple[int, int] | None = None
) -> ProducerReport:
    place = None if settled is None else Place(*settled)
    return ProducerReport("p", epoch, tuple(HeldEpoch(*each) for each in held), place)


async def test_a_request_has_its_intent_then_its_outcome(store: AuditStore) -> None:
    assert await take(store, intent("a")) == 1
    open_record = await one(store, "a")
    assert (how(open_record), open_record.position, open_record.store_time_us) == ("open", 1, NOW_US)
    assert await take(store, outcome("a")) == 2
    record = await one(store, "a")
    assert how(record) == "SUCCEEDED"
    assert record.started == open_record.started
    assert (record.position, record.receive_time_us, record.closed_by_logging) == (2, 1000, False)


async def test_the_order_of_arrival_does_not_matter(store: AuditStore) -> None:
    await take(store, outcome("a"))
    early = await one(store, "a")
    assert (early.started, how(early)) == (None, "SUCCEEDED")
    assert await store.producers_with_open_requests() == []
    await take(store, intent("a"))
    late = await one(store, "a")
    assert late.started is not None
    assert how(late) == "SUCCEEDED"


async def test_repeating_changes_nothing(store: AuditStore) -> None:
    batch = Batch(TOPIC, [intent("a"), outcome("a"), note((1, 3))], {0: 4})
    first = await store.apply(batch, NOW_US)
    again = await store.apply(batch, NOW_US + 1)
    assert (again.position, again.late_outcomes) == (first.position, 0)
    assert (await one(store, "a")).store_time_us == NOW_US
    assert len(await store.other_events(10)) == 1


async def test_the_first_outcome_stands(store: AuditStore) -> None:
    await take(store, intent("a"), outcome("a", how=Outcome.FAILED))
    applied = await store.apply(Batch(TOPIC, [outcome("a", (2, 1), how=Outcome.ABORTED)]), NOW_US)
    assert applied.late_outcomes == 1
    assert how(await one(store, "a")) == "FAILED"


async def test_offsets_are_kept_with_the_events(store: AuditStore) -> None:
    assert await store.offsets(TOPIC) == {}
    await store.apply(Batch(TOPIC, [intent("a")], {0: 5, 2: 1}), NOW_US)
    await store.apply(Batch(TOPIC, (), {0: 9}), NOW_US)
    await store.apply(Batch("other", (), {0: 1}), NOW_US)
    assert await store.offsets(TOPIC) == {0: 9, 2: 1}


async def test_the_watermark_waits_for_holes_and_passes_floors(store: AuditStore) -> None:
    await take(store, intent("a", (1, 1)), intent("c", (1, 3)), intent("e", (1, 5)))
    answer, _ = await store.sync(report((1, 1, 5)), NOW_US)
    assert answer.watermarks == {1: 1}
    await take(store, intent("b", (1, 2)))
    answer, _ = await store.sync(report((1, 2, 5)), NOW_US)
    assert answer.watermarks == {1: 3}
    answer, _ = await store.sync(report((1, 5, 5)), NOW_US)
    assert answer.watermarks == {1: 5}
    await take(store, intent("z", (1, 90), floor=90))
    answer, _ = await store.sync(report((1, 90, 90)), NOW_US)
    assert answer.watermarks == {1: 90}
    assert not answer.fenced


async def test_epochs_are_apart_and_forgotten_when_no_longer_held(store: AuditStore) -> None:
    await take(store, intent("a", (1, 1)), intent("b", (2, 1)), intent("c", (3, 1)), intent("d", (3, 2)))
    answer, _ = await store.sync(report((1, 1, 1), (2, 1, 1), (3, 1, 2), epoch=3), NOW_US)
    assert answer.watermarks == {1: 1, 2: 1, 3: 2}
    answer, _ = await store.sync(report((3, 1, 2), epoch=3), NOW_US)
    assert answer.watermarks == {3: 2}
    answer, _ = await store.sync(report((1, 1, 1), (3, 1, 2), epoch=3), NOW_US)
    assert answer.watermarks == {1: 0, 3: 2}, "forgotten: it would be sent again"


async def test_random_arrival_ends_with_everything_stored(store: AuditStore) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    events = [intent(f"r{n}", (1, n)) for n in range(1, 120)]
    sent = events + rng.sample(events, 40)
    rng.shuffle(sent)
    while sent:
        size = rng.randrange(1, 30)
        await take(store, *sent[:size])
        del sent[:size]
    answer, _ = await store.sync(report((1, 1, 119)), NOW_US)
    assert answer.watermarks == {1: 119}
    assert len(await store.search(EVERYTHING, 1000, None)) == 119


async def test_fencing_closes_what_is_open_and_tells_the_producer(store: AuditStore) -> None:
    await take(
        store,
        intent("a", (2, 1)),
        outcome("a", (2, 2)),
        intent("b", (2, 3)),
        intent("c", (2, 4)),
        intent("other", (1, 1), producer="q"),
    )
    assert await store.producers_with_open_requests() == ["p", "q"]
    assert await store.fence("p", NOW_US + 5) == 2
    assert await store.producers_with_open_requests() == ["q"]
    assert [how(await one(store, each)) for each in ("a", "b", "other")] == ["SUCCEEDED", "ABORTED", "open"]
    closed = await one(store, "b")
    assert closed.closed_by_logging
    assert closed.store_time_us == NOW_US + 5
    assert closed.ended is not None
    aborted = events_pb2.RequestEnded.FromString(closed.ended)
    assert aborted.facts.identity.tenant_id == "tenant-a"
    assert aborted.end_time.ToMicroseconds() == NOW_US + 5

    answer, _ = await store.sync(report((2, 1, 4), epoch=2), NOW_US)
    assert (answer.fenced, answer.next_epoch) == (True, 3)
    applied = await store.apply(Batch(TOPIC, [outcome("b", (2, 5))]), NOW_US)
    assert applied.late_outcomes == 1
    answer, _ = await store.sync(report((3, 1, 1), epoch=3), NOW_US)
    assert not answer.fenced
    await take(store, intent("late", (2, 6)))
    assert how(await one(store, "late")) == "open"
    assert await store.fence("p", NOW_US) == 1


async def test_an_older_copy_of_a_spool_is_told_to_begin_anew(store: AuditStore) -> None:
    await take(store, intent("a", (7, 1)))
    answer, _ = await store.sync(report(epoch=5), NOW_US)
    assert (answer.fenced, answer.next_epoch) == (True, 8)


async def test_a_settled_intent_that_is_open_is_closed(store: AuditStore) -> None:
    await take(store, intent("lost", (1, 1)), intent("running", (1, 4)))
    _, closed = await store.sync(report((1, 1, 4), settled=(1, 4)), NOW_US)
    assert closed == 0, "events of the report are missing"
    await take(store, note((1, 2)), note((1, 3)))
    _, closed = await store.sync(report((1, 1, 4)), NOW_US)
    assert closed == 0, "nothing is said of what is settled"
    _, closed = await store.sync(report((1, 1, 4), settled=(1, 4)), NOW_US)
    assert closed == 1
    assert [how(await one(store, each)) for each in ("lost", "running")] == ["ABORTED", "open"]


async def test_pages_hold_every_record_once_the_newest_first(store: AuditStore) -> None:
    for number in range(25):
        await take(store, intent(f"r{number:02}", (1, number + 1), time_us=number // 3))
    seen: list[str] = []
    cursor = None
    while page := await store.search(EVERYTHING, 7, cursor):
        seen += [record.request_id for record in page]
        cursor = Cursor(page[-1].receive_time_us, page[-1].request_id)
        # A record that changes meanwhile keeps its place.
        await take(store, outcome("r05", (2, 1), time_us=1))
    assert seen == [f"r{number:02}" for number in reversed(range(25))]


async def test_filters(store: AuditStore) -> None:
    await take(store, intent("a", (1, 1), time_us=10), outcome("a", (1, 2), time_us=10))
    await take(store, intent("b", (1, 3), time_us=20))
    await take(store, outcome("c", (1, 4), how=Outcome.REJECTED, tenant_id="tenant-b", time_us=30))
    expected = {
        RecordFilter(): ["c", "b", "a"],
        RecordFilter(request_id="b"): ["b"],
        RecordFilter(tenant_id="tenant-a"): ["b", "a"],
        RecordFilter(client_id="client-a"): ["c", "b", "a"],
        RecordFilter(client_id="nobody"): [],
        RecordFilter(outcome=Outcome.REJECTED): ["c"],
        RecordFilter(open_only=True): ["b"],
        RecordFilter(receive_time_from_us=20): ["c", "b"],
        RecordFilter(receive_time_before_us=20): ["a"],
        RecordFilter(tenant_id="tenant-a", receive_time_from_us=11, receive_time_before_us=30): ["b"],
        RecordFilter(tenant_id="'; DROP TABLE requests; --"): [],
    }
    for which, ids in expected.items():
        assert [record.request_id for record in await store.search(which, 10, None)] == ids, which
        newest, position = await store.newest(which, 10)
        assert sorted(record.request_id for record in newest) == sorted(ids)
        assert position == 4


async def test_following_sees_each_change_in_order(store: AuditStore) -> None:
    await take(store, intent("a", (1, 1)), intent("b", (1, 2)), outcome("a", (1, 3)))
    newest, position = await store.newest(EVERYTHING, 1)
    assert ([record.request_id for record in newest], position) == (["a"], 3)
    assert await store.newest(EVERYTHING, 0) == ([], 3)
    found, position = await store.changed(EVERYTHING, 0, 1)
    assert ([record.request_id for record in found], position) == (["b"], 2)
    found, position = await store.changed(EVERYTHING, position, 10)
    assert ([record.request_id for record in found], position) == (["a"], 3)
    assert await store.changed(EVERYTHING, 3, 10) == ([], 3)
    assert await store.changed(RecordFilter(tenant_id="nobody"), 0, 10) == ([], 3)
    await store.fence("p", NOW_US)
    found, position = await store.changed(EVERYTHING, 3, 10)
    assert [(record.request_id, how(record)) for record in found] == [("b", "ABORTED")]


async def test_of_a_mere_place_nothing_but_the_place_is_kept(store: AuditStore) -> None:
    """As of a job, which the schedule has, or of a record that cannot be read."""
    before = await take(store, intent("a", (1, 1)))
    at = [EventRead("p", Place(1, n), 1, PlaceRead()) for n in (2, 3, 5)]
    assert await take(store, *at) == before
    answer, _ = await store.sync(report((1, 1, 5)), NOW_US)
    assert answer.watermarks == {1: 3}
    await take(store, intent("b", (1, 4)))
    answer, _ = await store.sync(report((1, 1, 5)), NOW_US)
    assert answer.watermarks == {1: 5}
    assert await store.other_events(10) == []


async def test_sqlite_makes_of_random_batches_what_the_store_in_memory_does(tmp_path: Path) -> None:
    """Intents and outcomes of few requests, in any order, again and again, more than a statement takes."""
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    memory, sqlite = MemoryStore(), SqliteStore(tmp_path / "audit.db")
    await sqlite.start()
    sequence = 0
    for number in range(60):
        events = []
        for _ in range(rng.choice((1, 5, 40, 200))):
            sequence += 1
            request_id, place = f"r{rng.randrange(40 + 10 * number)}", (1, sequence)
            if rng.random() < 0.5:
                events.append(intent(request_id, place, time_us=sequence))
            else:
                ended = rng.choice((Outcome.SUCCEEDED, Outcome.FAILED))
                events.append(outcome(request_id, place, how=ended, time_us=sequence))
        batch = Batch(TOPIC, events, {0: sequence})
        assert await sqlite.apply(batch, number) == await memory.apply(batch, number)
        if number % 10 == 0:
            assert await sqlite.fence("p", number) == await memory.fence("p", number)
        held = report((1, 1, sequence))
        assert await sqlite.sync(held, 0) == await memory.sync(held, 0)
    for which in (EVERYTHING, RecordFilter(open_only=True), RecordFilter(outcome=Outcome.FAILED)):
        assert await sqlite.changed(which, 0, 10_000) == await memory.changed(which, 0, 10_000)
    await sqlite.stop()


async def test_sqlite_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    first = SqliteStore(path)
    await first.start()
    await first.apply(Batch(TOPIC, [intent("a"), intent("c", (1, 9))], {0: 5}), NOW_US)
    await first.stop()
    second = SqliteStore(path)
    await second.start()
    assert how(await one(second, "a")) == "open"
    assert await second.offsets(TOPIC) == {0: 5}
    await second.apply(Batch(TOPIC, [outcome(f"r{n}", (1, n)) for n in range(2, 9)]), NOW_US)
    answer, _ = await second.sync(report((1, 1, 9)), NOW_US)
    assert answer.watermarks == {1: 9}
    await second.stop()
    assert path.stat().st_mode & 0o077 == 0


async def test_sqlite_belongs_to_one_process(tmp_path: Path) -> None:
    first, second = SqliteStore(tmp_path / "audit.db"), SqliteStore(tmp_path / "audit.db")
    await first.start()
    with pytest.raises(OSError, match="in use by another process"):
        await second.start()
    await second.stop()
    await first.stop()


async def test_sqlite_refuses_what_is_no_audit_log(tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"no database at all" * 100)
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE other (x)")
    for name, reason in (("garbage.db", "cannot be used"), ("other.db", "no audit log of this version")):
        store = SqliteStore(tmp_path / name)
        with pytest.raises(OSError, match=reason):
            await store.start()
        await store.stop()


async def test_sqlite_stores_all_of_a_batch_or_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "audit.db")
    await store.start()
    broken = outcome("b", (1, 2))
    unstorable = EventRead("p", Place(1, 3), 1, OtherRead("gap", 2**70, b""))
    with pytest.raises((DependencyUnavailable, OverflowError)):
        await store.apply(Batch(TOPIC, [intent("a"), broken, unstorable], {0: 3}), NOW_US)
    assert await store.search(EVERYTHING, 10, None) == []
    assert await store.offsets(TOPIC) == {}
    assert await take(store, intent("a")) == 1
    await store.stop()
    with pytest.raises(DependencyUnavailable):
        await store.offsets(TOPIC)


async def test_sqlite_stops_a_search_that_reads_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(tmp_path / "audit.db")
    await store.start()
    for start in range(1, 60_000, 5000):
        await take(store, *(intent(f"r{n}", (1, n)) for n in range(start, start + 5000)))
    monkeypatch.setattr(sqlite_file, "MAX_READ_STEPS", 0)
    with pytest.raises(Overloaded, match="reads too much"):
        await store.search(RecordFilter(client_id="nobody"), 10, None)
    assert len(await store.search(EVERYTHING, 10, None)) == 10
    await store.stop()
