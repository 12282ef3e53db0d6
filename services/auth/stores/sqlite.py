"""A store in one SQLite file, for one auth process.

All statements run on one connection in one thread of its own, so the event loop never waits for the disk.
WAL with synchronous=FULL: what was answered survives a loss of power; writes are rare here. The file is
readable by its owner only, and what is deleted is overwritten (secure_delete), since it holds signing
keys.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from services.auth.store import ApiKey, Client, SigningKey, Tenant
from services.mesh.app import StartError
from services.mesh.errors import AlreadyExists, DataCorrupt, DependencyUnavailable, NotFound, Overloaded

MAX_PENDING = 1024
BUSY_TIMEOUT_S = 5.0

SCHEMA_VERSION = 1
_MIGRATIONS = {
    1: """
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
    """,
}
"""By version, what takes the file there from the version before. Never changed, only added to."""

T = TypeVar("T")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class SqliteStore:
    """A component: `start` opens the file and brings it to this version, `stop` closes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="auth-store")
        self._connection: sqlite3.Connection | None = None
        self._pending = 0

    async def start(self) -> None:
        """Raises StartError where the file cannot be used as it is."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._open)

    async def stop(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await asyncio.get_running_loop().run_in_executor(self._executor, connection.close)
        self._executor.shutdown(wait=False)

    async def is_empty(self) -> bool:
        return await self._run(lambda db: db.execute("SELECT 1 FROM tenants").fetchone() is None)

    async def create_first(self, tenant: Tenant, client: Client, key: ApiKey) -> None:
        def work(db: sqlite3.Connection) -> None:
            if db.execute("SELECT 1 FROM tenants").fetchone() is not None:
                raise AlreadyExists("The store is not empty.")
            _insert_tenant(db, tenant)
            _insert_client(db, client)
            _insert_api_key(db, key)

        await self._run(work, write=True)

    async def create_tenant(self, tenant: Tenant) -> None:
        await self._run(lambda db: _insert_tenant(db, tenant), write=True)

    async def create_client(self, client: Client) -> None:
        await self._run(lambda db: _insert_client(db, client), write=True)

    async def find_client(self, client_id: str) -> Client | None:
        return await self._run(lambda db: _select_client(db, client_id))

    async def create_api_key(self, key: ApiKey) -> None:
        await self._run(lambda db: _insert_api_key(db, key), write=True)

    async def find_api_key(self, prefix: str) -> tuple[ApiKey, Client] | None:
        return await self._run(lambda db: _select_api_key(db, prefix))

    async def signing_keys(self) -> Sequence[SigningKey]:
        def work(db: sqlite3.Connection) -> list[SigningKey]:
            rows = db.execute(
                "SELECT kid, private, sealed, signs_from_us FROM signing_keys ORDER BY signs_from_us, kid"
            )
            return [SigningKey(kid, private, bool(sealed), _time(us)) for kid, private, sealed, us in rows]

        return await self._run(work)

    async def put_signing_key(self, key: SigningKey) -> None:
        row = (key.kid, key.private, int(key.sealed), _us(key.signs_from))
        await self._run(
            lambda db: db.execute("INSERT OR REPLACE INTO signing_keys VALUES (?, ?, ?, ?)", row), write=True
        )

    async def delete_signing_key(self, kid: str) -> None:
        await self._run(lambda db: db.execute("DELETE FROM signing_keys WHERE kid = ?", (kid,)), write=True)

    async def _run(self, work: Callable[[sqlite3.Connection], T], *, write: bool = False) -> T:
        """Runs it in one transaction, on the store's own thread."""
        if self._connection is None:
            raise DependencyUnavailable("The store of auth is closed.")
        if self._pending >= MAX_PENDING:
            raise Overloaded("Too many requests wait for the store of auth.")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._executor, self._transact, work, write
            )
        finally:
            self._pending -= 1

    def _transact(self, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
        db = self._connection
        if db is None:
            raise DependencyUnavailable("The store of auth is closed.")
        try:
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:  # locked, disk full, an I/O error
            raise DependencyUnavailable(
                f"The store of auth cannot be used now ({error.sqlite_errorname})."
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataCorrupt(f"The store of auth is damaged ({error.sqlite_errorname}).") from error
        return result

    def _open(self) -> None:
        try:
            _make_private(self._path)
            db = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connection = db
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA secure_delete = ON")
            _migrate(db, self._path)
        except OSError as error:
            raise StartError(f"the database {self._path} cannot be opened: {error.strerror}") from error
        except sqlite3.Error as error:
            raise StartError(
                f"the database {self._path} cannot be used ({error}): put it back from a backup, or give the "
                "service an empty state folder"
            ) from error


def _make_private(path: Path) -> None:
    """SQLite gives its side files the mode of the main file."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    if path.stat().st_uid == os.geteuid():
        path.chmod(0o600)


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        row = db.execute("SELECT version FROM schema_version").fetchone()
        version = 0 if row is None else int(row[0])
        if version > SCHEMA_VERSION:
            raise StartError(
                f"the database {path} was written by a newer version of llmos (schema {version}, this one "
                f"knows {SCHEMA_VERSION}): start that version, or put back a backup from before the update"
            )
        for step in range(version + 1, SCHEMA_VERSION + 1):
            for statement in filter(str.strip, _MIGRATIONS[step].split(";")):
                db.execute(statement)
        db.execute("DELETE FROM schema_version")
        db.execute("INSERT INTO schema_version VALUES (?)", (SCHEMA_VERSION,))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _insert(db: sqlite3.Connection, statement: str, row: tuple[object, ...], what: str, owner: str) -> None:
    try:
        db.execute(statement, row)
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorname == "SQLITE_CONSTRAINT_FOREIGNKEY":
            raise NotFound(f"There is no such {owner}.") from None
        raise AlreadyExists(f"{what} of this id exists.") from None


def _insert_tenant(db: sqlite3.Connection, tenant: Tenant) -> None:
    row = (tenant.tenant_id, _us(tenant.created_at))
    _insert(db, "INSERT INTO tenants VALUES (?, ?)", row, "A tenant", "")


def _insert_client(db: sqlite3.Connection, client: Client) -> None:
    row = (client.client_id, client.tenant_id, client.secret_digest, _us(client.created_at))
    _insert(db, "INSERT INTO clients VALUES (?, ?, ?, ?)", row, "A client", "tenant")
    scopes = [(client.client_id, scope) for scope in sorted(client.scopes)]
    db.executemany("INSERT INTO client_scopes VALUES (?, ?)", scopes)


def _insert_api_key(db: sqlite3.Connection, key: ApiKey) -> None:
    expires_us = None if key.expires_at is None else _us(key.expires_at)
    row = (key.key_id, key.client_id, key.prefix, key.digest, _us(key.created_at), expires_us)
    _insert(db, "INSERT INTO api_keys VALUES (?, ?, ?, ?, ?, ?)", row, "An API key", "client")
    scopes = [(key.key_id, scope) for scope in sorted(key.scopes)]
    db.executemany("INSERT INTO api_key_scopes VALUES (?, ?)", scopes)


def _select_client(db: sqlite3.Connection, client_id: str) -> Client | None:
    row = db.execute(
        "SELECT tenant_id, secret_digest, created_us FROM clients WHERE client_id = ?", (client_id,)
    ).fetchone()
    if row is None:
        return None
    scopes = db.execute("SELECT scope FROM client_scopes WHERE client_id = ?", (client_id,))
    return Client(client_id, row[0], row[1], frozenset(scope for (scope,) in scopes), _time(row[2]))


def _select_api_key(db: sqlite3.Connection, prefix: str) -> tuple[ApiKey, Client] | None:
    row = db.execute(
        "SELECT key_id, client_id, digest, created_us, expires_us FROM api_keys WHERE prefix = ?", (prefix,)
    ).fetchone()
    if row is None:
        return None
    key_id, client_id, digest, created_us, expires_us = row
    client = _select_client(db, client_id)
    if client is None:
        raise DataCorrupt("The store of auth is damaged: a key without its client.")
    scopes = db.execute("SELECT scope FROM api_key_scopes WHERE key_id = ?", (key_id,))
    expires_at = None if expires_us is None else _time(expires_us)
    held = frozenset(scope for (scope,) in scopes)
    return ApiKey(key_id, client_id, prefix, digest, held, _time(created_us), expires_at), client


def _us(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _time(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)
