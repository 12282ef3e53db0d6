"""Backup and restore as docs/auth-store.md has them, while the store is in use: what was restored knows the
same API keys, and signs with the same signing keys.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import sys
from pathlib import Path

import pytest

from services.auth.credentials import keys
from services.auth.first_start import KeyFile, ensure_administrator
from services.auth.grants.tokens import Grant, TokenIssuer
from services.auth.signing.master_key import Sealer
from services.auth.signing.ring import KeyRing
from services.auth.store import Filter, Kind
from services.auth.stores.opening import sqlite_store
from services.auth.stores.sql import SqlStore
from services.mesh.clock import ManualClock
from services.mesh.policy import RevocationKind
from services.mesh.tokens import Audience, Verifier
from tests.framework.auth_stores import NOW, batch, creates, revocation, tenant
from tests.framework.postgres import PostgresServer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "auth-store.md"
COPY = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('VACUUM INTO ?', sys.argv[2:])"


class Deployment:
    """The parts of auth that live on what is in the store."""

    def __init__(self, store: SqlStore, folder: Path, master_key: bytes) -> None:
        self.store, self.clock = store, ManualClock(NOW)
        self._file = KeyFile(folder / "admin-key")
        self.ring = KeyRing(
            store,
            self.clock,
            rotation_s=1000,
            publish_ahead_s=100,
            token_ttl_s=60,
            sealer=Sealer(master_key),
        )

    async def start(self) -> str:
        """Returns the administrator's key."""
        await self.store.start()
        await ensure_administrator(self.store, self._file, self.clock)
        await self.ring.start()
        return self._file.path.read_text().strip()

    async def stop(self) -> None:
        await self.ring.stop()
        await self.store.stop()

    async def use(self, running: asyncio.Event) -> None:
        """Goes on writing."""
        count = 0
        while not running.is_set():
            await self.store.commit(creates(tenant(f"t{count}")))
            count += 1
            await asyncio.sleep(0)


async def check(original: Deployment, restored: Deployment, key: str) -> None:
    """The restored one is started, on the same master key."""
    assert await restored.start() == key
    found = await restored.store.find_api_key(keys.parse_api_key(key).prefix)
    assert found is not None
    assert keys.matches(found[0].digest, keys.digest(key))
    assert found[1].client.roles == {"admin"}
    assert restored.ring.jwks_json() == original.ring.jwks_json()
    assert restored.ring.current()[0] == original.ring.current()[0]
    for one, other in ((original, restored), (restored, original)):
        token = TokenIssuer(one.ring, one.clock, issuer="https://a", ttl_s=60, service_ttl_s=60).issue(
            Grant("admin", Audience.GATEWAY, frozenset(), "default")
        )
        verifier = Verifier(other.ring, issuer="https://a", audience=Audience.GATEWAY, clock=other.clock)
        assert (await verifier.verify(token.token)).subject == "admin"
    (revoked,) = await restored.store.revocations(after_version=0, now=NOW)
    assert revoked.revoked == revocation("app", RevocationKind.CLIENT)
    # whole commits, in their order, and it goes on from there
    tenants = await restored.store.list(Kind.TENANT, Filter(), limit=10_000)
    version = await restored.store.version()
    assert len(tenants) == version - 1
    assert max(stored.version for stored in tenants) in (1, version)
    assert await restored.store.commit(creates(tenant("after-the-restore"))) == version + 1


async def run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0


async def test_of_a_file(tmp_path: Path) -> None:
    assert COPY in DOCUMENT.read_text()
    master_key, backup = os.urandom(32), tmp_path / "auth-backup.db"
    original = Deployment(sqlite_store(tmp_path / "auth.db"), tmp_path, master_key)
    key = await original.start()
    await original.store.commit(batch(revocations=[revocation("app", RevocationKind.CLIENT)]))
    done = asyncio.Event()
    using = asyncio.create_task(original.use(done))
    await run(sys.executable, "-c", COPY, str(tmp_path / "auth.db"), str(backup))
    done.set()
    await using

    restored_folder = tmp_path / "restored"
    restored_folder.mkdir()
    backup.rename(restored_folder / "auth.db")
    (restored_folder / "admin-key").write_text(f"{key}\n")
    restored = Deployment(sqlite_store(restored_folder / "auth.db"), restored_folder, master_key)
    await check(original, restored, key)
    await original.stop()
    await restored.stop()


async def test_of_a_server(postgres: PostgresServer, tmp_path: Path) -> None:
    for command in ("pg_dump --format=custom --file=auth.dump", "pg_restore --exit-on-error --no-owner"):
        assert command in DOCUMENT.read_text()
    master_key, name, dump = os.urandom(32), await postgres.make_database(), tmp_path / "auth.dump"
    original = Deployment(postgres.store(name), tmp_path, master_key)
    key = await original.start()
    await original.store.commit(batch(revocations=[revocation("app", RevocationKind.CLIENT)]))
    done = asyncio.Event()
    using = asyncio.create_task(original.use(done))
    await postgres.run("pg_dump", "--format=custom", f"--file={dump}", name)
    done.set()
    await using

    again = await postgres.make_database()
    await postgres.run("pg_restore", "--exit-on-error", "--no-owner", f"--dbname={again}", str(dump))
    restored = Deployment(postgres.store(again), tmp_path, master_key)
    await check(original, restored, key)
    await original.stop()
    await restored.stop()


async def test_the_command_that_takes_the_schema_down(tmp_path: Path) -> None:
    path = tmp_path / "auth.db"
    store = sqlite_store(path)
    await store.start()
    await store.commit(creates(tenant()))
    await store.stop()
    found = re.search(r'python -c "(import asyncio.*?)" \.state', DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    await run(sys.executable, "-c", found[1], str(path), "0001")
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT tenant_id FROM tenants").fetchall() == [("acme",)]
    db.close()


@pytest.mark.parametrize("kind", ["file", "server"])
async def test_r24_a_dump_holds_no_secret(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    dump = tmp_path / "dump"
    if kind == "file":
        made = Deployment(sqlite_store(tmp_path / "auth.db"), tmp_path, os.urandom(32))
        key = await made.start()
        await run(sys.executable, "-c", COPY, str(tmp_path / "auth.db"), str(dump))
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        name = await server.make_database()
        made = Deployment(server.store(name), tmp_path, os.urandom(32))
        key = await made.start()
        await server.run("pg_dump", f"--file={dump}", name)
    content = dump.read_bytes()
    assert key.encode() not in content
    assert key.removeprefix("llmos_")[8:].encode() not in content
    private = made.ring.current()[1].private_key.private_bytes_raw()  # type: ignore[union-attr]
    assert private not in content
    assert private.hex().encode() not in content
    await made.stop()
