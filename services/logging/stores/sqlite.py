"""The audit log in one SQLite file. A batch is one transaction: one sync for hundreds of events."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from services.logging.store import (
    Applied,
    Batch,
    Cursor,
    RecordFilter,
    RequestRecord,
)
from services.logging.stores import queries
from services.logging.stores.rows import RequestRows
from services.logging.stores.sqlite_file import SqliteFile
from services.mesh import event_codec
from services.mesh.audit_protocol import (
    Place,
    ProducerAnswer,
    ProducerReport,
    SequenceTracker,
    may_settle,
)
from services.mesh.event_codec import IntentRead, OtherRead, OutcomeRead
from services.mesh.events import Outcome

FORMAT = 1
OfRequest = IntentRead | OutcomeRead


class SqliteStore:
    """An `AuditStore`; one process at a time may have a file."""

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, "audit log", queries.SCHEMA, FORMAT)

    async def start(self) -> None:
        await self._file.start()

    async def stop(self) -> None:
        await self._file.stop()

    async def apply(self, batch: Batch, now_us: int) -> Applied:
        return await self._file.writing(lambda db: _apply(db, batch, now_us))

    async def offsets(self, topic: str) -> dict[int, int]:
        return await self._file.reading(
            lambda db: dict(
                db.execute("SELECT partition, next_offset FROM offsets WHERE topic = ?", (topic,))
            )
        )

    async def sync(self, report: ProducerReport, now_us: int) -> tuple[ProducerAnswer, int]:
        return await self._file.writing(lambda db: _sync(db, report, now_us))

    async def producers_with_open_requests(self) -> list[str]:
        return await self._file.reading(
            lambda db: [
                row[0]
                for row in db.execute(
                    "SELECT DISTINCT producer FROM requests WHERE outcome IS NULL AND producer IS NOT NULL"
                    " ORDER BY producer"
                )
            ]
        )

    async def fence(self, producer: str, now_us: int) -> int:
        return await self._file.writing(lambda db: _fence(db, producer, now_us))

    async def search(self, which: RecordFilter, limit: int, after: Cursor | None) -> list[RequestRecord]:
        return await self._file.reading(lambda db: queries.search(db, which, limit, after))

    async def newest(self, which: RecordFilter, limit: int) -> tuple[list[RequestRecord], int]:
        return await self._file.reading(lambda db: queries.newest(db, which, limit))

    async def changed(
        self, which: RecordFilter, after_position: int, limit: int
    ) -> tuple[list[RequestRecord], int]:
        return await self._file.reading(lambda db: queries.changed(db, which, after_position, limit))

    async def other_events(self, limit: int) -> list[tuple[str, Place, str, bytes]]:
        return await self._file.reading(
            lambda db: [
                (producer, Place(epoch, sequence), kind, body)
                for producer, epoch, sequence, kind, body in db.execute(
                    "SELECT producer, epoch, sequence, kind, body FROM other_events"
                    " ORDER BY number DESC LIMIT ?",
                    (limit,),
                )
            ]
        )


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
    first = queries.position(db)
    ids = {each.record.request_id: None for each in batch.events if isinstance(each.record, OfRequest)}
    requests = RequestRows(db, ids, first)
    late = 0
    for event in batch.events:
        place, record = event.place, event.record
        tracker = progress.of(event.producer, place.epoch)
        tracker.raise_floor(event.floor)
        tracker.add(place.sequence)
        if isinstance(record, IntentRead):
            requests.begin(event.producer, place, record)
        elif isinstance(record, OutcomeRead):
            late += requests.end(record)
        elif isinstance(record, OtherRead):
            db.execute(
                queries.INSERT_OTHER, (event.producer, *place, record.kind, record.time_us, record.body)
            )
    requests.write(now_us)
    progress.save()
    db.executemany(
        "INSERT OR REPLACE INTO offsets VALUES (?, ?, ?)",
        [(batch.topic, partition, offset) for partition, offset in batch.offsets.items()],
    )
    if requests.position != first:
        queries.set_position(db, requests.position)
    return Applied(requests.position, late)


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
