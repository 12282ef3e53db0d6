"""The stores of auth and of the schedule: each test that takes one runs on all of them."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.auth.stores.memory import MemoryStore
from services.auth.stores.opening import sqlite_store
from services.logging.schedule.store import Bounds, ScheduleStore
from tests.framework.auth_stores import StartedStore, StoresOf
from tests.framework.postgres import PostgresServer
from tests.framework.schedule_jobs import MakeStore, memory_store
from tests.framework.schedule_jobs import sqlite_store as schedule_file


@pytest.fixture(scope="session")
async def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with this version's schema and nothing in it; migrations have tests of their own."""
    path = tmp_path_factory.mktemp("migrated") / "auth.db"
    store = sqlite_store(path)
    await store.start()
    await store.stop()
    return path


@pytest.fixture
async def auth_stores_of(
    request: pytest.FixtureRequest, tmp_path: Path, migrated_file: Path
) -> AsyncIterator[StoresOf]:
    """Makes stores, and stops them."""
    made: list[StartedStore] = []
    taken: list[tuple[PostgresServer, str]] = []

    async def make(kind: str, count: int) -> list[StartedStore]:
        stores: list[StartedStore] = []
        if kind == "memory":
            stores = [MemoryStore()]
        elif kind == "sqlite":
            shutil.copy(migrated_file, tmp_path / "auth.db")
            stores = [sqlite_store(tmp_path / "auth.db")]
        else:
            server: PostgresServer = request.getfixturevalue("postgres")
            name = await server.take()
            taken.append((server, name))
            stores = [server.store(name) for _ in range(count)]
        for store in stores:
            made.append(store)
            await store.start()
        return stores

    yield make
    for store in made:
        await store.stop()
    for server, name in taken:
        await server.give_back(name)


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def auth_store(request: pytest.FixtureRequest, auth_stores_of: StoresOf) -> StartedStore:
    """Started, and empty."""
    (store,) = await auth_stores_of(request.param, 1)
    return store


@pytest.fixture(params=["memory", "sqlite"])
def make_schedule(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    """Makes one, which the test starts and stops."""

    def make(bounds: Bounds) -> ScheduleStore:
        return memory_store(bounds) if request.param == "memory" else schedule_file(tmp_path, bounds)

    return make


@pytest.fixture
async def schedule(make_schedule: MakeStore) -> AsyncIterator[ScheduleStore]:
    store = make_schedule(Bounds())
    await store.start()
    yield store
    await store.stop()
