"""Kafka for tests: one for the whole run, or one of a test's own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from deploy.dev.broker import Broker
from deploy.dev.environment import ROOT
from deploy.dev.ports import PortReservations


def dist() -> Path:
    """Where the jars are kept; one folder may serve several checkouts."""
    return Path(os.environ.get("LLMOS_KAFKA_DIST") or ROOT / ".state" / "kafka-dist")


def prepare(
    folder: Path,
    reservations: PortReservations,
    *,
    port: int | None = None,
    advertised_port: int | None = None,
) -> Broker:
    """A broker that is ready to be started. Mind that this takes seconds and blocks."""
    taken = reservations.take(["kafka", "controller"])
    broker = Broker(
        folder,
        port=port or taken["kafka"],
        controller_port=taken["controller"],
        dist=dist(),
        log_file=folder / "kafka.log",
        advertised_port=advertised_port,
    )
    broker.prepare()
    return broker


def start_blocking(broker: Broker) -> None:
    """Starts it and waits until it is ready, outside of any event loop."""
    broker.start()
    _run(broker.wait_ready())


def stop_blocking(broker: Broker) -> None:
    """Ends it at once: what it holds is of no more use."""
    if broker.process.running:
        broker.kill()
    broker.process.end_group()


def _run(coroutine: object) -> None:
    loop = asyncio.new_event_loop()  # asyncio.run() would leave the thread without a loop of its own
    try:
        loop.run_until_complete(coroutine)  # type: ignore[arg-type]
    finally:
        loop.close()
