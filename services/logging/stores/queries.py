"""The SQL of the audit log that only reads, its tables, and its longer statements."""

from __future__ import annotations

import sqlite3

from services.logging.store import Cursor, RecordFilter, RequestRecord

SCHEMA = """
CREATE TABLE requests (
    request_id TEXT PRIMARY KEY,
    position INTEGER NOT NULL UNIQUE,
    tenant_id TEXT NOT NULL,
    client_id TEXT NOT NULL,
    receive_time_us INTEGER NOT NULL,
    outcome INTEGER,
    producer TEXT,
    epoch INTEGER,
    sequence INTEGER,
    started BLOB,
    ended BLOB,
    closed_by_logging INTEGER NOT NULL DEFAULT 0,
    store_time_us INTEGER NOT NULL
);
CREATE INDEX requests_by_time ON requests (receive_time_us, request_id);
CREATE INDEX requests_of_tenant ON requests (tenant_id, receive_time_us, request_id);
CREATE INDEX requests_open ON requests (producer, epoch, sequence) WHERE outcome IS NULL;
CREATE TABLE other_events (
    number INTEGER PRIMARY KEY,
    producer TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    kind TEXT NOT NULL,
    time_us INTEGER NOT NULL,
    body BLOB NOT NULL,
    UNIQUE (producer, epoch, sequence)
);
CREATE TABLE producers (
    producer TEXT PRIMARY KEY,
    epoch INTEGER NOT NULL,
    fenced_epoch INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE epochs (
    producer TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    watermark INTEGER NOT NULL,
    ranges TEXT NOT NULL,
    PRIMARY KEY (producer, epoch)
) WITHOUT ROWID;
CREATE TABLE offsets (
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    next_offset INTEGER NOT NULL,
    PRIMARY KEY (topic, partition)
) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counters VALUES ('position', 0);
"""

INSERT_OTHER = """
INSERT OR IGNORE INTO other_events (producer, epoch, sequence, kind, time_us, body) VALUES (?, ?, ?, ?, ?, ?)
"""
CLOSE = """
UPDATE requests SET outcome = ?, ended = ?, closed_by_logging = 1, position = ?, store_time_us = ?
WHERE request_id = ?
"""

_COLUMNS = "request_id, receive_time_us, started, ended, closed_by_logging, position, store_time_us"


def position(db: sqlite3.Connection) -> int:
    """The highest position given out."""
    (value,) = db.execute("SELECT value FROM counters WHERE name = 'position'").fetchone()
    return int(value)


def set_position(db: sqlite3.Connection, value: int) -> None:
    db.execute("UPDATE counters SET value = ? WHERE name = 'position'", (value,))


def search(
    db: sqlite3.Connection, which: RecordFilter, limit: int, after: Cursor | None
) -> list[RequestRecord]:
    conditions, arguments = _conditions(which)
    if after is not None:
        conditions.append("(receive_time_us, request_id) < (?, ?)")
        arguments += after
    return _select(db, conditions, arguments, "receive_time_us DESC, request_id DESC", limit)


def newest(db: sqlite3.Connection, which: RecordFilter, limit: int) -> tuple[list[RequestRecord], int]:
    conditions, arguments = _conditions(which)
    return _select(db, conditions, arguments, "position DESC", limit)[::-1], position(db)


def changed(
    db: sqlite3.Connection, which: RecordFilter, after_position: int, limit: int
) -> tuple[list[RequestRecord], int]:
    conditions, arguments = _conditions(which)
    found = _select(db, [*conditions, "position > ?"], [*arguments, after_position], "position", limit)
    return found, found[-1].position if len(found) == limit else max(position(db), after_position)


def _conditions(which: RecordFilter) -> tuple[list[str], list[str | int]]:
    found: list[tuple[str, str | int]] = []
    if which.request_id:
        found.append(("request_id = ?", which.request_id))
    if which.tenant_id:
        found.append(("tenant_id = ?", which.tenant_id))
    if which.client_id:
        found.append(("client_id = ?", which.client_id))
    if which.outcome:
        found.append(("outcome = ?", which.outcome))
    if which.receive_time_from_us is not None:
        found.append(("receive_time_us >= ?", which.receive_time_from_us))
    if which.receive_time_before_us is not None:
        found.append(("receive_time_us < ?", which.receive_time_before_us))
    conditions = [condition for condition, _ in found]
    if which.open_only:
        conditions.append("outcome IS NULL")
    return conditions, [argument for _, argument in found]


def _select(
    db: sqlite3.Connection, conditions: list[str], arguments: list[str | int], order: str, limit: int
) -> list[RequestRecord]:
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    # Only names that stand in this file are put together here; values are bound.
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM requests{where} ORDER BY {order} LIMIT ?",  # noqa: S608
        [*arguments, limit],
    )
    return [
        RequestRecord(request_id, time_us, started, ended, bool(closed), at, store_time_us)
        for request_id, time_us, started, ended, closed, at, store_time_us in rows
    ]
