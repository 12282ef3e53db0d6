"""Fixtures for all tests; what they are made of stands in tests/framework."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from deploy.dev.broker import Broker
from deploy.dev.ports import PortReservations
from deploy.dev.processes import TAIL_LINES
from tests.framework import broker as brokers
from tests.framework import forks as forking
from tests.framework import valkey as valkeys
from tests.framework.forks import Forks
from tests.framework.mesh import MeshHarness
from tests.framework.postgres import WITHOUT, PostgresServer, programs

# As in the engine's process (docs/decisions/0021): threads of torch that spin while they wait take the cores
# from each other wherever tests run side by side.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# How long an example takes is the machine's affair: beside other work more than hypothesis allows by default.
hypothesis.settings.register_profile("llmos", deadline=None, print_blob=True)
hypothesis.settings.load_profile("llmos")

MeshFactory = Callable[..., MeshHarness]
ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """A shell starts what runs in its background deaf to Ctrl-C, and our processes would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = ("tests/chaos/", "tests/unit/inference/", "tests/unit/test_optimised.py")
"""Begun first, so that no process of a run is left alone with a long file at its end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/e2e and tests/chaos runs real processes."""
    items.sort(key=lambda item: not item.path.relative_to(ROOT).as_posix().startswith(LONG))
    for item in items:
        if {"e2e", "chaos"} & set(item.path.parts):
            item.add_marker(pytest.mark.e2e)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    """A failed test shows the last lines of each process that it ran."""
    report = yield
    if report.failed:
        for harness in _harnesses(item):
            for name, process in harness.processes.items():
                what = "running" if process.running else f"ended with {process.exit_code}"
                report.sections.append((f"{name} ({what}), {process.log_file}", process.tail(TAIL_LINES)))
    return report


def _harnesses(item: pytest.Item) -> list[MeshHarness]:
    found: list[MeshHarness] = []
    for value in getattr(item, "funcargs", {}).values():
        if isinstance(value, MeshHarness):
            found.append(value)
        found += getattr(value, "made", [])
    return found


@pytest.fixture(scope="session")
def reservations() -> Iterator[PortReservations]:
    """Ports of this run."""
    reservations = PortReservations()
    yield reservations
    reservations.release()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The run's PostgreSQL; started by the first test that needs it."""
    if programs() is None:
        pytest.skip(WITHOUT)
    server = PostgresServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def valkey() -> Iterator[valkeys.ValkeyServer]:
    """The run's Valkey, for tests that only use it; one that breaks it takes `own_valkey`."""
    if valkeys.program() is None:
        pytest.skip(valkeys.WITHOUT)
    with valkeys.ValkeyServer() as server:
        yield server


@pytest.fixture
def own_valkey() -> Iterator[valkeys.ValkeyServer]:
    """A Valkey that a test may kill, freeze and start again."""
    if valkeys.program() is None:
        pytest.skip(valkeys.WITHOUT)
    with valkeys.ValkeyServer(password="canary-password") as server:
        yield server


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory, reservations: PortReservations) -> Iterator[Broker]:
    """The run's Kafka; started by the first test that needs it. A test that breaks it takes `own_broker`."""
    broker = brokers.prepare(tmp_path_factory.mktemp("kafka"), reservations)
    brokers.start_blocking(broker)
    yield broker
    brokers.stop_blocking(broker)


@pytest.fixture
def own_broker(tmp_path: Path, reservations: PortReservations) -> Iterator[Broker]:
    """A Kafka that a test may kill, freeze and start again (`start`, `wait_ready`)."""
    broker = brokers.prepare(tmp_path / "kafka", reservations)
    brokers.start_blocking(broker)
    yield broker
    brokers.stop_blocking(broker)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks | None]:
    """What the run's meshes start their services from; None where it is not possible."""
    if not forking.SUPPORTED:
        yield None
        return
    forks = Forks()
    yield forks
    forks.close()


class _MeshFactory:
    def __init__(self, folder: Path, reservations: PortReservations, forks: Forks | None) -> None:
        self._folder, self._reservations, self._forks = folder, reservations, forks
        self.made: list[MeshHarness] = []

    def __call__(self, broker: Broker | None, **options: Any) -> MeshHarness:
        options.setdefault("forks", self._forks)
        mesh = MeshHarness(self._folder / f"mesh{len(self.made)}", broker, self._reservations, **options)
        self.made.append(mesh)
        return mesh


@pytest.fixture
async def make_mesh(
    tmp_path: Path, reservations: PortReservations, forks: Forks | None
) -> AsyncIterator[MeshFactory]:
    """Makes meshes: `make_mesh(broker, tls=True)`, see MeshHarness; nothing is started yet."""
    factory = _MeshFactory(tmp_path, reservations, forks)
    yield factory
    for mesh in factory.made:
        await mesh.close()


@pytest.fixture
def mesh(make_mesh: MeshFactory, broker: Broker) -> MeshHarness:
    """A mesh of the test's own with the run's broker: `await mesh.start()`, or only some of its services."""
    return make_mesh(broker, measured=True)
