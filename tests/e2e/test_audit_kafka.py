"""Audit events over a real Kafka: what is appended is stored once, whatever the broker goes through."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from pathlib import Path

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from deploy.dev.broker import Broker
from deploy.dev.ports import PortReservations
from services.logging.schedule.store import JobFilter
from services.logging.settings import LoggingSettings
from services.logging.stores.sqlite import SqliteStore
from services.mesh.broker import Topic
from services.mesh.jobs import RetryRequested
from services.mesh.kafka import KafkaPublisher, KafkaSource
from tests.framework import broker as brokers
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
from tests.framework.job_events import job
from tests.framework.proxy import TcpProxy
from tests.framework.waiting import eventually


def settings(bootstrap: str, folder: Path) -> LoggingSettings:
    return LoggingSettings(
        kafka_bootstrap_servers=bootstrap,
        kafka_topic_prefix=f"test-{secrets.token_hex(4)}",
        kafka_partitions=3,
        state_dir=folder,
        service_secret_file=folder / "secret",
    )


class AuditPath:
    """All parts over one broker; logging and the relay are started by the test."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        self.settings = settings(bootstrap, folder)
        self.topic = self.settings.topic_name(Topic.AUDIT)
        self.folder = folder
        self.watermarks = DirectWatermarks()
        self.spool = make_spool(folder / "spool")
        self.relay = make_relay(self.spool, KafkaPublisher(self.settings), self.watermarks)
        self.logging = self.new_logging()

    def new_logging(self) -> LoggingProcess:
        self.store = SqliteStore(self.folder / "audit.db")
        return LoggingProcess(
            self.store,
            lambda topic: KafkaSource(self.settings, topic, group=self.settings.kafka_topic_prefix),
            self.watermarks,
            prefix=self.settings.kafka_topic_prefix,
        )

    async def everything_stored(self, *request_ids: str) -> bool:
        found = await outcomes(self.store)
        return (
            all(found.get(each) == "SUCCEEDED" for each in request_ids) and not self.spool.ledger.held_events
        )


async def test_events_are_stored_soon_and_trimmed(broker: Broker, tmp_path: Path) -> None:
    path = AuditPath(broker.bootstrap, tmp_path)
    async with running(path.spool, path.relay, path.logging):
        await serve(path.spool, "warm")
        await eventually(lambda: path.everything_stored("warm"), timeout_s=30)
        begun = time.monotonic()
        await serve(path.spool, "soon")

        async def stored() -> bool:
            return (await outcomes(path.store)).get("soon") == "SUCCEEDED"

        await eventually(stored)
        print(f"stored after {(time.monotonic() - begun) * 1000:.0f} ms")
        ids = [f"r{n}" for n in range(300)]
        await asyncio.gather(*(serve(path.spool, each) for each in ids))
        await eventually(lambda: path.everything_stored(*ids))
    # Lag monitors see the group.
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    marks = await admin.list_consumer_group_offsets(path.settings.kafka_topic_prefix)
    await admin.close()
    assert sum(mark.offset for mark in marks.values()) == 604
    assert set(marks) <= {TopicPartition(path.topic, p) for p in range(3)}


async def test_r29_a_broker_that_lost_its_data_gets_it_again(own_broker: Broker, tmp_path: Path) -> None:
    path = AuditPath(own_broker.bootstrap, tmp_path)
    async with running(path.spool, path.relay):
        async with running(path.logging):
            await serve(path.spool, "before")
            await eventually(lambda: path.everything_stored("before"), timeout_s=30)
        await serve(path.spool, "between")
        await path.spool.append_started(started("long"))
        await path.spool.append_job(job("between"))
        await path.spool.append_job(RetryRequested(job("retried"), "req", "REPLICA_LOST", 1))
        await eventually(lambda: path.relay._plan.mark.sequence == 7, what="published", timeout_s=30)
        own_broker.kill()
        await own_broker.process.wait_ended(10)
        await serve(path.spool, "while down")
        await path.spool.append_job(job("while-down"))
        shutil.rmtree(own_broker.folder / "data")
        await asyncio.to_thread(own_broker.prepare)
        own_broker.start()
        await own_broker.wait_ready()
        logging = path.new_logging()
        async with running(logging):
            await path.spool.append_ended(ended("long"))
            await eventually(
                lambda: path.everything_stored("before", "between", "while down", "long"), timeout_s=60
            )
            jobs = await logging.scheduled.list_jobs(JobFilter(), 10, None)
            assert {each.job_id for each, _ in jobs.items} == {"between", "retried", "while-down"}


async def test_r28_a_broker_that_cannot_be_reached_holds_nobody_up(
    tmp_path: Path, reservations: PortReservations
) -> None:
    port = reservations.take(["behind the proxy"])["behind the proxy"]
    async with TcpProxy(f"127.0.0.1:{port}") as proxy:
        broker = brokers.prepare(
            tmp_path / "kafka",
            reservations,
            port=port,
            advertised_port=int(proxy.target.rpartition(":")[2]),
        )
        broker.start()
        try:
            await broker.wait_ready()
            path = AuditPath(proxy.target, tmp_path)
            ids: list[str] = []
            async with running(path.spool, path.relay, path.logging):
                for number, cut in enumerate((proxy.black_hole, proxy.reset, proxy.refuse)):
                    await serve(path.spool, f"before {number}")
                    await eventually(lambda n=number: path.everything_stored(f"before {n}"), timeout_s=60)
                    await cut()
                    begun = time.monotonic()
                    during = [f"during {number} {n}" for n in range(50)]
                    await serve(path.spool, *during)
                    assert time.monotonic() - begun < 5
                    await proxy.heal()
                    ids += during
                    await eventually(lambda ids=tuple(ids): path.everything_stored(*ids), timeout_s=60)
                await proxy.black_hole()
                await serve(path.spool, "at the end")
                begun = time.monotonic()
                await asyncio.gather(path.relay.stop(), path.logging.stop())
                assert time.monotonic() - begun < 10
                assert path.spool.ledger.held_events == 2
                await path.logging.start()
        finally:
            brokers.stop_blocking(broker)
