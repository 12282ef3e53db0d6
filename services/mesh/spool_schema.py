"""The tables of a spool's file, and how a file of an older version becomes one of this."""

from __future__ import annotations

import sqlite3

FORMAT = 2
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    epoch INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    outcome_of TEXT,  -- the request's id, where this is its outcome
    traceparent TEXT NOT NULL,
    time_s REAL NOT NULL,
    body BLOB NOT NULL,
    topic INTEGER NOT NULL DEFAULT 0,  -- a broker.Topic
    PRIMARY KEY (epoch, sequence)
) WITHOUT ROWID;
CREATE UNIQUE INDEX one_outcome ON events (outcome_of) WHERE outcome_of IS NOT NULL;
CREATE TABLE open_intents (
    request_id TEXT PRIMARY KEY,
    epoch INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    traceparent TEXT NOT NULL,
    body BLOB NOT NULL
) WITHOUT ROWID;
"""
_MIGRATIONS = {1: "ALTER TABLE events ADD COLUMN topic INTEGER NOT NULL DEFAULT 0"}
"""By the format that they make the next one of."""


class WrongFormat(Exception):
    """The file is no spool that this version can use."""


def prepare(db: sqlite3.Connection) -> None:
    """Makes the tables in a new file, or what is missing in an older one, inside of a transaction.

    Raises WrongFormat with a sentence.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
        for statement in _SCHEMA.split(";\n"):
            db.execute(statement)
    elif version in _MIGRATIONS:
        for older in range(version, FORMAT):
            db.execute(_MIGRATIONS[older])
    elif version != FORMAT:
        raise WrongFormat(f"is no spool of this version (format {version}, not {FORMAT})")
    if version != FORMAT:
        db.execute(f"PRAGMA user_version = {FORMAT}")
