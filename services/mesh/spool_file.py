"""The spool's file: one SQLite database, used by one thread of one process.

WAL with synchronous=NORMAL: what was committed survives the process, and a power loss may take the last
commits; FULL in `strict`. A group with a job in it is always FULL, since its submitter forgets it; so is the
beginning of an epoch, so that no place is ever used twice.
The locking mode is EXCLUSIVE: a second process that opens the file is refused, and no shared memory file is
needed.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from services.mesh import spool_rows, spool_schema
from services.mesh.audit_protocol import HeldEpoch, Place
from services.mesh.broker import Topic
from services.mesh.event_codec import EventEncoder


@dataclass(slots=True)
class Gap:
    """What could not be written, and is not yet recorded as an event."""

    dropped: int = 0
    refused: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.dropped or self.refused)


class Append(Struct, frozen=True):
    """An event to be written. At most one of `intent_of` and `outcome_of` is set, to a request's id."""

    body: bytes
    time_s: float
    """When it happened, in seconds since 1970."""
    traceparent: str = ""
    intent_of: str = ""
    outcome_of: str = ""
    gap: Gap | None = None
    """What is left to be recorded, once this event is written."""
    topic: Topic = Topic.AUDIT


@dataclass(frozen=True, slots=True)
class SpooledEvent:
    """An event as it waits to be published."""

    place: Place
    outcome_of: str | None
    traceparent: str
    body: bytes
    topic: Topic = Topic.AUDIT


@dataclass(frozen=True, slots=True)
class Holding:
    """What a spool has not yet forgotten."""

    epochs: tuple[HeldEpoch, ...]
    events: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Opened:
    """What was found and done when the file was opened."""

    producer: str
    epoch: int
    holding: Holding
    closed: int
    """How many intents of a former process were given the outcome ABORTED."""
    gap: Gap


class SpoolLocked(OSError):
    """Another process has the file open."""


class SpoolUnusable(OSError):
    """The file is no spool of ours, or is damaged."""


