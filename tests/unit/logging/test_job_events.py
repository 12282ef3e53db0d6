"""Jobs from the spool to the schedule, what cannot be read to the dead letters, and news of both to Kafka."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmos.events.v1 import events_pb2

from services.logging.outbox import Outbox
from services.logging.schedule.job import Failed, to_us
from services.logging.schedule.machine import Machine, Rules
from services.logging.schedule.schedule import Limits, Schedule
from services.logging.schedule.store import Bounds, DeadLetterFilter, JobFilter
from services.logging.schedule.stores.memory import MemoryScheduleStore
from services.logging.stores.memory import MemoryStore
from services.mesh import event_codec, job_codec, validation
from services.mesh.audit_protocol import Place
from services.mesh.broker import Record, Topic
from services.mesh.clock import ManualClock
from services.mesh.errors import DependencyUnavailable
from services.mesh.jobs import DeadLettered, JobAttempt, JobEvent, JobState, RetryRequested, Sealed
from tests.framework.audit_path import (
    DirectWatermarks,
    LoggingProcess,
    make_relay,
    make_spool,
    running,
    serve,
)
from tests.framework.job_events import NOW, job, job_events
from tests.framework.memory_broker import MemoryBroker, MemoryPublisher, MemorySource
from tests.framework.schedule_jobs import report_one
from tests.framework.waiting import eventually


class World:
    """All parts, with a broker in memory."""

    def __init__(self, folder: Path, clock: ManualClock | None = None, bounds: Bounds | None = None) -> None:
        self.broker = MemoryBroker()
        self.watermarks = DirectWatermarks()
        self.spool = make_spool(folder / "spool")
        self.relay = make_relay(self.spool, MemoryPublisher(self.broker), self.watermarks)
        self.clock = clock
        self.scheduled = MemoryScheduleStore(Machine(Rules(), lambda: 0.5), bounds or Bounds())
        self.store = MemoryStore()
        self.logging = self.new_logging()

    def new_logging(self) -> LoggingProcess:
        return LoggingProcess(
            self.store,
            partial(MemorySource, self.broker),
            self.watermarks,
            clock=self.clock,
            publisher=MemoryPublisher(self.broker),
            scheduled=self.scheduled,
        )

    async def jobs(self) -> dict[str, JobState]:
        found = (await self.scheduled.list_jobs(JobFilter(), 10_000, None)).items
        return {each.job_id: each.state for each, _ in found}

    async def has(self, *job_ids: str) -> bool:
        return set(await self.jobs()) == set(job_ids) and not self.spool.ledger.held_events

    def published(self, topic: Topic) -> list[tuple[str, JobEvent]]:
        """(envelope's id, event) of what logging published."""
        found = []
        for record in self.broker.topics[topic][0]:
            envelope = events_pb2.EventEnvelope.FromString(record.value)
            validation.validate(envelope)
            if not envelope.epoch:
                assert (envelope.source, envelope.producer, record.key) == (
                    "logging",
                    "logging-0",
                    b"logging-0",
                )
                found.append((envelope.id, job_codec.read(record.value).event))
        return found


async def test_jobs_and_retries_reach_the_schedule_and_leave_the_spool(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with running(world.spool, world.relay, world.logging):
        await serve(world.spool, "a")
        await world.spool.append_job(job("job_1"))
        await world.spool.append_job(RetryRequested(job("job_2"), "req_2", "REPLICA_LOST", 1))
        await serve(world.spool, "b")
        await eventually(lambda: world.has("job_1", "job_2"))
        found, sealed, _ = await world.scheduled.get("job_1") or (None, None, None)
        assert found is not None
        assert replace(found.request, request=sealed or Sealed("", b"")) == job("job_1")
        found, _, _ = await world.scheduled.get("job_2") or (None, None, None)
        assert found is not None
        assert found.attempts == 1, "the request's own"
        assert await world.store.other_events(10) == [], "the audit log keeps nothing of them"
        assert {topic: len(world.broker.topics[topic][0]) for topic in Topic} == {
            Topic.AUDIT: 4,
            Topic.JOBS: 1,
            Topic.RETRY: 1,
            Topic.DEAD_LETTER: 0,
        }


async def test_r29_a_broker_that_lost_its_data_gets_jobs_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with running(world.spool, world.relay):
        await serve(world.spool, "a")
        await world.spool.append_job(job("job_1"))
        await world.spool.append_job(RetryRequested(job("job_2"), "req_2", "REPLICA_LOST", 1))
        await eventually(lambda: world.broker.topics[Topic.RETRY][0])
        world.broker.wipe()
        async with running(world.logging):
            await eventually(lambda: world.has("job_1", "job_2"))


async def test_a_schedule_that_is_full_lets_jobs_wait_and_stays_healthy(tmp_path: Path) -> None:
    world = World(tmp_path, bounds=Bounds(max_jobs=2))
    async with running(world.spool, world.relay, world.logging):
        for number in range(3):
            await world.spool.append_job(job(f"job_{number}"))
            await eventually(lambda: not world.spool.appended.is_set())
            await eventually(lambda n=number: len(world.broker.topics[Topic.JOBS][0]) >= n + 1)
        await eventually(lambda: world.logging.sources[Topic.JOBS].opened > 2)  # type: ignore[attr-defined]
        assert set(await world.jobs()) <= {"job_0", "job_1"}
        assert world.logging.healthy_of[Topic.JOBS] == [True]
        assert world.spool.ledger.held_events > 0
        world.scheduled._transactions._bounds = Bounds()
        await eventually(lambda: world.has("job_0", "job_1", "job_2"))


def poison(good: bytes) -> dict[str, bytes]:
    """By what is wrong with it."""
    without_identity = events_pb2.EventEnvelope.FromString(good)
    without_identity.job.ClearField("identity")
    dead = job_codec.encode(
        DeadLettered("INTERNAL", "x"), source="gateway", producer="p", time=NOW, event_id="dead/1"
    )
    return {
        "not an EventEnvelope": b"\xff nothing",
        "no producer": b"",
        "identity": without_identity.SerializeToString(),
        "a dead letter": dead,
        "no place": event_codec.complete(good, "p", Place(1, 2), 9, None).replace(b"\x28\x01", b"\x28\x00"),
    }


async def test_r35_poison_on_each_topic_becomes_dead_letters_with_its_bytes(tmp_path: Path) -> None:
    world = World(tmp_path)
    good = job_codec.encode(job("good"), source="gateway", producer="p", time=NOW)
    bad = poison(good)
    topics = (Topic.AUDIT, Topic.JOBS, Topic.RETRY)
    async with running(world.logging):
        for topic in topics:
            for value in bad.values():
                await world.broker.append(0, [Record(b"someone", value, (), topic)])
        await world.broker.append(0, [Record(b"p", good, (), Topic.JOBS)])
        total = len(topics) * len(bad)
        await eventually(lambda: len(world.published(Topic.DEAD_LETTER)) == total)
        found = [event for _, event in world.published(Topic.DEAD_LETTER) if isinstance(event, DeadLettered)]
        expected = {
            (f"llmos.{topic.name.lower()}.v1", offset, value)
            for topic in topics
            for offset, value in enumerate(bad.values())
        }
        assert {(event.topic, event.offset, event.raw) for event in found} == expected
        jobs = [event for event in found if event.topic == "llmos.jobs.v1"]
        for event, said in zip(sorted(jobs, key=lambda e: e.offset), bad, strict=True):
            assert event.error_reason == "DATA_CORRUPT"
            assert said in event.detail or said == "no place", event.detail
        await eventually(lambda: world.logging.sources[Topic.JOBS].positions() == {0: len(bad) + 1})
        assert set(await world.jobs()) == {"good"}
    # Read again, they change nothing.
    world.store = MemoryStore()
    logging = world.logging = world.new_logging()
    async with running(logging):
        for topic in topics:
            await eventually(lambda t=topic: logging.sources[t].positions().get(0, 0) >= len(bad))
        await serve_nothing(world)
        letters = (await world.scheduled.dead_letters(DeadLetterFilter(unreadable=True), 1000, None)).items
        assert len(letters) == total
        assert len(world.published(Topic.DEAD_LETTER)) == total


async def serve_nothing(world: World) -> None:
    """Until the outbox is empty."""

    async def empty() -> bool:
        return not await world.scheduled.outbox(1)

    await eventually(empty)


async def test_what_is_too_old_is_given_up_as_the_job_that_it_is(tmp_path: Path) -> None:
    clock = ManualClock(NOW + timedelta(days=7))
    world = World(tmp_path, clock)
    known = job("known", create_time=NOW - timedelta(days=2), give_up_time=NOW + timedelta(days=5))
    ancient = job("ancient", create_time=NOW - timedelta(days=9), give_up_time=NOW + timedelta(days=1))
    late = job("late", create_time=NOW - timedelta(hours=2))
    await world.scheduled.accept([known], to_us(NOW))
    async with running(world.logging):
        for each in (known, ancient, late):
            value = job_codec.encode(each, source="gateway", producer="p", time=NOW)
            await world.broker.append(0, [Record(b"p", value, (), Topic.JOBS)])

        async def given_up() -> bool:
            await clock.advance(0.1)
            return len(world.published(Topic.DEAD_LETTER)) == 3

        await eventually(given_up)
    letters = dict(world.published(Topic.DEAD_LETTER))
    assert set(letters) == {"dead/known", "dead/ancient", "dead/late"}
    for name, submitted in (("ancient", ancient), ("late", late)):
        letter = letters[f"dead/{name}"]
        assert isinstance(letter, DeadLettered)
        assert (letter.job, letter.error_reason) == (submitted, "DEADLINE_EXCEEDED")
    assert "eight days" in letters["dead/ancient"].detail  # type: ignore[union-attr]


def failed() -> Failed:
    return Failed("REPLICA_LOST", 14, "The replica was lost.", retryable=True)


async def test_retries_and_dead_letters_are_published_once_kafka_is_there(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.broker.down = True
    now_us = to_us(NOW)
    await world.scheduled.accept([job("job_1", max_attempts=2)], now_us)
    for attempt in (1, 2):
        (claim,) = (await world.scheduled.claim("w", 1, now_us + 10**9, now_us)).claims
        await report_one(world.scheduled, "job_1", claim.job.fence, f"req_{attempt}", failed(), now_us)
        now_us += 60 * 10**6
    async with running(world.logging):
        await eventually(lambda: world.logging.consumer is not None)
        assert len(await world.scheduled.outbox(10)) == 2
        world.broker.down = False
        await eventually(lambda: world.published(Topic.DEAD_LETTER))
        await serve_nothing(world)
        (retry_id, retry), (dead_id, dead) = (
            *world.published(Topic.RETRY),
            *world.published(Topic.DEAD_LETTER),
        )
        assert (retry_id, dead_id) == ("retry/job_1/1", "dead/job_1")
        assert isinstance(retry, RetryRequested)
        assert (retry.job, retry.attempts, retry.request_id) == (job("job_1", max_attempts=2), 1, "req_1")
        assert isinstance(dead, DeadLettered)
        assert [attempt.request_id for attempt in dead.history] == ["req_1", "req_2"]
        # Logging reads its own retries, which tell it nothing new.
        await eventually(lambda: world.logging.sources[Topic.RETRY].positions() == {0: 1})
        assert await world.jobs() == {"job_1": JobState.FAILED}


class Forgetting:
    """A schedule that fails after Kafka took the rows."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.fails = True

    async def outbox(self, limit: int) -> object:
        return await self._schedule.outbox(limit)

    async def published(self, numbers: Sequence[int]) -> None:
        if self.fails:
            raise DependencyUnavailable("The disk fails.")
        await self._schedule.published(numbers)

    async def news(self) -> None:
        await self._schedule.news()


async def test_a_repeat_has_the_same_id(tmp_path: Path) -> None:
    world = World(tmp_path)
    clock = ManualClock(NOW)
    schedule = Schedule(world.scheduled, clock, Limits())
    await schedule.accept([DeadLettered("DATA_CORRUPT", "x", raw=b"y", topic="t", offset=3)])
    forgetting = Forgetting(schedule)
    outbox = Outbox(
        forgetting,  # type: ignore[arg-type]
        MemoryPublisher(world.broker),
        clock,
        source="logging",
        producer="logging-0",
    )
    try:
        await outbox.publish_once()
    except DependencyUnavailable:
        forgetting.fails = False
    assert await outbox.publish_once() == 1
    assert await outbox.publish_once() == 0
    first, second = world.published(Topic.DEAD_LETTER)
    assert first == second


async def test_what_is_too_large_for_kafka_is_told_in_short(tmp_path: Path) -> None:
    world = World(tmp_path)
    clock = ManualClock(NOW)
    attempt = JobAttempt(1, "req", "w", NOW, NOW, "REPLICA_LOST", 14, "\U0001f600" * 1024)
    large = job("large", request=Sealed("k", b"x" * 1_000_000))
    news = DeadLettered("REPLICA_LOST", "x", "large", 20, job=large, history=(attempt,) * 20)

    class News:
        async def outbox(self, limit: int) -> object:
            from services.logging.schedule.store import OutboxRow

            return [OutboxRow(1, "dead/large", to_us(NOW), news)]

        async def published(self, numbers: Sequence[int]) -> None:
            assert numbers == [1]

    publisher = MemoryPublisher(world.broker)
    outbox = Outbox(News(), publisher, clock, source="logging", producer="logging-0")  # type: ignore[arg-type]
    await outbox.publish_once()
    ((_, told),) = world.published(Topic.DEAD_LETTER)
    assert told == replace(news, job=replace(large, request=Sealed("k", b"")))
    assert len(world.broker.topics[Topic.DEAD_LETTER][0][0].value) < 1_000_000


@settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(events=st.lists(job_events | st.binary(max_size=100), max_size=8))
async def test_whatever_comes_is_taken(events: list[JobEvent | bytes], tmp_path: Path) -> None:
    """Else one record would stop all that come after it."""
    world = World(tmp_path, ManualClock(NOW))
    records = [
        each if isinstance(each, bytes) else job_codec.encode(each, source="gateway", producer="p", time=NOW)
        for each in events
    ]
    await world.broker.append(0, [Record(b"p", value, (), Topic.JOBS) for value in records])
    consumer = world.logging.consumers[Topic.JOBS]
    await consumer.open()
    assert await consumer.step(100, 0) == len(records)
    assert world.logging.outbox is not None
    while await world.logging.outbox.publish_once():
        pass
