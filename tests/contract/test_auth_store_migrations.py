"""The schema of auth's store: from every released version up, and down again, on both databases."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.auth.store import Client, Filter, Kind, SigningKey, Tenant
from services.auth.stores import database, tables
from services.auth.stores.codec import to_us
from services.auth.stores.database import Database
from services.auth.stores.migrating import migrate
from services.auth.stores.sql import SqlStore
from services.mesh.app import StartError
from services.mesh.policy import Effect, Role, Rule
from tests.framework.auth_stores import HOSTILE, NOW, api_key, client, creates, everything, tenant
from tests.framework.postgres import PostgresServer

FIRST_VERSION = """
    CREATE TABLE schema_version (version INTEGER NOT NULL);
    INSERT INTO schema_version VALUES (1);
    CREATE TABLE tenants (
        tenant_id TEXT PRIMARY KEY,
        created_us INTEGER NOT NULL
    );
    CREATE TABLE clients (
        client_id TEXT PRIMARY KEY,
        tenant_id TEXT NOT NULL REFERENCES tenants,
        secret_digest BLOB NOT NULL,
        created_us INTEGER NOT NULL
    );
    CREATE TABLE client_scopes (
        client_id TEXT NOT NULL REFERENCES clients,
        scope TEXT NOT NULL,
        PRIMARY KEY (client_id, scope)
    ) WITHOUT ROWID;
    CREATE TABLE api_keys (
        key_id TEXT PRIMARY KEY,
        client_id TEXT NOT NULL REFERENCES clients,
        prefix TEXT NOT NULL UNIQUE,
        digest BLOB NOT NULL,
        created_us INTEGER NOT NULL,
        expires_us INTEGER
    );
    CREATE TABLE api_key_scopes (
        key_id TEXT NOT NULL REFERENCES api_keys,
        scope TEXT NOT NULL,
        PRIMARY KEY (key_id, scope)
    ) WITHOUT ROWID;
    CREATE TABLE signing_keys (
        kid TEXT PRIMARY KEY,
        private BLOB NOT NULL,
        sealed INTEGER NOT NULL,
        signs_from_us INTEGER NOT NULL
    );
"""
"""What the first version wrote into a file, word for word."""

US = to_us(NOW)
DAY_US = 86_400_000_000
FIRST_DATA: dict[str, list[tuple[Any, ...]]] = {
    "tenants": [("default", US), ("empty", US + 1)],
    "clients": [
        ("admin", "default", b"\x00\xff" * 16, US),
        ("app", "default", b"x" * 32, US),
        ("none", "default", b"", US),
    ],
    "client_scopes": [("admin", "admin"), ("admin", "generate"), ("app", "generate")],
    "api_keys": [
        ("key_1", "admin", "aaaaaaaa", b"\x80" * 32, US, None),
        ("key_2", "app", "bbbbbbbb", b"\x81" * 32, US, US + DAY_US),
        ("key_3", "none", "cccccccc", b"\x82" * 32, US, None),
    ],
    "api_key_scopes": [("key_1", "admin"), ("key_1", "generate"), ("key_2", "generate")],
    "signing_keys": [("kid-b", b"\x01" * 32, 0, US), ("kid-a", b"sealed", 1, US + DAY_US)],
}
Open = Callable[[], Awaitable[Database]]


@pytest.fixture(params=["sqlite", "postgresql"])
async def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the test's database, again and again."""
    if request.param == "sqlite":

        async def on_file() -> Database:
            return database.sqlite(tmp_path / "auth.db")

        return on_file
    server: PostgresServer = request.getfixturevalue("postgres")
    name = await server.make_database()

    async def on_server() -> Database:
        return database.postgresql(server.url(name), pool_size=2)

    return on_server


async def to(opened: Open, revision: str) -> None:
    place = await opened()
    await migrate(place, revision)
    await place.close()


async def fill_first(opened: Open, data: dict[str, list[tuple[Any, ...]]] = FIRST_DATA) -> None:
    place = await opened()
    async with place.write() as connection:
        for table, rows in data.items():
            for row in rows:
                names = {f"v{n}": value for n, value in enumerate(row)}
                places = ", ".join(f":{name}" for name in names)
                await connection.execute(sa.text(f"INSERT INTO {table} VALUES ({places})"), names)
    await place.close()


