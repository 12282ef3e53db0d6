"""aiokafka, with limits: the ports of `broker` over a real Kafka.

An aiokafka producer buffers without a limit and its `stop` may hang while the broker is away, so one is
thrown away after each failure, with all it has buffered, and a new one is made for the next attempt: the
spool has the events. Idempotence is off, since an idempotent producer never gives up; duplicates are removed
by event id. A consumer may hang without a sign: whoever reads compares `ends` with its progress and opens it
anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError
from aiokafka.partitioner import murmur2
from aiokafka.structs import OffsetAndMetadata

from services.mesh.broker import Headers, ReceivedRecord, Record, Topic
from services.mesh.errors import DependencyUnavailable
from services.mesh.settings import KafkaSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

REQUEST_TIMEOUT_S = 8.0
CONNECT_TIMEOUT_S = 10.0
PUBLISH_TIMEOUT_S = 12.0
CLOSE_TIMEOUT_S = 2.0
METADATA_MAX_AGE_S = 30.0
MAX_BATCH_BYTES = 768 * 1024
"""Below the 1 MiB that brokers take by default."""
MAX_FETCH_BYTES = 4 * 1024 * 1024
FETCH_WAIT_S = 4.0
"""So long the broker holds a question for records while it has none. It answers with the first record that
comes, so this delays none. `ends` goes over the same connection and is answered after it, so this is well
below REQUEST_TIMEOUT_S."""
LOOK_AROUND_MS = 2000
"""So often aiokafka's reader looks whether its partitions are others; ours stay until it is opened anew."""
HOLD_S = 0.5
"""So long aiokafka's reader waits for us to take what it has of a partition, before it asks for the others
alone: the broker may hold that question for FETCH_WAIT_S, and until then nobody asks for the first one. More
than our pauses between polls."""
TOPIC_ALREADY_EXISTS = 36


@dataclass(frozen=True, slots=True)
class KafkaTopic:
    """A topic and how it is made where it does not exist."""

    name: str
    partitions: int
    replication: int


def kafka_topic(settings: KafkaSettings, topic: Topic) -> KafkaTopic:
    """A topic as this deployment names and makes it."""
    return KafkaTopic(settings.topic_name(topic), settings.kafka_partitions, settings.kafka_replication)


