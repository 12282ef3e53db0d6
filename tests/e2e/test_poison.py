"""Poison among good events, on a real broker, in a real logging process (R35)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from llmos.events.v1 import events_pb2
from llmos.gateway.v1 import job_service_pb2, job_service_pb2_grpc

from deploy.dev.broker import Broker
from services.logging.schedule.machine import Machine, Rules
from services.logging.schedule.store import Bounds, JobFilter
from services.logging.schedule.stores.sqlite import SqliteScheduleStore
from services.logging.settings import LoggingSettings
from services.logging.stores.sqlite import SqliteStore
from services.mesh import event_codec, job_codec
from services.mesh.audit_protocol import Place
from services.mesh.broker import PLACE_HEADER, Record, Topic
from services.mesh.errors import NotFound
from services.mesh.event_codec import EventEncoder
from services.mesh.jobs import DeadLettered, JobRequested, JobState, RetryRequested
from services.mesh.kafka import KafkaPublisher, KafkaSource
from tests.conftest import MeshFactory
from tests.framework.audit_path import ended, outcomes, started
from tests.framework.calls import spec
from tests.framework.job_events import job
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

REQUESTS = 4_500
JOBS = 1_000
POISON = 100
PRODUCERS = 4
READ = (Topic.AUDIT, Topic.JOBS, Topic.RETRY)


class Producer:
    """A gateway's spool, as the broker sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.encoder = EventEncoder("gateway", name)
        self._sequence = 0

    def record(self, body: bytes, topic: Topic, outcome_of: str | None = None) -> Record:
        self._sequence += 1
        place = Place(1, self._sequence)
        value = event_codec.complete(body, self.name, place, 1, outcome_of)
        header = (PLACE_HEADER, f"1/{self._sequence}".encode())
        return Record(self.name.encode(), value, (header,), topic)

    def request(self, request_id: str, now: datetime) -> Iterator[Record]:
        yield self.record(self.encoder.started(started(request_id), now)[0], Topic.AUDIT)
        yield self.record(self.encoder.ended(ended(request_id), now), Topic.AUDIT, request_id)

    def job(self, submitted: JobRequested, now: datetime, *, retried: bool = False) -> Record:
        event = RetryRequested(submitted, "req", "REPLICA_LOST", 1) if retried else submitted
        body = job_codec.encode(event, source="gateway", producer=self.name, time=now)
        return self.record(body, Topic.RETRY if retried else Topic.JOBS)