async def first_data(opened: Open) -> dict[str, list[tuple[Any, ...]]]:
    place = await opened()
    async with place.read() as connection:
        found = {
            table: sorted(tuple(row) for row in await connection.execute(sa.text(f"SELECT * FROM {table}")))
            for table in FIRST_DATA
        }
    await place.close()
    return found


async def store_on(opened: Open) -> SqlStore:
    store = SqlStore(await opened())
    await store.start()
    return store


async def check_kept(store: SqlStore) -> None:
    """What FIRST_DATA is today."""
    admin = await store.find_api_key("aaaaaaaa")
    assert admin is not None
    assert admin[0] == replace(
        api_key("key_1", "admin", "aaaaaaaa", "admin", "generate"), digest=b"\x80" * 32
    )
    secret = b"\x00\xff" * 16
    assert admin[1].client == Client(
        "admin", "default", scopes=frozenset({"admin", "generate"}), secret_digest=secret
    )
    assert admin[1].tenant == Tenant("default")
    app = await store.find_api_key("bbbbbbbb")
    assert app is not None
    assert (app[0].expires_at, app[0].disabled) == (NOW + timedelta(days=1), False)
    assert [key.kid for key in await store.signing_keys()] == ["kid-b", "kid-a"]
    assert list(await store.signing_keys()) == [
        SigningKey("kid-b", b"\x01" * 32, False, NOW),
        SigningKey("kid-a", b"sealed", True, NOW + timedelta(days=1)),
    ]
    stored = await store.get(Kind.TENANT, "empty")
    assert stored is not None
    assert (stored.created_at, stored.version) == (NOW + timedelta(microseconds=1), 1)
    assert await store.version() == 1
    assert (await store.policy())[0] == 1


async def test_up_with_data_down_and_up_again(opened: Open) -> None:
    await to(opened, "0001")
    await fill_first(opened)
    for _ in range(2):
        store = await store_on(opened)
        await check_kept(store)
        await store.stop()
        await to(opened, "0001")
        kept = await first_data(opened)
        # the key that could do nothing is disabled now, which the first version cannot say
        expected = {table: sorted(rows) for table, rows in FIRST_DATA.items()}
        expected["api_keys"] = [row for row in expected["api_keys"] if row[0] != "key_3"]
        assert kept == expected
    await to(opened, "base")
    place = await opened()
    async with place.read() as connection:
        names = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())
    assert names == ["alembic_version"]
    await place.close()


async def test_a_key_that_could_do_nothing_does_nothing(opened: Open) -> None:
    """No scopes used to mean none, and means all of the client's now."""
    await to(opened, "0001")
    await fill_first(opened)
    store = await store_on(opened)
    found = await store.find_api_key("cccccccc")
    assert found is not None
    assert found[0].disabled
    assert found[0].scopes == frozenset()
    await store.stop()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
async def test_r24_hostile_text_comes_up_and_down(opened: Open, text: str) -> None:
    await to(opened, "0001")
    data = {
        "tenants": [(text, US)],
        "clients": [(text, text, b"x", US)],
        "client_scopes": [(text, text)],
        "api_keys": [(text, text, text, b"x", US, None)],
        "api_key_scopes": [(text, text)],
        "signing_keys": [(text, b"x", 0, US)],
    }
    await fill_first(opened, data)
    store = await store_on(opened)
    found = await store.find_api_key(text)
    assert found is not None
    assert found[0].scopes == found[1].client.scopes == {text}
    assert (found[1].client.client_id, found[1].tenant.tenant_id) == (text, text)
    await store.stop()
    await to(opened, "0001")
    # scopes that do not exist are not carried back
    assert await first_data(opened) == data | {"client_scopes": [], "api_key_scopes": []}


async def test_down_nobody_can_do_more_than_before(opened: Open) -> None:
    store = await store_on(opened)
    denying = Role("denying", rules=(Rule("r", Effect.DENY, frozenset({"*"})),))
    held = {"generate", "models.read"}
    await store.commit(
        creates(
            Tenant("acme"),
            Tenant("off", disabled=True),
            Tenant("project", parent_id="off"),
            denying,
            replace(client("user"), roles=frozenset({"user"})),
            replace(client("denied", "acme", "generate"), roles=frozenset({"denying", "user"})),
            replace(client("disabled", "acme", "generate"), disabled=True),
            client("off", "off", "generate"),
            client("below", "project", "generate"),
            api_key("all", "user", "aaaaaaaa"),
            api_key("some", "user", "bbbbbbbb", "generate", "admin"),
            replace(api_key("disabled", "user", "cccccccc"), disabled=True),
            replace(api_key("models", "user", "dddddddd"), models=("a",)),
            replace(api_key("addresses", "user", "eeeeeeee"), addresses=(ip_network("10.0.0.0/8"),)),
            api_key("off", "off", "ffffffff", "generate"),
            api_key("denied", "denied", "gggggggg", "generate"),
        )
    )
    await store.stop()
    await to(opened, "0001")
    found = await first_data(opened)
    assert [row[0] for row in found["clients"]] == ["denied", "user"]
    assert found["client_scopes"] == [("user", scope) for scope in sorted(held)]
    assert [row[0] for row in found["api_keys"]] == ["all", "denied", "some"]
    assert found["api_key_scopes"] == [("all", "generate"), ("all", "models.read"), ("some", "generate")]


