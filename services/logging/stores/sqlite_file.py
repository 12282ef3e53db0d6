"""One SQLite file with one writer and one reader, each a connection in a thread of its own.

WAL lets them run side by side, so a long search does not hold up what comes in. synchronous=FULL, since
whoever hands something in forgets it once it is acknowledged; work is one transaction, so that costs one sync
for all of it. One process at a time may have a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from services.mesh.errors import DependencyUnavailable, Overloaded

BUSY_TIMEOUT_S = 5.0
MAX_WAITING_READS = 256
MAX_READ_STEPS = 500
"""Of 100,000 instructions of SQLite's machine each, some 10,000 rows: a search that reads more is stopped."""

T = TypeVar("T")


class SqliteFile:
    """Runs work on a file; `name` says in messages what is in it, `schema` makes it, in its `version`."""

    def __init__(self, path: Path, name: str, schema: str, version: int) -> None:
        self._path = path
        self._name = name
        self._schema = schema
        self._version = version
        self._lock: Any = None
        self._writer: ThreadPoolExecutor | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._write: sqlite3.Connection | None = None
        self._read: sqlite3.Connection | None = None
        self._waiting_reads = 0
        self._read_steps = 0
        self.changes = 0
        """Rows that this process has written: while it stays, every reading finds the same."""

    async def start(self) -> None:
        """Raises OSError with a sentence where the file cannot be used."""
        loop = asyncio.get_running_loop()
        self._writer = ThreadPoolExecutor(1, f"{self._path.stem}-write")
        self._reader = ThreadPoolExecutor(1, f"{self._path.stem}-read")
        await loop.run_in_executor(self._writer, self._open)
        await loop.run_in_executor(self._reader, self._open_reader)

    async def stop(self) -> None:
        loop = asyncio.get_running_loop()
        reader, self._reader = self._reader, None
        writer, self._writer = self._writer, None
        for executor, close in ((reader, self._close_reader), (writer, self._close)):
            if executor is not None:
                await loop.run_in_executor(executor, close)
                executor.shutdown(wait=False)

    async def writing(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """In one transaction, kept where it returns. Raises DependencyUnavailable, and what the work does."""

        def run() -> T:
            if self._write is None:
                raise sqlite3.OperationalError("the store is closed")
            with _transaction(self._write) as db:
                done = work(db)
            self.changes = self._write.total_changes
            return done

        try:
            return await _run(self._writer, run)
        except (sqlite3.Error, OSError) as error:
            raise DependencyUnavailable(f"The database of the {self._name} fails: {error}") from error

    async def reading(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Over one snapshot. Raises DependencyUnavailable, Overloaded, and what the work does."""

        def run() -> T:
            if self._read is None:
                raise sqlite3.OperationalError("the store is closed")
            self._read_steps = 0
            self._read.execute("BEGIN")  # one snapshot for all statements
            try:
                return work(self._read)
            finally:
                self._read.execute("COMMIT")

        if self._waiting_reads >= MAX_WAITING_READS:
            raise Overloaded(f"Too many queries of the {self._name} wait.")
        self._waiting_reads += 1
        try:
            return await _run(self._reader, run)
        except (sqlite3.Error, OSError) as error:
            if self._read_steps > MAX_READ_STEPS:
                raise Overloaded(
                    f"The query reads too much of the {self._name}.", hint="Narrow it, by time or by tenant."
                ) from error
            raise DependencyUnavailable(f"The database of the {self._name} fails: {error}") from error
        finally:
            self._waiting_reads -= 1

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = self._path.with_name(self._path.name + ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"the {self._name} {self._path} is in use by another process") from error
        try:
            db = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_TIMEOUT_S)
            self._write = db
            self._path.chmod(0o600)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA journal_size_limit = 16777216")
            with _transaction(db):
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in self._schema.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {self._version}")
                elif version != self._version:
                    raise OSError(
                        f"{self._path} is no {self._name} of this version"
                        f" (format {version}, not {self._version})"
                    )
        except sqlite3.DatabaseError as error:
            raise OSError(f"the {self._name} {self._path} cannot be used: {error}") from error

    def _open_reader(self) -> None:
        self._read = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        self._read.execute("PRAGMA query_only = ON")
        self._read.set_progress_handler(self._count_step, 100_000)

    def _count_step(self) -> bool:
        """True stops the statement."""
        self._read_steps += 1
        return self._read_steps > MAX_READ_STEPS

    def _close(self) -> None:
        if self._write is not None:
            self._write.close()
            self._write = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _close_reader(self) -> None:
        if self._read is not None:
            self._read.close()
            self._read = None


async def _run(executor: ThreadPoolExecutor | None, work: Callable[[], T]) -> T:
    if executor is None:
        raise sqlite3.OperationalError("the store is closed")
    return await asyncio.get_running_loop().run_in_executor(executor, work)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
