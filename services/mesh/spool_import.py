"""Takes over the spool of a version that kept it in a SQLite file."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from services.mesh.broker import Topic
from services.mesh.spool_frames import Append, Damaged, Frame, Gap, Head, grouped


def read(database: Path) -> list[Frame] | None:
    """All that it holds; None where no spool was ever opened in it. Raises Damaged."""
    try:
        with contextlib.closing(sqlite3.connect(database)) as db:
            return _frames(db)
    except sqlite3.Error as error:
        raise Damaged(f"{database} is a spool of a former version, which cannot be read: {error}") from error


def remove(database: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)


def _frames(db: sqlite3.Connection) -> list[Frame] | None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in (1, 2):
        return None
    meta = dict(db.execute("SELECT key, value FROM meta"))
    if "producer" not in meta:
        return None
    gap = Gap()
    if meta.get("gap"):
        dropped, refused, first_s, last_s = meta["gap"].split()
        gap = Gap(int(dropped), int(refused), float(first_s), float(last_s))
    intents = db.execute(
        "SELECT request_id, traceparent, body FROM open_intents ORDER BY epoch, sequence"
    ).fetchall()
    opened = [Append(body, 0.0, traceparent, intent_of=name) for name, traceparent, body in intents]
    frames: list[Frame] = [Head(meta["producer"], int(meta["epoch"]), gap, {}, opened)]
    topic = "topic" if version == 2 else "0"
    rows = db.execute(
        f"SELECT epoch, sequence, outcome_of, traceparent, time_s, body, {topic} FROM events"  # noqa: S608
        " ORDER BY epoch, sequence"
    ).fetchall()
    for epoch, of_epoch in groupby(rows, key=lambda row: int(row[0])):
        frames += _groups(epoch, list(of_epoch))
    return frames


def _groups(epoch: int, rows: list[tuple[int, int, str | None, str, float, bytes, int]]) -> Iterable[Frame]:
    """Sequences of an epoch follow each other."""
    events = [
        Append(body, time_s, traceparent, outcome_of=outcome_of or "", topic=Topic(topic))
        for _, _, outcome_of, traceparent, time_s, body, topic in rows
    ]
    return grouped(epoch, rows[0][1], events)
