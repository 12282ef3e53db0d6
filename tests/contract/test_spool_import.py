"""The spool of a version that kept it in SQLite goes on under its name, and loses nothing."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.mesh.audit_protocol import START, HeldEpoch, Place
from services.mesh.broker import Topic
from services.mesh.event_codec import EventEncoder
from services.mesh.events import RequestEnded, RequestStarted
from tests.framework.audit_path import ended, make_spool, running, serve, started
from tests.framework.spool_story import events, gaps, story
from tests.framework.waiting import eventually

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    epoch INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    outcome_of TEXT,
    traceparent TEXT NOT NULL,
    time_s REAL NOT NULL,
    body BLOB NOT NULL,
    topic INTEGER NOT NULL DEFAULT 0,
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


def body_of(event: RequestStarted | RequestEnded) -> bytes:
    encoder = EventEncoder("gateway", "gateway-0-abc")
    return encoder.started(event, NOW)[0] if isinstance(event, RequestStarted) else encoder.ended(event, NOW)


def write_former(path: Path, version: int) -> None:
    """What a process left that served `a`, and died while it served `b`: its first event is forgotten."""
    with sqlite3.connect(path) as db:
        db.executescript(SCHEMA)
        rows = [
            (6, 7, None, "", 1.0, body_of(started("b"))),
            (6, 8, "a", "00-trace", 2.0, body_of(ended("a"))),
        ]
        for row in rows:
            db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, 0)", row)
        db.execute("INSERT INTO open_intents VALUES (?, ?, ?, ?, ?)", ("b", 6, 7, "", body_of(started("b"))))
        for pair in (("producer", "gateway-0-abc"), ("epoch", 7), ("gap", "3 0 1.5 2.5")):
            db.execute("INSERT INTO meta VALUES (?, ?)", pair)
        if version == 1:
            db.execute("ALTER TABLE events DROP COLUMN topic")
        db.execute(f"PRAGMA user_version = {version}")
    db.close()


@pytest.mark.parametrize("version", [1, 2])
async def test_a_former_spool_is_taken_over_once(version: int, tmp_path: Path) -> None:
    write_former(tmp_path / "spool.db", version)
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        assert spool.producer == "gateway-0-abc"
        await serve(spool, "c")
        assert story(await events(spool))[:5] == [
            (Place(6, 7), "b started"),
            (Place(6, 8), "a SUCCEEDED"),
            (Place(8, 1), "b ABORTED"),
            (Place(8, 2), "c started"),
            (Place(8, 3), "c SUCCEEDED"),
        ]
        first = (await spool.read_after(START, 2, 1 << 20))[1]
        assert (first.traceparent, first.topic) == ("00-trace", Topic.AUDIT)
        assert spool.report().held[0] == HeldEpoch(6, 7, 8)
        assert not (tmp_path / "spool.db").exists()
        await spool.trim({6: 8})
        await eventually(lambda: spool.ledger.held_events == 4)
        assert gaps(await events(spool)) == [(3, 0)]
    again = make_spool(tmp_path / "spool")
    async with running(again):
        assert (again.producer, again.ledger.epoch, again.ledger.held_events) == ("gateway-0-abc", 9, 4)


async def test_a_former_spool_that_was_never_opened_is_none(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "spool.db").close()
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        assert spool.ledger.epoch == 1


async def test_a_damaged_former_spool_is_refused_and_kept(tmp_path: Path) -> None:
    content = b"SQLite format 3\0" + b"\xff" * 4096
    (tmp_path / "spool.db").write_bytes(content)
    spool = make_spool(tmp_path / "spool")
    with pytest.raises(OSError, match=r"spool\.db.*cannot be read.*move it away"):
        await spool.start()
    await spool.stop()
    assert (tmp_path / "spool.db").read_bytes() == content