def poison(number: int, producer: Producer, now: datetime, draw: random.Random) -> Record:
    """One of several kinds; the value tells the number."""
    mark = b"poison %d " % number
    ancient = job(f"ancient-{number}", create_time=now - timedelta(days=9), method=mark.decode())
    good = producer.job(job(f"poison-{number}", create_time=now, method=mark.decode()), now)
    topic = READ[number % len(READ)]
    match number % 7:
        case 0:
            value = mark + draw.randbytes(200)
        case 1:
            value = good.value[: len(good.value) // 2]
        case 2:
            envelope = events_pb2.EventEnvelope.FromString(good.value)
            envelope.job.ClearField("identity")
            return Record(good.key, envelope.SerializeToString(), good.headers, Topic.JOBS)
        case 3:
            envelope = events_pb2.EventEnvelope.FromString(good.value)
            envelope.ClearField("producer")
            return Record(b"", envelope.SerializeToString(), (), topic)
        case 4:
            value = mark + bytes(900_000)
        case 5:
            return Record(good.key, good.value, good.headers, Topic.AUDIT)
        case _:
            body = job_codec.encode(ancient, source="gateway", producer=producer.name, time=now)
            return Record(good.key, body, good.headers, Topic.JOBS)
    return Record(good.key, value, good.headers, topic)


async def lag(mesh: MeshHarness, settings: LoggingSettings) -> int:
    """How many records the group of logging has not read, over all topics."""
    admin = AIOKafkaAdminClient(bootstrap_servers=mesh.plan.bootstrap)
    await admin.start()
    try:
        marks = await admin.list_consumer_group_offsets("llmos-logging")
    finally:
        await admin.close()
    behind = 0
    for topic in READ:
        source = KafkaSource(settings, topic, group="test")
        await source.open({})
        ends = await source.ends()
        await source.close()
        name = settings.topic_name(topic)
        read = {at.partition: mark.offset for at, mark in marks.items() if at.topic == name}
        behind += sum(end - read.get(partition, 0) for partition, end in ends.items())
    return behind


async def dead_letters(settings: LoggingSettings, count: int) -> list[DeadLettered]:
    """What the dead-letter topic has, once it is so many."""
    source = KafkaSource(settings, Topic.DEAD_LETTER, group="test")
    await source.open({})
    found: dict[str, DeadLettered] = {}

    async def all_there() -> bool:
        for record in await source.poll(500, 0.5):
            event = job_codec.read(record.value).event
            assert isinstance(event, DeadLettered)
            found[events_pb2.EventEnvelope.FromString(record.value).id] = event
        return len(found) >= count

    try:
        await eventually(all_there, what="dead letters", timeout_s=120)
    finally:
        await source.close()
    return list(found.values())


async def test_r35_poison_is_found_with_its_bytes_and_holds_nothing_up(
    make_mesh: MeshFactory, broker: Broker, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    draw = random.Random(seed)
    mesh = make_mesh(broker)
    settings = LoggingSettings(
        kafka_bootstrap_servers=broker.bootstrap,
        kafka_topic_prefix=mesh.plan.topic_prefix,
        state_dir=tmp_path,
        service_secret_file=tmp_path / "secret",
    )
    now = datetime.now(UTC)
    producers = [Producer(f"gateway-{n}-test") for n in range(PRODUCERS)]
    records: list[Record] = []
    for number in range(REQUESTS):
        records += producers[number % PRODUCERS].request(f"req-{number}", now)
    for number in range(JOBS):
        submitted = job(f"job-{number}", create_time=now)
        records.append(producers[number % PRODUCERS].job(submitted, now, retried=number % 2 == 1))
    bad = [poison(n, producers[n % PRODUCERS], now, draw) for n in range(POISON)]
    for record in bad:
        records.insert(draw.randrange(len(records) + 1), record)

    publisher = KafkaPublisher(settings)
    await mesh.start("auth", "logging")
    size, batch = 0, []
    for record in records:
        batch.append(record)
        size += len(record.value)
        if size > 500_000:
            await publisher.publish(batch)
            size, batch = 0, []
    await publisher.publish(batch)
    await publisher.close()

    found = await dead_letters(settings, POISON)
    assert len(found) == POISON
    as_jobs = {letter.job_id for letter in found if letter.job is not None}
    assert as_jobs == {f"ancient-{n}" for n in range(POISON) if n % 7 == 6}
    raw = {letter.raw for letter in found if letter.job is None}
    assert raw == {record.value for number, record in enumerate(bad) if number % 7 != 6}

    async def caught_up() -> bool:
        return await lag(mesh, settings) == 0

    await eventually(caught_up, what="no lag", timeout_s=60)
    await mesh.stop("logging")
    await judge_stores(mesh.state.root / "logging")
    await mesh.start("logging", "inference", "gateway")
    await replay_runs_once(mesh)


async def replay_runs_once(mesh: MeshHarness) -> None:
    """A job that is given up, and replayed for a model that there is."""
    jobs = job_service_pb2_grpc.JobServiceStub(mesh.channel())
    bearer = mesh.bearer()

    async def ended(job_id: str) -> job_service_pb2.Job:
        watched = jobs.WatchJob(job_service_pb2.WatchJobRequest(id=job_id), metadata=bearer, timeout=60)
        return [response.job async for response in watched][-1]

    request = job_service_pb2.SubmitJobRequest(work={"generate": spec("once", model="nowhere")})
    submitted = (await jobs.SubmitJob(request, metadata=bearer, timeout=30)).job
    assert (await ended(submitted.id)).state == job_service_pb2.JOB_STATE_FAILED
    replay = job_service_pb2.ReplayDeadLetterRequest(id=submitted.id, override={"model": "echo"})
    replayed = (await jobs.ReplayDeadLetter(replay, metadata=bearer, timeout=30)).job
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await jobs.ReplayDeadLetter(replay, metadata=bearer, timeout=30)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    final = await ended(replayed.id)
    assert (final.state, final.attempts) == (job_service_pb2.JOB_STATE_SUCCEEDED, 1)


async def judge_stores(folder: Path) -> None:
    """Everything good is stored, no poison is a job, and a dead letter that is replayed runs once."""
    audit = SqliteStore(folder / "audit.db")
    await audit.start()
    assert await outcomes(audit) == {f"req-{n}": "SUCCEEDED" for n in range(REQUESTS)}
    await audit.stop()
    schedule = SqliteScheduleStore(folder / "schedule.db", Machine(Rules(), random.random), Bounds())
    await schedule.start()
    try:
        jobs = await schedule.list_jobs(JobFilter(states=frozenset({JobState.WAITING})), 20_000, None)
        assert {each.job_id for each, _ in jobs.items} == {f"job-{n}" for n in range(JOBS)}
        now = datetime.now(UTC)
        now_us = int(now.timestamp() * 1_000_000)
        letter, _ = await schedule.dead_letter("ancient-6", "")
        replayed = job("replayed", create_time=now)
        await schedule.replay(letter.dead_letter_id, "", replayed, now_us)
        with pytest.raises(NotFound):
            await schedule.replay(letter.dead_letter_id, "", job("again", create_time=now), now_us)
        claimed = []  # for longer than this test lasts, so that no gateway comes upon them
        while claims := (await schedule.claim("w", 256, now_us + 10**9, now_us + 10**8)).claims:
            claimed += [claim.job.job_id for claim in claims]
        assert claimed.count("replayed") == 1
        assert len(claimed) == JOBS + 1
    finally:
        await schedule.stop()
