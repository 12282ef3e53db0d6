"""Connections to the database of auth, SQLite or PostgreSQL, and what their errors mean.

SQLite: one connection writes, a few read; WAL with synchronous=FULL, so what was answered survives a loss of
power. The file and its side files are readable by their owner only, and what is deleted is overwritten
(secure_delete), since it holds signing keys. PostgreSQL: one pool, bounded, and every statement has an end.
"""

from __future__ import annotations

import os
import sqlite3
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import asyncpg
from sqlalchemy import event, pool
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from services.mesh.errors import DataCorrupt, DependencyUnavailable, Overloaded

T = TypeVar("T")

MAX_PENDING = 1024
"""More than so many at once are refused."""
READERS = 4
"""Connections that read a SQLite file."""
WAIT_S = 5.0
"""For a connection, a lock, or a connection to be made."""
STATEMENT_S = 10.0
MIGRATION_S = 600.0


class Database:
    """Made by `sqlite` or `postgresql`; connects when it is first used."""

    def __init__(self, readers: AsyncEngine, writer: AsyncEngine, migrator: AsyncEngine, name: str) -> None:
        self._readers = readers
        self._single = readers.execution_options(isolation_level="AUTOCOMMIT")
        self._writer = writer
        self._migrator = migrator
        self._pending = 0
        self._open = True
        self.file: Path | None = None
        """Of SQLite."""
        self.name = name
        """For people: without a password."""
        self._witness: sqlite3.Connection | None = None

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that sees one state of the database. Raises as `Store` does."""
        with self._counted(), translated():
            async with self._readers.begin() as connection:
                yield connection

    @asynccontextmanager
    async def read_once(self) -> AsyncIterator[AsyncConnection]:
        """For a single statement, which needs no transaction around it. Raises as `Store` does."""
        with self._counted(), translated():
            async with self._single.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is durable when it was left, or without effect. Raises as `Store` does."""
        with self._counted(), translated():
            async with self._writer.begin() as connection:
                yield connection

    @asynccontextmanager
    async def migrate(self) -> AsyncIterator[AsyncConnection]:
        """As `write`, with time for more; raises what the driver raises."""
        async with self._migrator.begin() as connection:
            yield connection
        await self._migrator.dispose()

    def changes(self) -> int | None:
        """Another number than before when anything was written since, by whichever process; None where that
        cannot be told without a statement.

        Microseconds, so without a thread: SQLite looks at a counter in memory that its processes share.
        """
        if not self._open or self.file is None:
            return None
        try:
            if self._witness is None:
                self._witness = sqlite3.connect(f"file:{quote(str(self.file))}?mode=rw", uri=True, timeout=0)
            return int(self._witness.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            return None  # whoever goes on to ask the store is told why

    async def close(self) -> None:
        """From now on everything raises DependencyUnavailable."""
        self._open = False
        if self._witness is not None:
            self._witness.close()
        for engine in (self._readers, self._writer, self._migrator):
            await engine.dispose()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if not self._open:
            raise DependencyUnavailable("The store of auth is closed.")
        if self._pending >= MAX_PENDING:
            raise Overloaded("Too many requests wait for the store of auth.")
        self._pending += 1
        try:
            yield
        finally:
            self._pending -= 1


class Unchanged(Generic[T]):
    """Reads something, and not again before something was written, where that can be told."""

    def __init__(self, database: Database, read: Callable[[], Awaitable[T]]) -> None:
        self._database = database
        self._read = read
        self._found: tuple[int, T] | None = None

    async def read(self) -> T:
        """Raises as `Store` does."""
        changes = self._database.changes()  # before reading: what is written meanwhile is read next time
        if changes is not None and self._found is not None and self._found[0] == changes:
            return self._found[1]
        found = await self._read()
        self._found = None if changes is None else (changes, found)
        return found


@contextmanager
def translated() -> Iterator[None]:
    """Raises errors of the drivers as ours."""
    try:
        yield
    except PoolTimeout as error:
        raise Overloaded("Too many requests wait for the store of auth.") from error
    except DBAPIError as error:
        if _is_damage(error):
            raise DataCorrupt(f"The store of auth is damaged ({_code(error)}).") from error
        raise DependencyUnavailable(f"The store of auth cannot be used now ({_code(error)}).") from error
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise DependencyUnavailable(
            f"The store of auth cannot be used now ({type(error).__name__})."
        ) from error


def _is_damage(error: DBAPIError) -> bool:
    """As opposed to what may be over soon: locked, disk full, an I/O error, a server that is not there."""
    original = error.orig
    if isinstance(original, sqlite3.Error):
        return not isinstance(original, sqlite3.OperationalError)
    state = str(getattr(original, "sqlstate", None) or "")
    return state.startswith("XX") or isinstance(error, IntegrityError | DataError | ProgrammingError)


def _code(error: DBAPIError) -> str:
    for name in ("sqlite_errorname", "sqlstate"):
        code = getattr(error.orig, name, None)
        if code:
            return str(code)
    return type(error.orig).__name__


def sqlite(path: Path) -> Database:
    """A database in one file."""
    url = URL.create("sqlite+aiosqlite", database=str(path))

    def engine(begin: str, size: int) -> AsyncEngine:
        made = create_async_engine(
            url,
            poolclass=pool.AsyncAdaptedQueuePool,
            pool_size=size,
            max_overflow=0,
            pool_timeout=WAIT_S,
            connect_args={"timeout": WAIT_S},
            hide_parameters=True,
        )

        @event.listens_for(made.sync_engine, "connect")
        def connected(connection: Any, _record: object) -> None:
            connection.isolation_level = None  # the driver begins nothing by itself
            cursor = connection.cursor()
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",
                "foreign_keys = ON",
                "secure_delete = ON",
            ):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        @event.listens_for(made.sync_engine, "begin")
        def begun(connection: Connection) -> None:
            if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
                connection.exec_driver_sql(begin)

        return made

    # one that reads and then writes would fail where another wrote in between: who writes begins as a writer
    made = Database(
        engine("BEGIN", READERS), engine("BEGIN IMMEDIATE", 1), engine("BEGIN IMMEDIATE", 1), str(path)
    )
    made.file = path
    return made


def make_private(path: Path) -> None:
    """Makes the file where it is not there; SQLite gives its side files the mode of the main file."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    if path.stat().st_uid == os.geteuid():
        path.chmod(0o600)


def postgresql(url: URL, *, pool_size: int, tls: ssl.SSLContext | None = None) -> Database:
    """A database on a server. `tls` is used where the URL does not say `?ssl=`."""
    url = url.set(drivername="postgresql+asyncpg")

    def engine(size: int, limit_s: float) -> AsyncEngine:
        arguments: dict[str, Any] = {
            "timeout": WAIT_S,
            "command_timeout": limit_s + WAIT_S,
            "server_settings": {
                "application_name": "llmos-auth",
                "statement_timeout": str(int(limit_s * 1000)),
                "lock_timeout": str(int(limit_s * 1000)),
                "idle_in_transaction_session_timeout": str(int(limit_s * 1000)),
            },
        }
        if tls is not None and "ssl" not in url.query:
            arguments["ssl"] = tls
        return create_async_engine(
            url,
            pool_size=size,
            max_overflow=0,
            pool_timeout=WAIT_S,
            pool_pre_ping=True,
            connect_args=arguments,
            hide_parameters=True,
            skip_autocommit_rollback=True,
        )

    shared = engine(pool_size, STATEMENT_S)
    readers = shared.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return Database(readers, shared, engine(1, MIGRATION_S), url.render_as_string(hide_password=True))


UNUSABLE = (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
"""What drivers raise."""
