"""The rows of `requests` that a batch of events changes, as many as it can to a statement.

Each statement takes the interpreter's lock away from the event loop and asks for it again, and each row has
an entry in five indexes: a request whose intent and outcome come in one batch is written once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from services.mesh.audit_protocol import Place
from services.mesh.event_codec import IntentRead, OutcomeRead

T = TypeVar("T")
_Value = str | int | bytes | None

MAX_ROWS = 32
"""Of one statement."""


def _of_rows(before: str, row: str, after: str = "") -> tuple[str, ...]:
    """The statement for each number of rows."""
    return tuple(f"{before} {', '.join([row] * rows)}{after}" for rows in range(MAX_ROWS + 1))


_KNOWN = _of_rows(
    "SELECT request_id, started IS NOT NULL, outcome IS NOT NULL FROM requests WHERE request_id IN (",
    "?",
    ")",
)
_INSERT = _of_rows(
    # FAIL: after a failure nothing of the transaction is kept, so SQLite need not copy each page aside, often
    # into a file made for that, to undo this statement alone.
    "INSERT OR FAIL INTO requests (request_id, position, tenant_id, client_id, receive_time_us,"
    " store_time_us, outcome, producer, epoch, sequence, started, ended) VALUES",
    "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
)
_UPDATE = """
UPDATE requests
SET position = ?, store_time_us = ?, outcome = coalesce(outcome, ?), producer = coalesce(producer, ?),
    epoch = coalesce(epoch, ?), sequence = coalesce(sequence, ?), started = coalesce(started, ?),
    ended = coalesce(ended, ?)
WHERE request_id = ?
"""


class RequestRows:
    """What a batch makes of requests; inside of one transaction, which `write` is to end.

    A request keeps its first intent and its first outcome.
    """

    def __init__(self, db: sqlite3.Connection, request_ids: Iterable[str], position: int) -> None:
        """`request_ids` are all that the batch has events of, `position` the highest one given out."""
        self.position = position
        self._db = db
        self._rows: dict[str, _Row] = {}
        """In the order of their first events."""
        self._known: set[str] = set()
        """Those that the database has."""
        self._begun: set[str] = set()
        """Those whose intent is known, here or in the database."""
        self._ended: set[str] = set()
        """Those whose outcome is."""
        for names in _parts(list(request_ids)):
            for request_id, begun, ended in db.execute(_KNOWN[len(names)], names):
                self._known.add(request_id)
                if begun:
                    self._begun.add(request_id)
                if ended:
                    self._ended.add(request_id)

    def begin(self, producer: str, place: Place, intent: IntentRead) -> None:
        if intent.request_id in self._begun:
            return
        self._begun.add(intent.request_id)
        row = self._change(intent)
        row.producer, row.place, row.started = producer, place, intent.body

    def end(self, outcome: OutcomeRead) -> bool:
        """Whether the request has another outcome, so that this one is left out."""
        request_id = outcome.request_id
        if request_id in self._ended:
            row = self._rows.get(request_id)
            return outcome.body != (row.ended if row and row.ended is not None else self._stored(request_id))
        self._ended.add(request_id)
        row = self._change(outcome)
        row.outcome, row.ended = outcome.outcome, outcome.body
        return False

    def write(self, now_us: int) -> None:
        made = [row for row in self._rows.values() if row.first.request_id not in self._known]
        for part in _parts(made):
            self._db.execute(_INSERT[len(part)], [value for row in part for value in row.inserted(now_us)])
        self._db.executemany(
            _UPDATE,
            [row.updated(now_us) for row in self._rows.values() if row.first.request_id in self._known],
        )

    def _change(self, event: IntentRead | OutcomeRead) -> _Row:
        self.position += 1
        row = self._rows.get(event.request_id)
        if row is None:
            row = self._rows[event.request_id] = _Row(event)
        row.position = self.position
        return row

    def _stored(self, request_id: str) -> bytes:
        found = self._db.execute("SELECT ended FROM requests WHERE request_id = ?", (request_id,))
        return bytes(found.fetchone()[0])


class _Row:
    """What is new of one request."""

    __slots__ = ("ended", "first", "outcome", "place", "position", "producer", "started")

    def __init__(self, first: IntentRead | OutcomeRead) -> None:
        self.first = first
        self.position = 0
        self.outcome: int | None = None
        self.producer: str | None = None
        self.place: tuple[int | None, int | None] = (None, None)
        self.started: bytes | None = None
        self.ended: bytes | None = None

    def inserted(self, now_us: int) -> tuple[_Value, ...]:
        """As _INSERT has it."""
        first = self.first
        return (
            first.request_id,
            self.position,
            first.tenant_id,
            first.client_id,
            first.receive_time_us,
            now_us,
            self.outcome,
            self.producer,
            *self.place,
            self.started,
            self.ended,
        )

    def updated(self, now_us: int) -> tuple[_Value, ...]:
        """As _UPDATE has it."""
        return (
            self.position,
            now_us,
            self.outcome,
            self.producer,
            *self.place,
            self.started,
            self.ended,
            self.first.request_id,
        )


def _parts(whole: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(whole), MAX_ROWS):
        yield whole[start : start + MAX_ROWS]
