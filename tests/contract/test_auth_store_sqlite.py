"""The file of auth's store: durable, private, and refused with a sentence where it cannot be used."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from services.auth.settings import AuthSettings
from services.auth.store import Kind, SigningKey
from services.auth.stores.opening import open_store, sqlite_store
from services.mesh.app import StartError
from services.mesh.errors import DependencyUnavailable
from tests.framework.auth_stores import NOW, api_key, client, creates, delete, tenant


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def test_what_was_answered_is_there_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "auth.db"
    first = sqlite_store(path)
    await first.start()
    await first.commit(creates(tenant(), client("app", "acme", "generate"), api_key()))
    await first.add_signing_key(SigningKey("kid", b"x", False, NOW), after_kid="")
    # no stop: the files as a killed process leaves them
    copy = tmp_path / "copy.db"
    for suffix in ("", "-wal"):
        copy.with_name(copy.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    await first.stop()
    second = sqlite_store(copy)
    await second.start()
    found = await second.find_api_key("abcdefgh")
    assert found is not None
    assert (found[0], found[1].client) == (api_key(), client("app", "acme", "generate"))
    assert [key.kid for key in await second.signing_keys()] == ["kid"]
    await second.stop()


async def test_reopens(tmp_path: Path) -> None:
    for n in range(3):
        store = sqlite_store(tmp_path / "auth.db")
        await store.start()
        assert await store.version() == n
        await store.commit(creates(tenant(f"t{n}")))
        await store.stop()


async def test_two_on_one_file_wait_for_each_other(tmp_path: Path) -> None:
    stores = [sqlite_store(tmp_path / "auth.db") for _ in range(2)]
    for store in stores:
        await store.start()
    await asyncio.gather(*(stores[n % 2].commit(creates(tenant(f"t{n}"))) for n in range(20)))
    assert [await store.version() for store in stores] == [20, 20]
    for store in stores:
        await store.stop()


async def test_each_sees_what_another_wrote(tmp_path: Path) -> None:
    """Though neither reads again what nobody has changed."""
    stores = [sqlite_store(tmp_path / "auth.db") for _ in range(2)]
    for store in stores:
        await store.start()
    for n in range(6):
        writer, reader = stores[n % 2], stores[1 - n % 2]
        assert [await each.version() for each in (reader, reader, writer)] == [n] * 3
        await writer.commit(creates(tenant(f"t{n}")))
        key, before = SigningKey(f"k{n}", b"x", False, NOW), f"k{n - 1}" if n else ""
        assert await writer.add_signing_key(key, after_kid=before)
        for store in (reader, writer):
            assert await store.version() == n + 1
            assert [key.kid for key in await store.signing_keys()] == [f"k{i}" for i in range(n + 1)]
    for store in stores:
        await store.stop()
        with pytest.raises(DependencyUnavailable):
            await store.version()


async def test_is_private(tmp_path: Path) -> None:
    path = tmp_path / "auth.db"
    path.touch(mode=0o644)
    store = sqlite_store(path)
    await store.start()
    await store.commit(creates(tenant()))
    modes = {file.name: file.stat().st_mode & 0o777 for file in files(tmp_path)}
    await store.stop()
    assert "auth.db-wal" in modes
    assert set(modes.values()) == {0o600}


async def test_a_file_that_is_no_database_is_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "auth.db"
    path.write_bytes(b"this is not a database, however long it is" * 100)
    store = sqlite_store(path)
    with pytest.raises(StartError, match="backup"):
        await store.start()
    await store.stop()


async def test_a_folder_that_is_not_there_is_refused_with_a_sentence(tmp_path: Path) -> None:
    store = sqlite_store(tmp_path / "nowhere" / "auth.db")
    with pytest.raises(StartError, match="cannot be opened"):
        await store.start()
    await store.stop()


async def test_closed_it_says_so(tmp_path: Path) -> None:
    store = sqlite_store(tmp_path / "auth.db")
    await store.start()
    await store.stop()
    with pytest.raises(DependencyUnavailable):
        await store.is_empty()


async def test_a_writer_that_holds_the_file_is_waited_for_and_then_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.auth.stores.database.WAIT_S", 0.1)
    store = sqlite_store(tmp_path / "auth.db")
    await store.start()
    other = sqlite3.connect(tmp_path / "auth.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DependencyUnavailable, match="SQLITE_BUSY"):
        await store.commit(creates(tenant()))
    assert await store.is_empty()  # who reads is not held up
    other.execute("ROLLBACK")
    other.close()
    assert await store.commit(creates(tenant())) == 1
    await store.stop()


async def test_what_is_damaged_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "auth.db"
    store = sqlite_store(path)
    await store.start()
    await store.commit(creates(tenant(), *(client(f"app-{n}") for n in range(500))))
    await store.stop()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xaa" * (len(content) - 4096)
    path.write_bytes(content)
    store = sqlite_store(path)
    with pytest.raises(StartError, match=r"malformed.*backup"):
        await store.start()
    await store.stop()


async def test_r24_nothing_deleted_stays_in_the_file(tmp_path: Path) -> None:
    store = sqlite_store(tmp_path / "auth.db")
    await store.start()
    await store.add_signing_key(SigningKey("kid", b"CANARY-PRIVATE-KEY", False, NOW), after_kid="")
    await store.delete_signing_key("kid")
    await store.commit(creates(tenant("canary-tenant")))
    await store.commit(delete(Kind.TENANT, "canary-tenant"))
    await store.stop()
    for file in files(tmp_path):
        assert b"CANARY" not in file.read_bytes()


class TestSettings:
    def settings(self, folder: Path, **values: object) -> AuthSettings:
        return AuthSettings(state_dir=folder, service_secrets_dir=folder, **values)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "url", ["", "nonsense", "mysql://a@b/c", "postgresql://user@host", "postgresql://user:x@host:y/db"]
    )
    def test_an_address_that_is_none(self, tmp_path: Path, url: str) -> None:
        with pytest.raises(StartError, match="must look like") as caught:
            open_store(self.settings(tmp_path, db_url=SecretStr(url)))
        assert "x@" not in str(caught.value)

    async def test_r32_a_password_is_in_no_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "password").write_text("canary-password\n")
        url = SecretStr("postgresql://user@127.0.0.1:1/db")
        store = open_store(self.settings(tmp_path, db_url=url, db_password_file=tmp_path / "password"))
        with pytest.raises(StartError, match="cannot be reached") as caught:
            await store.start()
        assert "canary" not in str(caught.value)
        await store.stop()
        with pytest.raises(StartError, match="password"):
            open_store(self.settings(tmp_path, db_url=url, db_password_file=tmp_path / "nowhere"))

    def test_certificates_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "ca").write_text("nothing")
        url = SecretStr("postgresql://user@db.example/db")
        with pytest.raises(StartError, match="no certificates"):
            open_store(self.settings(tmp_path, db_url=url, db_ca_file=tmp_path / "ca"))

    def test_one_of_each(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        url = SecretStr("postgresql://user@host/db")
        with pytest.raises(ValidationError, match="db_url and db_file"):
            self.settings(tmp_path, db_url=url, db_file=tmp_path / "a")
        with pytest.raises(ValidationError, match="exclude each other"):
            self.settings(tmp_path, key_encryption_key_env="A", key_encryption_key_file=tmp_path / "a")
        monkeypatch.setenv("MASTER", "canary")
        named = self.settings(tmp_path, key_encryption_key_env="MASTER")
        assert named.key_encryption_key == SecretStr("canary")
        assert "canary" not in repr(named)
        assert self.settings(tmp_path, key_encryption_key_env="OTHER").key_encryption_key is None
