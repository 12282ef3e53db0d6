"""The last events that a spool wrote, so that whoever publishes them need not have the disk read them."""

from __future__ import annotations

from collections import deque
from itertools import islice

from services.mesh.audit_protocol import Place
from services.mesh.spool_file import SpooledEvent
from services.mesh.spool_frames import Append

MAX_RECENT_BYTES = 1 << 20
"""Of their bodies."""


class Recent:
    """Events of one epoch, whose sequences follow each other."""

    def __init__(self) -> None:
        self._events: deque[Append] = deque()
        self._epoch = -1
        self._first = 1
        """The sequence of the first event here, or of the next one to come."""
        self._bytes = 0

    def add(self, event: Append, place: Place) -> None:
        """It was written."""
        events = self._events
        if place.epoch != self._epoch or place.sequence != self._first + len(events):
            events.clear()
            self._epoch, self._first, self._bytes = place.epoch, place.sequence, 0
        events.append(event)
        self._bytes += len(event.body)
        while self._bytes > MAX_RECENT_BYTES:
            self._forget()

    def forget(self, last: Place) -> None:
        """Up to a place they are of no use any more."""
        if last.epoch == self._epoch:
            while self._events and self._first <= last.sequence:
                self._forget()

    def after(self, mark: Place, max_events: int, max_bytes: int) -> list[SpooledEvent] | None:
        """As `SpoolFile.read_after`, and nothing up to `mark` is asked for again. None where the next event
        may be one that is not here."""
        if mark.epoch != self._epoch or mark.sequence < self._first - 1:
            return None
        self.forget(mark)
        found: list[SpooledEvent] = []
        size = 0
        for sequence, event in enumerate(islice(self._events, max_events), self._first):
            size += len(event.body)
            if found and size > max_bytes:
                break
            place = Place(mark.epoch, sequence)
            found.append(
                SpooledEvent(place, event.outcome_of or None, event.traceparent, event.body, event.topic)
            )
        return found

    def _forget(self) -> None:
        self._bytes -= len(self._events.popleft().body)
        self._first += 1
