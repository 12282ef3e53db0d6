"""The audit log in one SQLite file.

Writes go through one connection in one thread, reads through another in another: WAL lets them run side by
side, so a long search does not hold up what comes in. synchronous=FULL, since producers forget what is
acknowledged here; a batch is one transaction, so that costs one sync for hundreds of events.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from services.logging.store import (
    MAX_DEAD_LETTERS,
    MAX_DEAD_VALUE_BYTES,
    Applied,
    Batch,
    Cursor,
    DeadLetter,
    RecordFilter,
    RequestRecord,
)
from services.logging.stores import queries
from services.mesh import event_codec
from services.mesh.audit_protocol import (
    Place,
    ProducerAnswer,
    ProducerReport,
    SequenceTracker,
    may_settle,
)
from services.mesh.errors import DependencyUnavailable, Overloaded
from services.mesh.event_codec import IntentRead, OtherRead, PlaceRead
from services.mesh.events import Outcome

FORMAT = 1
BUSY_TIMEOUT_S = 5.0
MAX_WAITING_READS = 256
MAX_READ_STEPS = 500
"""Of 100,000 instructions of SQLite's machine each, some 10,000 rows: a search that reads more is stopped."""

T = TypeVar("T")


class SqliteStore:
    """An `AuditStore`; one process at a time may have a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: Any = None
        self._writer: ThreadPoolExecutor | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._write: sqlite3.Connection | None = None
        self._read: sqlite3.Connection | None = None
        self._waiting_reads = 0
        self._read_steps = 0

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._writer = ThreadPoolExecutor(1, "audit-write")
        self._reader = ThreadPoolExecutor(1, "audit-read")
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

    async def apply(self, batch: Batch, now_us: int) -> Applied:
        return await self._writing(lambda db: _apply(db, batch, now_us))

    async def offsets(self, topic: str) -> dict[int, int]:
        return await self._reading(
            lambda db: dict(
                db.execute("SELECT partition, next_offset FROM offsets WHERE topic = ?", (topic,))
            )
        )

    async def sync(self, report: ProducerReport, now_us: int) -> tuple[ProducerAnswer, int]:
        return await self._writing(lambda db: _sync(db, report, now_us))

    async def producers_with_open_requests(self) -> list[str]:
        return await self._reading(
            lambda db: [
                row[0]
                for row in db.execute(
                    "SELECT DISTINCT producer FROM requests WHERE outcome IS NULL AND producer IS NOT NULL"
                    " ORDER BY producer"
                )
            ]
        )

    async def fence(self, producer: str, now_us: int) -> int:
        return await self._writing(lambda db: _fence(db, producer, now_us))

    async def search(self, which: RecordFilter, limit: int, after: Cursor | None) -> list[RequestRecord]:
        return await self._reading(lambda db: queries.search(db, which, limit, after))

    async def newest(self, which: RecordFilter, limit: int) -> tuple[list[RequestRecord], int]:
        return await self._reading(lambda db: queries.newest(db, which, limit))

    async def changed(
        self, which: RecordFilter, after_position: int, limit: int
    ) -> tuple[list[RequestRecord], int]:
        return await self._reading(lambda db: queries.changed(db, which, after_position, limit))

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        return await self._reading(
            lambda db: [
                DeadLetter(*row)
                for row in db.execute(
                    "SELECT partition, offset, reason, key, value, producer FROM dead_letters"
                    " ORDER BY number LIMIT ?",
                    (limit,),
                )
            ]
        )

    async def other_events(self, limit: int) -> list[tuple[str, Place, str, bytes]]:
        return await self._reading(
            lambda db: [
                (producer, Place(epoch, sequence), kind, body)
                for producer, epoch, sequence, kind, body in db.execute(
                    "SELECT producer, epoch, sequence, kind, body FROM other_events"
                    " ORDER BY number DESC LIMIT ?",
                    (limit,),
                )
            ]
        )

    async def _writing(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            if self._write is None:
                raise sqlite3.OperationalError("the store is closed")
            with _transaction(self._write) as db:
                return work(db)

        try:
            return await _run(self._writer, run)
        except (sqlite3.Error, OSError) as error:
            raise DependencyUnavailable(f"The audit log's database fails: {error}") from error

    async def _reading(self, work: Callable[[sqlite3.Connection], T]) -> T:
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
            raise Overloaded("Too many queries of the audit log wait.")
        self._waiting_reads += 1
        try:
            return await _run(self._reader, run)
        except (sqlite3.Error, OSError) as error:
            if self._read_steps > MAX_READ_STEPS:
                raise Overloaded(
                    "The query reads too much of the audit log.", hint="Narrow it, by time or by tenant."
                ) from error
            raise DependencyUnavailable(f"The audit log's database fails: {error}") from error
        finally:
            self._waiting_reads -= 1

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = self._path.with_name(self._path.name + ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"the audit log {self._path} is in use by another process") from error
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
                    for statement in queries.SCHEMA.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {FORMAT}")
                elif version != FORMAT:
                    raise OSError(
                        f"{self._path} is no audit log of this version (format {version}, not {FORMAT})"
                    )
        except sqlite3.DatabaseError as error:
            raise OSError(f"the audit log {self._path} cannot be used: {error}") from error

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


class _Progress:
    """What is known of producers, read and written once in a transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._trackers: dict[tuple[str, int], SequenceTracker] = {}

    def of(self, producer: str, epoch: int) -> SequenceTracker:
        key = (producer, epoch)
        if key not in self._trackers:
            row = self._db.execute(
                "SELECT watermark, ranges FROM epochs WHERE producer = ? AND epoch = ?", key
            ).fetchone()
            self._trackers[key] = (
                SequenceTracker()
                if row is None
                else SequenceTracker(row[0], [(low, high) for low, high in json.loads(row[1])])
            )
        return self._trackers[key]

    def save(self) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO epochs VALUES (?, ?, ?, ?)",
            [(*key, each.watermark, json.dumps(each.ranges)) for key, each in self._trackers.items()],
        )
        highest: dict[str, int] = {}
        for producer, epoch in self._trackers:
            highest[producer] = max(epoch, highest.get(producer, 0))
        self._db.executemany(
            "INSERT INTO producers (producer, epoch, fenced_epoch) VALUES (?, ?, 0)"
            " ON CONFLICT (producer) DO UPDATE SET epoch = max(epoch, excluded.epoch)",
            highest.items(),
        )


