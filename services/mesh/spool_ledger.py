"""What a spool knows of itself without asking its file: room, what is held, what is open."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from services.mesh.audit_protocol import MAX_HELD_EPOCHS, HeldEpoch, Place, ProducerReport
from services.mesh.spool_frames import Append
from services.mesh.spool_recent import Recent
from services.mesh.spool_state import Holding

EVENT_OVERHEAD_BYTES = 160
"""What an event costs beside its body: its request's id, its trace, its share of frames."""


class OpenIntent(Struct, eq=False):
    """An intent without an outcome."""

    promised: int
    """The room kept for its outcome; 0 once that is on its way."""
    facts: bytes
    """The request's facts, as its outcome repeats them."""
    place: Place | None = None
    """None until the intent is committed."""
    ending: bool = False
    group: int = 0
    """The writer's, with which it is written."""


class SpoolLedger:
    """Room is taken when an event is admitted, and given back when it is trimmed or was not written.

    A share of the room for each tenant would be decided in `admit`.
    """

    def __init__(self, *, max_bytes: int, max_events: int) -> None:
        self.max_bytes = max_bytes
        self.max_events = max_events
        self.held_bytes = self.held_events = 0
        self.promised_bytes = self.promised_events = 0
        self.epoch = 0
        self.last_sequence = 0
        self.open: dict[str, OpenIntent] = {}
        """In the order in which they were written."""
        self.recent = Recent()
        self._spans: dict[int, tuple[int, int]] = {}
        """By epoch: the first and the last sequence held."""

    def admit(self, size: int, outcome_bytes: int = 0, *, share: float = 1.0) -> bool:
        """Promises room for an event of this size, and for its outcome where it will have one, or for
        neither. `share`: of all the room, so much may be taken then."""
        events = 2 if outcome_bytes else 1
        size += outcome_bytes + EVENT_OVERHEAD_BYTES * events
        if (
            self.held_bytes + self.promised_bytes + size > share * self.max_bytes
            or self.held_events + self.promised_events + events > share * self.max_events
        ):
            return False
        self.promised_bytes += size
        self.promised_events += events
        return True

    def resize(self, promised: int, size: int) -> None:
        """Room that was promised is to be used by an event of another size."""
        self.promised_bytes += size - promised

    def withdraw(self, size: int) -> None:
        """An event that was admitted will not be written."""
        self.promised_bytes -= size + EVENT_OVERHEAD_BYTES
        self.promised_events -= 1

    def committed(self, event: Append, place: Place) -> None:
        """An event that was admitted is in the file."""
        size = len(event.body) + EVENT_OVERHEAD_BYTES
        self.promised_bytes -= size
        self.promised_events -= 1
        self.held_bytes += size
        self.held_events += 1
        self.recent.add(event, place)
        epoch, sequence = place
        span = self._spans.get(epoch)
        self._spans[epoch] = (sequence if span is None else span[0], sequence)
        if epoch == self.epoch:
            self.last_sequence = sequence

    def trimmed(self, limits: Mapping[int, int], events: int, size: int) -> None:
        """Each epoch's events up to a sequence are out of the file."""
        for epoch, limit in limits.items():
            self.recent.forget(Place(epoch, limit))
            floor, last = self._spans.get(epoch, (1, 0))
            if limit >= last:
                self._spans.pop(epoch, None)
            else:
                self._spans[epoch] = (max(floor, limit + 1), last)
        self.held_bytes -= size + EVENT_OVERHEAD_BYTES * events
        self.held_events -= events

    def found(self, epoch: int, holding: Holding) -> None:
        """The file was opened: what it has is what counts."""
        self._spans = {held.epoch: (held.floor, held.last) for held in holding.epochs}
        self.held_events = holding.events
        self.held_bytes = holding.bytes + EVENT_OVERHEAD_BYTES * holding.events
        self.begun(epoch)
        self.last_sequence = max(self.last_sequence, self._spans.get(epoch, (1, 0))[1])

    def begun(self, epoch: int) -> None:
        """The file is in this epoch."""
        if epoch > self.epoch:
            self.epoch, self.last_sequence = epoch, 0

    def report(self, producer: str) -> ProducerReport:
        """What logging is told."""
        held = tuple(HeldEpoch(epoch, *span) for epoch, span in sorted(self._spans.items())[:MAX_HELD_EPOCHS])
        settled = Place(self.epoch, self.last_sequence + 1)
        # The first is the oldest. While it is not committed, nothing that is committed is open.
        first = next(iter(self.open.values()), None)
        if first is not None and first.place is not None:
            settled = first.place
        return ProducerReport(producer, self.epoch, held, settled if len(held) == len(self._spans) else None)

    def floor(self, epoch: int) -> int:
        return self._spans.get(epoch, (1, 0))[0]

    @property
    def last(self) -> Place:
        """Of all that was written."""
        return Place(self.epoch, self.last_sequence)

    @property
    def oldest_held(self) -> Place | None:
        if not self._spans:
            return None
        epoch = min(self._spans)
        return Place(epoch, self._spans[epoch][0])

    @property
    def bytes(self) -> int:
        return self.held_bytes + self.promised_bytes

    @property
    def events(self) -> int:
        return self.held_events + self.promised_events