async def test_down_and_up_with_everything(opened: Open) -> None:
    store = await store_on(opened)
    await store.commit(creates(*everything()))
    await store.stop()
    await to(opened, "0001")
    store = await store_on(opened)
    assert len(await store.list(Kind.TENANT, Filter(), limit=10)) == 2
    assert await store.commit(creates(tenant())) == 2
    await store.stop()


async def test_the_tables_are_as_the_migrations_leave_them(opened: Open) -> None:
    await to(opened, "head")
    place = await opened()

    def differences(connection: sa.Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return [
            found
            for found in compare_metadata(context, tables.metadata)
            if getattr(found[1], "name", "") != "schema_version"
        ]

    async with place.read() as connection:
        assert await connection.run_sync(differences) == []
    await place.close()


@pytest.mark.parametrize("table", ["alembic_version", "schema_version"])
async def test_what_a_newer_version_wrote_is_refused(opened: Open, table: str) -> None:
    await to(opened, "head")
    place = await opened()
    async with place.write() as connection:
        if table == "alembic_version":
            await connection.execute(sa.text("UPDATE alembic_version SET version_num = '0099'"))
        else:
            await connection.execute(sa.text("DROP TABLE alembic_version"))
            await connection.execute(sa.text("UPDATE schema_version SET version = 99"))
    await place.close()
    store = SqlStore(await opened())
    with pytest.raises(StartError, match=r"newer version of llmos \(schema 99, this one knows 2\)"):
        await store.start()
    await store.stop()


async def test_a_step_that_fails_leaves_what_was_there(opened: Open) -> None:
    await to(opened, "0001")
    await fill_first(opened)
    place = await opened()
    async with place.write() as connection:
        await connection.execute(sa.text("CREATE TABLE used_ids (of_somebody_else INTEGER)"))
    await place.close()
    store = SqlStore(await opened())
    with pytest.raises(StartError, match="cannot be used"):
        await store.start()
    await store.stop()
    assert await first_data(opened) == {table: sorted(rows) for table, rows in FIRST_DATA.items()}


class TestFileOfTheFirstVersion:
    """As it was left on a disk: before there was Alembic."""

    def write(self, path: Path) -> None:
        with sqlite3.connect(path) as db:
            db.executescript(FIRST_VERSION)
            for table, rows in FIRST_DATA.items():
                db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
        db.close()

    async def test_is_taken_over(self, tmp_path: Path) -> None:
        path = tmp_path / "auth.db"
        self.write(path)
        for _ in range(2):
            store = SqlStore(database.sqlite(path))
            await store.start()
            await check_kept(store)
            await store.stop()

    async def test_the_first_revision_is_the_same(self, tmp_path: Path) -> None:
        def schema(path: Path) -> set[tuple[str, str]]:
            with sqlite3.connect(path) as db:
                found = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
            db.close()
            return {(name, "".join(sql.split())) for name, sql in found if name != "alembic_version"}

        self.write(tmp_path / "old.db")
        place = database.sqlite(tmp_path / "new.db")
        await migrate(place, "0001")
        await place.close()
        assert schema(tmp_path / "new.db") == schema(tmp_path / "old.db")

    async def test_after_a_downgrade_the_first_version_reads_it(self, tmp_path: Path) -> None:
        path = tmp_path / "auth.db"
        self.write(path)
        for revision, version in (("head", 2), ("0001", 1)):
            place = database.sqlite(path)
            await migrate(place, revision)
            await place.close()
            with sqlite3.connect(path) as db:
                # the first version refuses what is greater than 1
                assert db.execute("SELECT version FROM schema_version").fetchall() == [(version,)]
            db.close()
