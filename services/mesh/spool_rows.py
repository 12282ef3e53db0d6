"""The rows that a group of events is in the spool's file.

A statement has as many of them as it can: each one takes the interpreter's lock away from the event loop, and
asks for it again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from services.mesh.audit_protocol import Place

if TYPE_CHECKING:
    from services.mesh.spool_file import Append

T = TypeVar("T")

MAX_ROWS = 32
"""Of one statement."""


def _of_rows(before: str, row: str, after: str = "") -> tuple[str, ...]:
    """The statement for each number of rows."""
    return tuple(f"{before} {', '.join([row] * rows)}{after}" for rows in range(MAX_ROWS + 1))


INSERTS = _of_rows(
    "INSERT INTO events VALUES",
    "(?, ?, ?, ?, ?, ?, ?)",
    " ON CONFLICT (outcome_of) WHERE outcome_of IS NOT NULL DO NOTHING",
)
_OPENED = _of_rows("INSERT OR REPLACE INTO open_intents VALUES", "(?, ?, ?, ?, ?)")
_ENDED = _of_rows("DELETE FROM open_intents WHERE request_id IN (", "?", ")")


def insert(
    db: sqlite3.Connection, epoch: int, last: int, batch: Sequence[Append]
) -> tuple[list[Place | None], int]:
    """Writes events after the sequence `last`, inside of a transaction. Their places, None for a second
    outcome of a request, which is left out; and the last sequence then."""
    places: list[Place | None] = []
    for part in _parts(batch):
        values = [value for at, event in enumerate(part, last + 1) for value in _row(epoch, at, event)]
        written = db.execute(INSERTS[len(part)], values).rowcount
        if written == len(part):
            places += [Place(epoch, last + at) for at in range(1, written + 1)]
            last += written
            continue
        # Some are second outcomes, which would leave gaps in the sequence: once more, one by one.
        if written:
            db.execute("DELETE FROM events WHERE epoch = ? AND sequence > ?", (epoch, last))
        for event in part:
            if db.execute(INSERTS[1], _row(epoch, last + 1, event)).rowcount:
                last += 1
                places.append(Place(epoch, last))
            else:
                places.append(None)
    return places, last


def note_open(db: sqlite3.Connection, batch: Sequence[Append], places: Sequence[Place | None]) -> None:
    """Keeps which requests have an intent and no outcome, now that a batch is written."""
    begun: dict[str, tuple[Any, ...]] = {}
    ended: list[str] = []
    for event, place in zip(batch, places, strict=True):
        if place is None:
            continue
        if event.intent_of:
            begun[event.intent_of] = (event.intent_of, *place, event.traceparent, event.body)
        elif event.outcome_of and begun.pop(event.outcome_of, None) is None:
            ended.append(event.outcome_of)
    for rows in _parts(list(begun.values())):
        db.execute(_OPENED[len(rows)], [value for row in rows for value in row])
    for names in _parts(ended):
        db.execute(_ENDED[len(names)], names)


def _row(epoch: int, sequence: int, event: Append) -> tuple[Any, ...]:
    outcome_of = event.outcome_of or None
    return (epoch, sequence, outcome_of, event.traceparent, event.time_s, event.body, event.topic)


def _parts(whole: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(whole), MAX_ROWS):
        yield whole[start : start + MAX_ROWS]
