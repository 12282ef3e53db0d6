"""The first start hands over the administrator's key, once, wherever it is cut off."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from services.auth.credentials import keys, service_secrets
from services.auth.first_start import KeyFile, ensure_administrator
from services.auth.grants.policy import SERVICES
from services.auth.store import ApiKey, Batch, Client, Filter, Kind
from services.auth.stores.memory import MemoryStore
from services.mesh.app import StartError
from services.mesh.clock import ManualClock


class Cut(Exception):
    """The process ends here."""


async def start(store: MemoryStore, path: Path) -> None:
    await ensure_administrator(store, KeyFile(path), ManualClock())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def admin_of(store: MemoryStore, key: str) -> tuple[ApiKey, Client]:
    found = await store.find_api_key(keys.parse_api_key(key).prefix)
    assert found is not None
    assert keys.matches(found[0].digest, keys.digest(key))
    key_record, owned = found
    assert not owned.disabled
    return key_record, owned.client


async def test_makes_the_administrator(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store, path = MemoryStore(), tmp_path / "state" / "admin-key"
    await start(store, path)
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(path.parent) == ["admin-key"]
    key, client = await admin_of(store, text.strip())
    assert (client.client_id, client.tenant_id) == ("admin", "default")
    assert client.roles == {"admin"}
    assert key.scopes == client.scopes == frozenset()
    assert client.secret_digest == b""
    made = await store.changes(limit=10)
    assert {(change.actor, change.note) for change in made} == {("service:auth", "first start")}
    assert str(path) in caplog.text
    assert text.strip() not in caplog.text
    assert text[20:30] not in caplog.text


async def test_a_second_start_does_nothing(tmp_path: Path) -> None:
    store, path = MemoryStore(), tmp_path / "admin-key"
    await start(store, path)
    before = path.read_text(), path.stat().st_mtime_ns
    await start(store, path)
    assert (path.read_text(), path.stat().st_mtime_ns) == before


async def test_a_file_without_its_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "admin-key"
    path.write_text("llmos_something\n")
    with pytest.raises(StartError, match="database is empty"):
        await start(MemoryStore(), path)
    assert path.read_text() == "llmos_something\n"


async def test_a_database_without_its_file_says_so_and_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, path = MemoryStore(), tmp_path / "admin-key"
    await start(store, path)
    path.unlink()
    await start(store, path)
    assert "If it is lost" in caplog.text
    assert names(tmp_path) == []


async def test_cut_off_before_the_database_knows_the_key(tmp_path: Path) -> None:
    class Cutting(MemoryStore):
        async def commit(self, batch: Batch) -> int:
            raise Cut

    path = tmp_path / "admin-key"
    with pytest.raises(Cut):
        await start(Cutting(), path)
    assert names(tmp_path) == ["admin-key.new"]
    store = MemoryStore()
    await start(store, path)
    await admin_of(store, path.read_text().strip())
    assert names(tmp_path) == ["admin-key"]


async def test_cut_off_before_the_file_has_its_name(tmp_path: Path) -> None:
    class Cutting(MemoryStore):
        async def commit(self, batch: Batch) -> int:
            await super().commit(batch)
            raise Cut

    store, path = Cutting(), tmp_path / "admin-key"
    with pytest.raises(Cut):
        await start(store, path)
    await start(store, path)
    await admin_of(store, path.read_text().strip())
    assert names(tmp_path) == ["admin-key"]


async def test_two_that_start_at_once_make_one_administrator(tmp_path: Path) -> None:
    class Together(MemoryStore):
        """Each sees it empty before any of them writes."""

        def __init__(self) -> None:
            super().__init__()
            self.all_looked = asyncio.Barrier(2)

        async def commit(self, batch: Batch) -> int:
            await self.all_looked.wait()
            return await super().commit(batch)

    store, paths = Together(), [tmp_path / name / "admin-key" for name in ("one", "two")]
    await asyncio.gather(*(start(store, path) for path in paths))
    (path,) = (path for path in paths if path.exists())
    await admin_of(store, path.read_text().strip())
    assert sorted(name for path in paths for name in names(path.parent)) == ["admin-key"]
    assert len(await store.list(Kind.API_KEY, Filter(), limit=10)) == 1


@pytest.mark.parametrize("text", ["", "nonsense", "llmos_", "\xff\xfe"])
async def test_a_stray_provisional_file_is_removed(tmp_path: Path, text: str) -> None:
    store, path = MemoryStore(), tmp_path / "admin-key"
    await start(store, path)
    before = path.read_text()
    (tmp_path / "admin-key.new").write_text(text or keys.new_api_key())
    await start(store, path)
    assert path.read_text() == before
    assert names(tmp_path) == ["admin-key"]


async def test_a_link_is_not_followed(tmp_path: Path) -> None:
    class Planting(KeyFile):
        def discard(self) -> None:
            super().discard()
            self.path.with_name("admin-key.new").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match=r"admin-key\.new"):
        await ensure_administrator(MemoryStore(), Planting(tmp_path / "admin-key"), ManualClock())
    assert names(tmp_path) == ["admin-key.new"]


class TestServiceSecrets:
    def write(self, folder: Path, **secrets: str) -> None:
        for name in SERVICES:
            (folder / name).write_text(secrets.get(name, f"{name}-".ljust(64, "0")) + "\n")

    def test_are_read(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        digests = service_secrets.load(tmp_path)
        assert set(digests) == {f"service:{name}" for name in SERVICES}
        assert digests["service:gateway"] == keys.digest("gateway-".ljust(64, "0"))

    @pytest.mark.parametrize("name", SERVICES)
    def test_r33_one_missing_is_refused_with_a_sentence(self, tmp_path: Path, name: str) -> None:
        self.write(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(StartError, match=f"secret of the service {name} cannot be read.*openssl rand"):
            service_secrets.load(tmp_path)

    def test_r33_no_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StartError, match="cannot be read"):
            service_secrets.load(tmp_path / "nowhere")

    @pytest.mark.parametrize("secret", ["", "short", "x" * 257])
    def test_wrong_lengths_are_refused_unseen(self, tmp_path: Path, secret: str) -> None:
        self.write(tmp_path, logging=secret)
        with pytest.raises(StartError, match="32 to 256") as caught:
            service_secrets.load(tmp_path)
        assert secret == "" or secret not in str(caught.value)

    def test_a_shared_secret_is_refused(self, tmp_path: Path) -> None:
        self.write(tmp_path, logging="s" * 32, auth="s" * 32)
        with pytest.raises(StartError, match="each needs its own"):
            service_secrets.load(tmp_path)
