"""Stores of auth under many at once: in one process, and of several processes on one PostgreSQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from services.auth.credentials import keys
from services.auth.first_start import KeyFile, ensure_administrator
from services.auth.signing.ring import KeyRing
from services.auth.store import Filter, Kind, SigningKey, Tenant
from services.auth.stores import database
from services.mesh.app import StartError
from services.mesh.clock import ManualClock
from services.mesh.errors import AlreadyExists, Conflict, DataCorrupt, DependencyUnavailable, Overloaded
from tests.framework.auth_stores import (
    NOW,
    StartedStore,
    StoresOf,
    api_key,
    batch,
    client,
    creates,
    delete,
    revocation,
    tenant,
    update,
)
from tests.framework.postgres import PostgresServer


@pytest.fixture(params=["memory", "sqlite", "postgresql", "several on postgresql"])
async def stores(request: pytest.FixtureRequest, auth_stores_of: StoresOf) -> list[StartedStore]:
    """Four: of as many processes where the database can be shared, or the same one four times."""
    kind = request.param.removeprefix("several on ")
    made = await auth_stores_of(kind, 4 if kind != request.param else 1)
    return made * (4 // len(made))


async def test_one_of_many_wins(stores: list[StartedStore]) -> None:
    outcomes = await asyncio.gather(
        *(store.commit(creates(tenant())) for store in stores * 10), return_exceptions=True
    )
    assert outcomes.count(1) == 1
    assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == 39


async def test_a_first_start_happens_once(stores: list[StartedStore]) -> None:
    firsts = [
        replace(creates(tenant(f"t{n}"), client(f"c{n}", f"t{n}")), only_if_empty=True) for n in range(12)
    ]
    outcomes = await asyncio.gather(
        *(store.commit(first) for store, first in zip(stores * 3, firsts, strict=True)),
        return_exceptions=True,
    )
    assert outcomes.count(1) == 1
    assert len(await stores[0].list(Kind.TENANT, Filter(), limit=100)) == 1


async def test_no_update_is_lost(stores: list[StartedStore]) -> None:
    """Each adds its own scope to what it read; who is told of a conflict reads again."""
    await stores[0].commit(creates(tenant(), client()))

    async def add(store: StartedStore, scope: str) -> None:
        while True:
            stored = await store.get(Kind.CLIENT, "app")
            assert stored is not None
            changed = replace(stored.resource, scopes=stored.resource.scopes | {scope})  # type: ignore[union-attr]
            try:
                await store.commit(update(changed, stored.version))
                return
            except Conflict:
                continue

    await asyncio.gather(*(add(store, f"scope-{n}") for n, store in enumerate(stores * 3)))
    found = await stores[0].find_client("app")
    assert found is not None
    assert found.client.scopes == {f"scope-{n}" for n in range(12)}
    assert await stores[0].version() == 13


async def test_r23_who_follows_the_versions_misses_none(stores: list[StartedStore]) -> None:
    """Revocations appear in the order of their versions, however many commit at once."""
    total, done = 60, asyncio.Event()

    async def commit(n: int) -> None:
        await stores[n % len(stores)].commit(batch(revocations=[revocation(f"token-{n}")]))

    async def follow(store: StartedStore) -> list[str]:
        seen: list[str] = []
        last = 0
        while True:
            finished = done.is_set()
            for one in await store.revocations(after_version=last, now=NOW):
                seen.append(one.revoked.subject_id)
                last = max(last, one.version)
            if finished:
                return seen
            await asyncio.sleep(0)

    readers = [asyncio.create_task(follow(store)) for store in stores]
    await asyncio.gather(*(commit(n) for n in range(total)))
    done.set()
    everything = {f"token-{n}" for n in range(total)}
    for reader in readers:
        seen = await reader
        assert len(seen) == total
        assert set(seen) == everything


async def test_policy_and_its_version_are_of_one_moment(stores: list[StartedStore]) -> None:
    done = asyncio.Event()

    async def read(store: StartedStore) -> None:
        while not done.is_set():
            version, document = await store.policy()
            assert len(document.tenants) == version
            await asyncio.sleep(0)

    readers = [asyncio.create_task(read(store)) for store in stores]
    for n in range(40):
        await stores[n % len(stores)].commit(creates(tenant(f"t{n}")))
    done.set()
    await asyncio.gather(*readers)


async def test_an_id_is_used_once(stores: list[StartedStore]) -> None:
    until = NOW + timedelta(minutes=1)
    outcomes = await asyncio.gather(*(store.use_once("id", until=until, now=NOW) for store in stores * 5))
    assert sorted(outcomes) == [False] * 19 + [True]


async def test_one_makes_the_next_signing_key(stores: list[StartedStore]) -> None:
    added = await asyncio.gather(
        *(
            store.add_signing_key(SigningKey(f"kid-{n}", b"x" * 32, False, NOW), after_kid="")
            for n, store in enumerate(stores * 3)
        )
    )
    assert sorted(added) == [False] * 11 + [True]


async def test_last_uses_and_commits_hold_nobody_up(stores: list[StartedStore]) -> None:
    names = [f"key-{n}" for n in range(30)]
    await stores[0].commit(creates(tenant(), client(), *(api_key(name, "app", name) for name in names)))

    async def use(store: StartedStore, order: list[str]) -> None:
        for n in range(5):
            await store.used({name: NOW + timedelta(seconds=n) for name in order})

    async def change(store: StartedStore, order: list[str]) -> None:
        for n in range(5):
            for name in order:
                key = replace(api_key(name, "app", name), display_name=f"{n}")
                await store.commit(update(key))

    await asyncio.gather(
        *(use(store, names if n % 2 else names[::-1]) for n, store in enumerate(stores)),
        *(change(store, names[n : n + 3]) for n, store in enumerate(stores)),
    )
    page = await stores[0].list(Kind.API_KEY, Filter(), limit=100)
    assert {stored.last_used_at for stored in page} == {NOW + timedelta(seconds=4)}


async def test_callers_who_give_up_block_nobody(stores: list[StartedStore]) -> None:
    await stores[0].commit(creates(tenant()))
    for n in range(30):
        store = stores[n % len(stores)]
        tasks = [
            asyncio.create_task(store.commit(update(Tenant("acme", display_name=f"{n}-{m}"))))
            for m in range(3)
        ]
        for _ in range(n):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    version = await stores[0].version()
    for store in stores:
        version += 1
        assert await store.commit(update(Tenant("acme", display_name=f"{version}"))) == version
    assert len(await stores[0].changes(limit=1000)) == version


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_too_many_are_told_to_wait(
    kind: str, auth_stores_of: StoresOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store,) = await auth_stores_of(kind, 1)
    monkeypatch.setattr(database, "MAX_PENDING", 20)
    outcomes = await asyncio.gather(*(store.version() for _ in range(50)), return_exceptions=True)
    assert outcomes.count(0) == 20
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 30
    assert await store.version() == 0


async def test_r22_processes_on_one_database_sign_with_the_same_keys(auth_stores_of: StoresOf) -> None:
    clock = ManualClock()
    rings = [
        KeyRing(store, clock, rotation_s=100, publish_ahead_s=20, token_ttl_s=10)
        for store in await auth_stores_of("postgresql", 3)
    ]
    await asyncio.gather(*(ring.start() for ring in rings))
    for ring in rings:
        await ring.stop()  # and from here on step by step
    signed: set[str] = set()
    for _ in range(60):
        await asyncio.gather(*(ring.rotate() for ring in rings))
        assert len({ring.jwks_json() for ring in rings}) <= 2  # while one of them has just made a key
        (kid,) = {ring.current()[0] for ring in rings}
        assert all(ring.knows(kid) for ring in rings)
        signed.add(kid)
        await clock.advance(5)
    assert len(signed) >= 3


async def test_two_processes_make_one_administrator(auth_stores_of: StoresOf, tmp_path: Path) -> None:
    stores = await auth_stores_of("postgresql", 2)
    files = [KeyFile(tmp_path / f"{n}" / "admin-key") for n in range(2)]
    starts = (
        ensure_administrator(store, file, ManualClock()) for store, file in zip(stores, files, strict=True)
    )
    await asyncio.gather(*starts)
    (file,) = (file for file in files if file.exists())
    found = await stores[0].find_api_key(keys.parse_api_key(file.path.read_text().strip()).prefix)
    assert found is not None
    assert found[1].client.roles == {"admin"}
    assert all(file.provisional() is None for file in files)
    assert len(await stores[0].list(Kind.API_KEY, Filter(), limit=10)) == 1


async def test_several_processes_migrate_at_once(postgres: PostgresServer) -> None:
    name = await postgres.make_database()
    stores = [postgres.store(name, 2) for _ in range(5)]
    await asyncio.gather(*(store.start() for store in stores))
    assert [await store.version() for store in stores] == [0] * 5
    for store in stores:
        await store.stop()


async def test_a_server_that_goes_away_and_comes_back() -> None:
    server = PostgresServer()
    try:
        server.start()
        store = server.store(await server.make_database())
        await store.start()
        await store.commit(creates(tenant()))
        server.pause()
        for _ in range(3):
            with pytest.raises(DependencyUnavailable):
                await store.find_client("app")
            with pytest.raises(DependencyUnavailable):
                await store.commit(delete(Kind.TENANT, "acme"))
        other = server.store("postgres")
        with pytest.raises(StartError, match="cannot be reached"):
            await other.start()
        await other.stop()
        server.resume()
        assert not await store.is_empty()
        assert await store.commit(delete(Kind.TENANT, "acme")) == 2
        await store.stop()
        with pytest.raises(DependencyUnavailable, match="closed"):
            await store.version()
    finally:
        server.stop()


@pytest.mark.parametrize("damage", ["DELETE FROM state", "DROP TABLE signing_keys CASCADE; DROP TABLE state"])
async def test_damage_is_told_from_absence(postgres: PostgresServer, damage: str) -> None:
    name = await postgres.make_database()
    store = postgres.store(name)
    await store.start()
    await postgres.execute(damage, name)
    with pytest.raises(DataCorrupt):
        await store.version()
    with pytest.raises(DataCorrupt):
        await store.commit(creates(tenant()))
    await store.stop()