class KafkaPublisher:
    """A `RecordPublisher`."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._producer: AIOKafkaProducer | None = None
        self._ensured: set[Topic] = set()
        """Topics that are known to exist since the producer was made."""
        self._closing: set[asyncio.Task[None]] = set()

    async def publish(self, records: Sequence[Record]) -> None:
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                producer = await self._ready({record.topic for record in records})
                await self._send(producer, records)
        except (KafkaError, OSError, TimeoutError) as error:
            self._discard()
            raise DependencyUnavailable(f"Kafka does not take records: {_reason(error)}") from error
        except BaseException:
            self._discard()
            raise

    async def close(self) -> None:
        self._discard()
        if self._closing:
            await asyncio.wait(self._closing, timeout=3 * CLOSE_TIMEOUT_S)

    async def _ready(self, topics: set[Topic]) -> AIOKafkaProducer:
        for topic in sorted(topics - self._ensured):
            await ensure_topic(self._settings, kafka_topic(self._settings, topic))
            self._ensured.add(topic)
        if self._producer is None:
            self._producer = AIOKafkaProducer(
                **_connection(self._settings),
                acks="all",
                enable_idempotence=False,
                compression_type="zstd",
                max_batch_size=MAX_BATCH_BYTES,
                linger_ms=0,  # batches come made
            )
            await self._producer.start()
        return self._producer

    async def _send(self, producer: AIOKafkaProducer, records: Sequence[Record]) -> None:
        by_key: dict[tuple[Topic, bytes], list[Record]] = {}
        for record in records:
            by_key.setdefault((record.topic, record.key), []).append(record)
        sent = []
        for (kind, key), batch_of in by_key.items():
            topic = self._settings.topic_name(kind)
            partitions = sorted(await producer.partitions_for(topic))
            partition = partitions[(murmur2(key) & 0x7FFFFFFF) % len(partitions)]
            batch = producer.create_batch()
            for record in batch_of:
                headers = list(record.headers)
                if batch.append(key=key, value=record.value, timestamp=None, headers=headers) is None:
                    sent.append(await producer.send_batch(batch, topic, partition=partition))
                    batch = producer.create_batch()
                    batch.append(key=key, value=record.value, timestamp=None, headers=headers)
            sent.append(await producer.send_batch(batch, topic, partition=partition))
        await asyncio.gather(*sent)

    def _discard(self) -> None:
        producer, self._producer = self._producer, None
        self._ensured.clear()
        if producer is not None:
            _behind(_close_producer(producer), self._closing)


class KafkaSource:
    """A `RecordSource` over all partitions of a topic. There is one reader, so no group is joined; `group`
    is the name under which lag monitors find it."""

    def __init__(self, settings: KafkaSettings, topic: Topic, *, group: str) -> None:
        self._settings = settings
        self._topic = kafka_topic(settings, topic)
        self._group = group
        self._consumer: AIOKafkaConsumer | None = None
        self._next: dict[int, int] = {}
        self._marks: dict[int, int] = {}
        self._committing: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self, offsets: Mapping[int, int]) -> None:
        self._discard()
        consumer = AIOKafkaConsumer(
            **_connection(self._settings),
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_bytes=MAX_FETCH_BYTES,
            max_partition_fetch_bytes=MAX_FETCH_BYTES // 4,
            fetch_max_wait_ms=int(FETCH_WAIT_S * 1000),
            consumer_timeout_ms=LOOK_AROUND_MS,
        )
        self._consumer = consumer
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await ensure_topic(self._settings, self._topic)
                await consumer.start()
                consumer._fetcher._prefetch_backoff = HOLD_S  # nothing public sets it; 0.1 without
                partitions = await self._partitions(consumer)
                consumer.assign(partitions)
                ends = await consumer.end_offsets(partitions)
                begins = await consumer.beginning_offsets(partitions)
                for partition in partitions:
                    # What we know may be of another log than this one, if Kafka lost its data.
                    known = offsets.get(partition.partition, 0)
                    at = known if begins[partition] <= known <= ends[partition] else begins[partition]
                    consumer.seek(partition, at)
                    self._next[partition.partition] = at
        except (KafkaError, OSError, TimeoutError) as error:
            self._discard()
            raise DependencyUnavailable(f"Kafka cannot be read: {_reason(error)}") from error
        except BaseException:
            self._discard()
            raise

    async def poll(self, max_records: int, timeout_s: float) -> list[ReceivedRecord]:
        consumer = self._opened()
        fetched = await self._bounded(
            consumer.getmany(timeout_ms=int(timeout_s * 1000), max_records=max_records),
            timeout_s + REQUEST_TIMEOUT_S,
        )
        records = []
        for partition, found in fetched.items():
            number = partition.partition
            records += [
                ReceivedRecord(
                    number, each.offset, each.key or b"", each.value or b"", _without_nulls(each.headers)
                )
                for each in found
            ]
            if found:
                self._next[number] = found[-1].offset + 1
        return records

    async def ends(self) -> dict[int, int]:
        consumer = self._opened()
        partitions = consumer.assignment()
        known = consumer.partitions_for_topic(self._topic.name)
        if known is not None and known != {partition.partition for partition in partitions}:
            raise DependencyUnavailable("Kafka's topic has other partitions than before")
        found = await self._bounded(consumer.end_offsets(list(partitions)), REQUEST_TIMEOUT_S)
        ends = {partition.partition: end for partition, end in found.items()}
        if any(at > ends.get(partition, 0) for partition, at in self._next.items()):
            raise DependencyUnavailable("Kafka's topic was emptied or made anew")
        return ends

    def positions(self) -> dict[int, int]:
        return dict(self._next)

    async def commit(self, offsets: Mapping[int, int]) -> None:
        """Returns at once: reading does not wait for what only monitors look at."""
        self._marks.update(offsets)
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit(), name="audit-commit")

    async def _commit(self) -> None:
        while self._marks and self._consumer is not None:
            marks = {
                TopicPartition(self._topic.name, partition): OffsetAndMetadata(offset, "")
                for partition, offset in self._marks.items()
            }
            self._marks = {}
            with contextlib.suppress(KafkaError, TimeoutError, OSError):
                await asyncio.wait_for(self._consumer.commit(marks), REQUEST_TIMEOUT_S)

    async def close(self) -> None:
        if self._committing is not None:
            await asyncio.wait([self._committing], timeout=CLOSE_TIMEOUT_S)
            self._committing.cancel()
        self._discard()
        if self._closing:
            await asyncio.wait(self._closing, timeout=3 * CLOSE_TIMEOUT_S)

    def _opened(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise DependencyUnavailable("Kafka is not open")
        return self._consumer

    async def _partitions(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        # `consumer.partitions_for_topic` knows only topics that are subscribed or assigned already.
        metadata = await consumer._client.fetch_all_metadata()
        found = metadata.partitions_for_topic(self._topic.name)
        if not found:
            raise DependencyUnavailable(f"Kafka does not show the topic {self._topic.name} yet")
        return [TopicPartition(self._topic.name, partition) for partition in sorted(found)]

    async def _bounded(self, awaitable: Awaitable[T], timeout_s: float) -> T:
        try:
            return await asyncio.wait_for(awaitable, timeout_s)
        except (KafkaError, OSError, TimeoutError) as error:
            raise DependencyUnavailable(f"Kafka cannot be read: {_reason(error)}") from error

    def _discard(self) -> None:
        consumer, self._consumer = self._consumer, None
        self._next.clear()
        if consumer is not None:
            _behind(_close_consumer(consumer), self._closing)


async def ensure_topic(settings: KafkaSettings, topic: KafkaTopic) -> None:
    """Makes the topic where it does not exist. Where that is not allowed to us, somebody else has to."""
    admin = AIOKafkaAdminClient(**_connection(settings))
    try:
        await admin.start()
        response = await admin.create_topics([NewTopic(topic.name, topic.partitions, topic.replication)])
        for name, code, *message in response.topic_errors:
            if code not in (0, TOPIC_ALREADY_EXISTS):
                logger.warning("Kafka does not create the topic %s: %s (code %d)", name, message, code)
    finally:
        with contextlib.suppress(KafkaError, OSError, TimeoutError):
            await asyncio.wait_for(admin.close(), CLOSE_TIMEOUT_S)


def _connection(settings: KafkaSettings) -> dict[str, Any]:
    if logger.getEffectiveLevel() > logging.DEBUG:
        # It tells of each attempt in vain, many a second; whoever uses this module tells once.
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers,
        "client_id": f"llmos-{settings.name}",
        "request_timeout_ms": int(REQUEST_TIMEOUT_S * 1000),
        "metadata_max_age_ms": int(METADATA_MAX_AGE_S * 1000),
        "retry_backoff_ms": 100,
        "security_protocol": settings.kafka_security_protocol,
    }
    if "SSL" in settings.kafka_security_protocol:
        context = ssl.create_default_context(cafile=settings.kafka_ca_file)
        if settings.kafka_cert_file and settings.kafka_key_file:
            context.load_cert_chain(settings.kafka_cert_file, settings.kafka_key_file)
        options["ssl_context"] = context
    if settings.kafka_security_protocol.startswith("SASL") and settings.kafka_sasl_password_file:
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_sasl_username
        options["sasl_plain_password"] = settings.kafka_sasl_password_file.read_text().strip()
    return options


async def _close_producer(producer: AIOKafkaProducer) -> None:
    with contextlib.suppress(KafkaError, OSError, TimeoutError):
        await asyncio.wait_for(producer.stop(), CLOSE_TIMEOUT_S)
        return
    # It waits for a broker that is away. Without connections it cannot go on waiting.
    with contextlib.suppress(KafkaError, OSError, TimeoutError):
        await asyncio.wait_for(producer.client.close(), CLOSE_TIMEOUT_S)
    task = producer._sender.sender_task  # nothing public ends it
    if task is not None:
        task.cancel()
        await asyncio.wait([task], timeout=CLOSE_TIMEOUT_S)


async def _close_consumer(consumer: AIOKafkaConsumer) -> None:
    with contextlib.suppress(KafkaError, OSError, TimeoutError):
        await asyncio.wait_for(consumer.stop(), CLOSE_TIMEOUT_S)
        return
    with contextlib.suppress(KafkaError, OSError, TimeoutError):
        await asyncio.wait_for(consumer._client.close(), CLOSE_TIMEOUT_S)


def _behind(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _without_nulls(headers: tuple[tuple[str, bytes | None], ...]) -> Headers:
    """As they are, where all have values."""
    for _, value in headers:
        if value is None:
            return tuple((key, value or b"") for key, value in headers)
    return cast("Headers", headers)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