def _apply(db: sqlite3.Connection, batch: Batch, now_us: int) -> Applied:
    progress = _Progress(db)
    position = first = queries.position(db)
    late = 0
    for event in batch.events:
        tracker = progress.of(event.producer, event.place.epoch)
        tracker.raise_floor(event.floor)
        tracker.add(event.place.sequence)
        record = event.record
        if isinstance(record, PlaceRead):
            continue
        if isinstance(record, OtherRead):
            db.execute(
                queries.INSERT_OTHER, (event.producer, *event.place, record.kind, record.time_us, record.body)
            )
            continue
        keys = (record.request_id, position + 1, record.tenant_id, record.client_id, record.receive_time_us)
        if isinstance(record, IntentRead):
            place = (event.producer, *event.place)
            position += db.execute(queries.UPSERT_INTENT, (*keys, *place, record.body, now_us)).rowcount
        elif db.execute(queries.UPSERT_OUTCOME, (*keys, record.outcome, record.body, now_us)).rowcount:
            position += 1
        else:
            (ended,) = db.execute(
                "SELECT ended FROM requests WHERE request_id = ?", (record.request_id,)
            ).fetchone()
            late += ended != record.body
    for letter in batch.dead:
        if letter.place is not None:
            progress.of(letter.producer, letter.place.epoch).add(letter.place.sequence)
        value = letter.value[:MAX_DEAD_VALUE_BYTES]
        db.execute(
            queries.INSERT_DEAD,
            (
                batch.topic,
                letter.partition,
                letter.offset,
                letter.reason,
                letter.key,
                value,
                letter.producer,
                now_us,
            ),
        )
    if batch.dead:
        db.execute(
            "DELETE FROM dead_letters WHERE number <= (SELECT max(number) FROM dead_letters) - ?",
            (MAX_DEAD_LETTERS,),
        )
    progress.save()
    db.executemany(
        "INSERT OR REPLACE INTO offsets VALUES (?, ?, ?)",
        [(batch.topic, partition, offset) for partition, offset in batch.offsets.items()],
    )
    if position != first:
        queries.set_position(db, position)
    return Applied(position, late)


def _sync(db: sqlite3.Connection, report: ProducerReport, now_us: int) -> tuple[ProducerAnswer, int]:
    producer = report.producer
    progress = _Progress(db)
    watermarks = {}
    asked = {report.epoch, *(held.epoch for held in report.held)}
    floors = {held.epoch: held.floor for held in report.held}
    for epoch in sorted(asked):
        tracker = progress.of(producer, epoch)
        tracker.raise_floor(floors.get(epoch, 1))
        watermarks[epoch] = tracker.watermark
    progress.save()
    db.execute("DELETE FROM epochs WHERE producer = ? AND epoch < ?", (producer, min(asked)))
    closed = 0
    settled = may_settle(report, watermarks)
    if settled is not None:
        closed = _close(db, producer, settled, now_us)
    known, fenced_epoch = db.execute(
        "SELECT epoch, fenced_epoch FROM producers WHERE producer = ?", (producer,)
    ).fetchone()
    fenced = report.epoch <= fenced_epoch or report.epoch < known
    return ProducerAnswer(watermarks, fenced, max(known, fenced_epoch) + 1 if fenced else 0), closed


def _fence(db: sqlite3.Connection, producer: str, now_us: int) -> int:
    db.execute("UPDATE producers SET fenced_epoch = epoch WHERE producer = ?", (producer,))
    return _close(db, producer, Place(2**62, 0), now_us)


def _close(db: sqlite3.Connection, producer: str, before: Place, now_us: int) -> int:
    """Gives the producer's open intents before a place the outcome ABORTED."""
    rows = db.execute(
        "SELECT request_id, started FROM requests WHERE outcome IS NULL AND producer = ?"
        " AND (epoch, sequence) < (?, ?)",
        (producer, *before),
    ).fetchall()
    position = queries.position(db)
    for request_id, started in rows:
        position += 1
        db.execute(
            queries.CLOSE,
            (int(Outcome.ABORTED), event_codec.abort(started, now_us), position, now_us, request_id),
        )
    if rows:
        queries.set_position(db, position)
    return len(rows)