class SpoolFile:
    """All SQL of a spool. Errors of the disk come as sqlite3.Error or OSError."""

    def __init__(self, path: Path, *, source: str, instance: str, durable: bool) -> None:
        self._path = path
        self._source = source
        self._instance = instance
        self._synchronous = "FULL" if durable else "NORMAL"
        self._synchronous_now = ""
        self._connection: sqlite3.Connection | None = None
        self._recovered: Holding | None = None
        self._producer = ""
        self._epoch = 0
        self._last = 0

    def open(self, now: datetime) -> Opened:
        """Begins a life: one transaction begins the epoch and closes what was open.

        Raises SpoolLocked, SpoolUnusable, or whatever the disk says.
        """
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._connect()
        try:
            with self._transaction("FULL"):
                self._producer = self._read_meta("producer") or self._mint()
                self._epoch = int(self._read_meta("epoch") or 0) + 1
                self._last = 0
                self._write_meta("epoch", self._epoch)
                closed = self._close_open_intents(now)
        except sqlite3.DatabaseError as error:
            self.close()
            if isinstance(error, sqlite3.OperationalError) and "locked" not in str(error):
                raise
            raise SpoolUnusable(
                f"the spool {self._path} cannot be used ({error}); move it away to begin a new one, and keep "
                "it: it may hold events that are nowhere else"
            ) from error
        return Opened(self._producer, self._epoch, self.holding(), closed, self._read_gap())

    def holding(self) -> Holding:
        """What is in the file."""
        db = self._reconnected()
        held = tuple(
            HeldEpoch(*row)
            for row in db.execute(
                "SELECT epoch, min(sequence), max(sequence) FROM events GROUP BY epoch ORDER BY epoch"
            )
        )
        events, size = db.execute("SELECT count(*), total(length(body)) FROM events").fetchone()
        return Holding(held, events, int(size))

    def append(self, batch: Sequence[Append]) -> list[Place | None]:
        """Writes a batch in one transaction. The result has the events' places; None is a second outcome of
        a request, which is left out.
        """
        db = self._reconnected()
        has_job = any(event.topic is not Topic.AUDIT for event in batch)
        with self._transaction("FULL" if has_job else self._synchronous):
            places, last = spool_rows.insert(db, self._epoch, self._last, batch)
            spool_rows.note_open(db, batch, places)
            for event, place in zip(batch, places, strict=True):
                if event.gap is not None and place is not None:
                    self._write_gap(event.gap)
        self._last = last
        return places

    def remember_gap(self, gap: Gap) -> None:
        """Keeps over a crash what is left to be recorded."""
        self._reconnected()
        with self._transaction(self._synchronous):
            self._write_gap(gap)

    def read_after(self, mark: Place, max_events: int, max_bytes: int) -> list[SpooledEvent]:
        """The next events in order; at least one, where there is one."""
        found: list[SpooledEvent] = []
        size = 0
        rows = self._reconnected().execute(
            "SELECT epoch, sequence, outcome_of, traceparent, body, topic FROM events"
            " WHERE (epoch, sequence) > (?, ?) ORDER BY epoch, sequence LIMIT ?",
            (*mark, max_events),
        )
        for epoch, sequence, outcome_of, traceparent, body, topic in rows:
            size += len(body)
            if found and size > max_bytes:
                break
            found.append(SpooledEvent(Place(epoch, sequence), outcome_of, traceparent, body, Topic(topic)))
        rows.close()
        return found

    def trim(self, limits: Mapping[int, int]) -> tuple[int, int]:
        """Forgets each epoch's events up to a sequence. Returns how many events and bytes that were."""
        db = self._reconnected()
        events = size = 0
        with self._transaction(self._synchronous):
            for limit in limits.items():
                count, total = db.execute(
                    "SELECT count(*), total(length(body)) FROM events WHERE epoch = ? AND sequence <= ?",
                    limit,
                ).fetchone()
                db.execute("DELETE FROM events WHERE epoch = ? AND sequence <= ?", limit)
                events, size = events + count, size + int(total)
        return events, size

    def begin_epoch(self, epoch: int) -> None:
        """Goes on under another epoch; what is open stays open."""
        self._reconnected()
        with self._transaction("FULL"):
            self._write_meta("epoch", epoch)
        self._epoch, self._last = epoch, 0

    def oldest_time_s(self) -> float | None:
        """When the oldest event held happened."""
        row = (
            self._reconnected()
            .execute("SELECT time_s FROM events ORDER BY epoch, sequence LIMIT 1")
            .fetchone()
        )
        return None if row is None else float(row[0])

    def take_recovered(self) -> Holding | None:
        """What was found when the file was opened again after an error of the disk; told once."""
        recovered, self._recovered = self._recovered, None
        return recovered

    def close(self) -> None:
        """Also for after an error of the disk: the next call opens the file again, in the same epoch."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.OperationalError("the spool is closed")
        return self._connection

    def _connect(self) -> None:
        db = sqlite3.connect(self._path, isolation_level=None, timeout=2.0, cached_statements=128)
        self._connection = db
        self._synchronous_now = ""
        try:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            if db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise SpoolUnusable(f"the disk of {self._path} does not allow SQLite's WAL")
            db.execute("PRAGMA journal_size_limit = 4194304")
            with self._transaction("FULL"):
                spool_schema.prepare(db)
        except spool_schema.WrongFormat as error:
            self.close()
            raise SpoolUnusable(f"{self._path} {error}; move it away") from None
        except sqlite3.OperationalError as error:
            self.close()
            if "locked" in str(error):
                raise SpoolLocked(f"the spool {self._path} is in use by another process") from error
            raise
        except sqlite3.DatabaseError as error:
            self.close()
            raise SpoolUnusable(f"{self._path} is no spool, or is damaged ({error}); move it away") from error
        except BaseException:
            self.close()
            raise
        self._path.chmod(0o600)

    def _reconnected(self) -> sqlite3.Connection:
        """The connection, after an error a new one. What was in doubt is looked up: a commit that failed may
        have reached the disk all the same."""
        if self._connection is None and self._epoch:
            self._connect()
            (last,) = self._db.execute(
                "SELECT coalesce(max(sequence), 0) FROM events WHERE epoch = ?", (self._epoch,)
            ).fetchone()
            self._last = max(self._last, last)
            self._recovered = self.holding()
        return self._db

    @contextlib.contextmanager
    def _transaction(self, synchronous: str) -> Iterator[None]:
        db = self._db
        if synchronous != self._synchronous_now:
            db.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous_now = synchronous
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise

    def _mint(self) -> str:
        """A name that no other spool has, ever: a lost one must not come back as another's successor."""
        instance = re.sub(r"[^a-z0-9.-]", "-", self._instance.lower())[:64]
        producer = f"{instance}-{secrets.token_hex(6)}"
        self._write_meta("producer", producer)
        return producer

    def _close_open_intents(self, now: datetime) -> int:
        encoder = EventEncoder(self._source, self._producer)
        rows = self._db.execute(
            "SELECT request_id, traceparent, body FROM open_intents ORDER BY epoch, sequence"
        ).fetchall()
        for request_id, traceparent, body in rows:
            written = self._db.execute(
                spool_rows.INSERTS[1],
                (
                    self._epoch,
                    self._last + 1,
                    request_id,
                    traceparent,
                    now.timestamp(),
                    encoder.aborted(body, now),
                    Topic.AUDIT,
                ),
            ).rowcount
            self._last += written
        self._db.execute("DELETE FROM open_intents")
        return len(rows)

    def _read_meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _write_meta(self, key: str, value: str | int) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _read_gap(self) -> Gap:
        text = self._read_meta("gap")
        if not text:
            return Gap()
        dropped, refused, first_s, last_s = text.split()
        return Gap(int(dropped), int(refused), float(first_s), float(last_s))

    def _write_gap(self, gap: Gap) -> None:
        self._write_meta("gap", f"{gap.dropped} {gap.refused} {gap.first_s!r} {gap.last_s!r}" if gap else "")
