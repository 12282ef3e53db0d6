"""The broker is a real Kafka; it keeps what it has taken when it is killed."""

from __future__ import annotations

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from deploy.dev.broker import Broker


async def publish(broker: Broker, topic: str, *values: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, acks="all")
    await producer.start()
    try:
        for value in values:
            await producer.send_and_wait(topic, value)
    finally:
        await producer.stop()


async def read(broker: Broker, topic: str, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(bootstrap_servers=broker.bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, 0)])
        await consumer.seek_to_beginning()
        return [(await consumer.getone()).value for _ in range(count)]
    finally:
        await consumer.stop()


async def test_the_run_has_a_broker(broker: Broker) -> None:
    await publish(broker, "basics", b"one", b"two")
    assert await read(broker, "basics", 2) == [b"one", b"two"]


async def test_a_killed_broker_comes_back_with_its_data(own_broker: Broker) -> None:
    await publish(own_broker, "kept", b"before")
    own_broker.kill()
    own_broker.start()
    await own_broker.wait_ready()
    await publish(own_broker, "kept", b"after")
    assert await read(own_broker, "kept", 2) == [b"before", b"after"]
