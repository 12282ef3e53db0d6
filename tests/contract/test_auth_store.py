"""What every store of auth must do; run by the one in memory and by SQLite, and on SQLite for its file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.auth.store import ApiKey, Client, SigningKey, Tenant
from services.auth.stores.memory import MemoryStore
from services.auth.stores.sqlite import SCHEMA_VERSION, SqliteStore
from services.mesh.app import StartError
from services.mesh.errors import AlreadyExists, DependencyUnavailable, NotFound

NOW = datetime(2030, 1, 1, 12, 30, 15, 123456, tzinfo=UTC)
HOSTILE = [
    "'; DROP TABLE clients; --",
    "' OR '1'='1",
    '" OR ""="',
    "%",
    "_",
    "a\x00b",
    "\\'; --",
    "/* */",
    "?1 :name @name $name",
    "Ünïcödé 名前 🔑 \u202e",
    " ",
    "a" * 10_000,
    "NULL",
    "1; PRAGMA writable_schema=1",
]

AnyStore = MemoryStore | SqliteStore


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnyStore]:
    opened = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "auth.db")
    await opened.start()
    yield opened
    await opened.stop()


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def tenant(tenant_id: str = "acme") -> Tenant:
    return Tenant(tenant_id, NOW)


def client(client_id: str = "app", tenant_id: str = "acme", *scopes: str) -> Client:
    return Client(client_id, tenant_id, bytes(range(32)), frozenset(scopes), NOW)


def api_key(key_id: str = "key_1", client_id: str = "app", prefix: str = "abcdefgh", *scopes: str) -> ApiKey:
    return ApiKey(key_id, client_id, prefix, bytes(32), frozenset(scopes), NOW, NOW + timedelta(days=1))


class TestTenantsAndClients:
    async def test_begins_empty(self, store: AnyStore) -> None:
        assert await store.is_empty()
        assert await store.find_client("app") is None
        assert await store.find_api_key("abcdefgh") is None
        assert list(await store.signing_keys()) == []

    async def test_gives_back_what_was_put_in(self, store: AnyStore) -> None:
        await store.create_tenant(tenant())
        assert not await store.is_empty()
        made = client("app", "acme", "generate", "models.read")
        await store.create_client(made)
        assert await store.find_client("app") == made
        assert await store.find_client("App") is None

    async def test_a_client_without_scopes(self, store: AnyStore) -> None:
        await store.create_tenant(tenant())
        await store.create_client(client())
        assert await store.find_client("app") == client()

    async def test_an_id_is_taken_once(self, store: AnyStore) -> None:
        await store.create_tenant(tenant())
        with pytest.raises(AlreadyExists):
            await store.create_tenant(tenant())
        await store.create_client(client("app", "acme", "generate"))
        with pytest.raises(AlreadyExists):
            await store.create_client(client("app", "acme", "admin"))
        found = await store.find_client("app")
        assert found is not None
        assert found.scopes == {"generate"}

    async def test_a_client_needs_its_tenant(self, store: AnyStore) -> None:
        with pytest.raises(NotFound):
            await store.create_client(client())
        assert await store.find_client("app") is None

    async def test_create_first_is_all_or_nothing(self, store: AnyStore) -> None:
        await store.create_first(tenant(), client("app", "acme", "admin"), api_key())
        assert await store.find_api_key("abcdefgh") == (api_key(), client("app", "acme", "admin"))
        with pytest.raises(AlreadyExists):
            await store.create_first(tenant("other"), client("b", "other"), api_key("key_2", "b", "prefix22"))
        assert await store.find_client("b") is None
        await store.create_tenant(tenant("other"))


class TestApiKeys:
    @pytest.fixture(autouse=True)
    async def owner(self, store: AnyStore) -> None:
        await store.create_tenant(tenant())
        await store.create_client(client("app", "acme", "generate"))

    async def test_is_found_with_its_client(self, store: AnyStore) -> None:
        key = api_key("key_1", "app", "abcdefgh", "generate")
        await store.create_api_key(key)
        assert await store.find_api_key("abcdefgh") == (key, client("app", "acme", "generate"))
        for other in ("ABCDEFGH", "abcdefg", "abcdefghi", "", "abcdefg_", "abcdefg%"):
            assert await store.find_api_key(other) is None

    async def test_without_an_end(self, store: AnyStore) -> None:
        key = ApiKey("key_1", "app", "abcdefgh", bytes(32), frozenset(), NOW)
        await store.create_api_key(key)
        found = await store.find_api_key("abcdefgh")
        assert found is not None
        assert found[0] == key

    async def test_id_and_prefix_are_taken_once(self, store: AnyStore) -> None:
        await store.create_api_key(api_key("key_1", "app", "prefix11", "generate"))
        with pytest.raises(AlreadyExists):
            await store.create_api_key(api_key("key_1", "app", "prefix22"))
        with pytest.raises(AlreadyExists):
            await store.create_api_key(api_key("key_2", "app", "prefix11"))
        found = await store.find_api_key("prefix11")
        assert found is not None
        assert found[0].scopes == {"generate"}

    async def test_needs_its_client(self, store: AnyStore) -> None:
        with pytest.raises(NotFound):
            await store.create_api_key(api_key("key_1", "nobody"))
        assert await store.find_api_key("abcdefgh") is None


class TestSigningKeys:
    async def test_in_the_order_in_which_they_sign(self, store: AnyStore) -> None:
        keys = [SigningKey(f"kid-{n}", bytes([n]) * 32, n == 1, NOW + timedelta(days=n)) for n in range(3)]
        for key in (keys[2], keys[0], keys[1]):
            await store.put_signing_key(key)
        assert list(await store.signing_keys()) == keys
        sealed = SigningKey("kid-0", b"sealed", True, NOW)
        await store.put_signing_key(sealed)
        await store.delete_signing_key("kid-1")
        await store.delete_signing_key("never was")
        assert list(await store.signing_keys()) == [sealed, keys[2]]


class TestHostileText:
    """R24: metacharacters in every field are text and nothing else."""

    @pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
    async def test_r24_in_every_field(self, store: AnyStore, text: str) -> None:
        await store.create_tenant(tenant())
        await store.create_client(client("app", "acme", "generate"))
        await store.create_tenant(Tenant(text, NOW))
        made = Client(text, text, text.encode(), frozenset({text, "x"}), NOW)
        await store.create_client(made)
        key = ApiKey(text, text, text, text.encode(), frozenset({text}), NOW)
        await store.create_api_key(key)
        assert await store.find_client(text) == made
        assert await store.find_api_key(text) == (key, made)
        signing = SigningKey(text, text.encode(), False, NOW)
        await store.put_signing_key(signing)
        assert list(await store.signing_keys()) == [signing]
        await store.delete_signing_key(text)
        assert list(await store.signing_keys()) == []
        assert await store.find_client("app") == client("app", "acme", "generate")

    @pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
    async def test_r24_finds_nothing_that_is_not_there(self, store: AnyStore, text: str) -> None:
        await store.create_first(tenant(), client(), api_key())
        assert await store.find_client(text) is None
        assert await store.find_api_key(text) is None

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=st.text(min_size=1), suffix=st.text(min_size=1))
    async def test_any_text_is_kept_as_it_is(self, store: AnyStore, text: str, suffix: str) -> None:
        one, other = Tenant(text, NOW), Tenant(text + suffix, NOW)
        for made in (one, other):
            try:
                await store.create_tenant(made)
            except AlreadyExists:
                continue
            record = Client(made.tenant_id, made.tenant_id, b"", frozenset({text}), NOW)
            await store.create_client(record)
            assert await store.find_client(made.tenant_id) == record


class TestConcurrency:
    async def test_one_of_many_wins(self, store: AnyStore) -> None:
        outcomes = await asyncio.gather(
            *(store.create_tenant(tenant()) for _ in range(50)), return_exceptions=True
        )
        assert outcomes.count(None) == 1
        assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == 49

    async def test_many_at_once(self, store: AnyStore) -> None:
        await store.create_tenant(tenant())

        async def one(n: int) -> None:
            await store.create_client(client(f"app-{n}", "acme", "generate"))
            await store.create_api_key(api_key(f"key_{n}", f"app-{n}", f"prefix-{n}", "generate"))
            found = await store.find_api_key(f"prefix-{n}")
            assert found is not None
            assert found[1].client_id == f"app-{n}"

        await asyncio.gather(*(one(n) for n in range(50)))

    async def test_a_first_start_happens_once(self, store: AnyStore) -> None:
        outcomes = await asyncio.gather(
            *(
                store.create_first(
                    tenant(f"t{n}"), client(f"c{n}", f"t{n}"), api_key(f"k{n}", f"c{n}", f"p{n}")
                )
                for n in range(10)
            ),
            return_exceptions=True,
        )
        assert outcomes.count(None) == 1


class TestSqliteFile:
    async def test_what_was_answered_is_there_after_a_crash(self, tmp_path: Path) -> None:
        path = tmp_path / "auth.db"
        first = SqliteStore(path)
        await first.start()
        await first.create_first(tenant(), client("app", "acme", "generate"), api_key())
        await first.put_signing_key(SigningKey("kid", b"x", False, NOW))
        # no stop: the files as a killed process leaves them
        copy = tmp_path / "copy.db"
        for suffix in ("", "-wal"):
            copy.with_name(copy.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
        await first.stop()
        second = SqliteStore(copy)
        await second.start()
        assert await second.find_api_key("abcdefgh") == (api_key(), client("app", "acme", "generate"))
        assert [key.kid for key in await second.signing_keys()] == ["kid"]
        await second.stop()

    async def test_reopens(self, tmp_path: Path) -> None:
        for n in range(3):
            store = SqliteStore(tmp_path / "auth.db")
            await store.start()
            assert await store.is_empty() == (n == 0)
            await store.create_tenant(tenant(f"t{n}"))
            await store.stop()

    async def test_is_private(self, tmp_path: Path) -> None:
        path = tmp_path / "auth.db"
        path.touch(mode=0o644)
        store = SqliteStore(path)
        await store.start()
        await store.create_tenant(tenant())
        modes = {file.name: file.stat().st_mode & 0o777 for file in files(tmp_path)}
        await store.stop()
        assert "auth.db-wal" in modes
        assert set(modes.values()) == {0o600}

    async def test_a_newer_file_is_refused_with_a_sentence(self, tmp_path: Path) -> None:
        path = tmp_path / "auth.db"
        store = SqliteStore(path)
        await store.start()
        await store.stop()
        with sqlite3.connect(path) as db:
            db.execute("UPDATE schema_version SET version = ?", (SCHEMA_VERSION + 1,))
        db.close()
        store = SqliteStore(path)
        with pytest.raises(StartError, match="newer version of llmos"):
            await store.start()
        await store.stop()

    async def test_a_file_that_is_no_database_is_refused_with_a_sentence(self, tmp_path: Path) -> None:
        path = tmp_path / "auth.db"
        path.write_bytes(b"this is not a database, however long it is" * 100)
        store = SqliteStore(path)
        with pytest.raises(StartError, match="backup"):
            await store.start()
        await store.stop()

    async def test_a_folder_that_is_not_there_is_refused_with_a_sentence(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "nowhere" / "auth.db")
        with pytest.raises(StartError, match="cannot be opened"):
            await store.start()
        await store.stop()

    async def test_closed_it_says_so(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "auth.db")
        await store.start()
        await store.stop()
        with pytest.raises(DependencyUnavailable):
            await store.is_empty()

    async def test_r24_nothing_deleted_stays_in_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "auth.db"
        store = SqliteStore(path)
        await store.start()
        await store.put_signing_key(SigningKey("kid", b"CANARY-PRIVATE-KEY", False, NOW))
        await store.delete_signing_key("kid")
        await store.stop()
        for file in files(tmp_path):
            assert b"CANARY" not in file.read_bytes()
