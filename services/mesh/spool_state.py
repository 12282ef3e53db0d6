"""What a spool's frames say, one after another: as they are read at a start, then as they are written."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import takewhile

from msgspec import Struct

from services.mesh.audit_protocol import HeldEpoch, Place
from services.mesh.spool_frames import Append, Begun, Damaged, Frame, Gap, Group, Left, Trimmed


class Holding(Struct, frozen=True):
    """What a spool has not yet forgotten."""

    epochs: tuple[HeldEpoch, ...]
    events: int
    bytes: int


class _Span:
    """The events of an epoch that are held: sequences without a gap. 12 bytes each, and ids of outcomes."""

    __slots__ = ("first", "outcomes", "sizes", "times_s")

    def __init__(self, first: int) -> None:
        self.first = first
        self.sizes = array("I")
        self.times_s = array("d")
        self.outcomes: dict[str, int] = {}
        """Sequences by request, in order."""

    @property
    def last(self) -> int:
        return self.first + len(self.sizes) - 1

    def trim(self, limit: int) -> tuple[int, int]:
        """Forgets up to a sequence; how many events and bytes that were."""
        count = min(limit, self.last) - self.first + 1
        if count <= 0:
            return 0, 0
        size = sum(self.sizes[:count])
        del self.sizes[:count], self.times_s[:count]
        self.first += count
        gone = list(takewhile(lambda item: item[1] < self.first, self.outcomes.items()))
        for request_id, _ in gone:
            del self.outcomes[request_id]
        return count, size


class SpoolState:
    """See the module. Nothing here touches a file."""

    def __init__(self) -> None:
        self.producer = ""
        self.epoch = 0
        self.last = 0
        """The last sequence of the epoch."""
        self.gap = Gap()
        self.open: dict[str, Append] = {}
        """Intents without an outcome, in order."""
        self._spans: dict[int, _Span] = {}
        """By epoch, those that hold something."""

    def apply(self, frame: Frame) -> None:
        """Raises Damaged where a frame does not follow from those before it."""
        if isinstance(frame, Group):
            self.add(frame)
        elif isinstance(frame, Trimmed):
            self.trim(frame.limits)
        elif isinstance(frame, Left):
            self.gap = frame.gap
        elif isinstance(frame, Begun):
            self._begin(frame.epoch)
        else:
            self.producer, self.gap = frame.producer, frame.gap
            self.open = {event.intent_of: event for event in frame.open}
            self.trim(frame.trimmed)
            self._begin(frame.epoch)

    def add(self, group: Group) -> None:
        """As `apply`."""
        epoch, first = group.epoch, group.first
        span = self._spans.get(epoch)
        if span is None:
            span = self._spans[epoch] = _Span(first)
        elif first != span.first + len(span.sizes):
            raise Damaged(f"events from {Place(epoch, first)} on follow {span.last}")
        sizes, times_s, opened = span.sizes, span.times_s, self.open
        for sequence, event in enumerate(group.events, first):
            sizes.append(len(event.body))
            times_s.append(event.time_s)
            if event.outcome_of:
                span.outcomes[event.outcome_of] = sequence
                opened.pop(event.outcome_of, None)
            elif event.intent_of:
                opened[event.intent_of] = event
            if event.gap is not None:
                self.gap = event.gap
        if epoch == self.epoch:
            self.last = span.last

    def second_outcomes(self, batch: Sequence[Append]) -> set[int]:
        """Where in a batch there are outcomes of requests that have one, which is held or before it."""
        ended: set[str] = set()
        second: set[int] = set()
        for at, event in enumerate(batch):
            request_id = event.outcome_of
            if not request_id:
                continue
            if request_id in ended or self.has_outcome(request_id):
                second.add(at)
            ended.add(request_id)
        return second

    def has_outcome(self, request_id: str) -> bool:
        """Whether one is held."""
        for span in self._spans.values():  # noqa: SIM110, a generator takes twice as long
            if request_id in span.outcomes:
                return True
        return False

    def trim(self, limits: Mapping[int, int]) -> tuple[int, int]:
        """Forgets each epoch's events up to a sequence; how many events and bytes that were."""
        events = size = 0
        for epoch, limit in limits.items():
            span = self._spans.get(epoch)
            if span is not None:
                trimmed = span.trim(limit)
                events, size = events + trimmed[0], size + trimmed[1]
                if not span.sizes:
                    del self._spans[epoch]
        return events, size

    def floor(self, epoch: int) -> int | None:
        """The first sequence of an epoch that is held; None where nothing of it is."""
        span = self._spans.get(epoch)
        return None if span is None else span.first

    def holding(self) -> Holding:
        spans = sorted(self._spans.items())
        return Holding(
            tuple(HeldEpoch(epoch, span.first, span.last) for epoch, span in spans),
            sum(len(span.sizes) for _, span in spans),
            sum(sum(span.sizes) for _, span in spans),
        )

    @property
    def is_empty(self) -> bool:
        return not self._spans

    @property
    def oldest_time_s(self) -> float | None:
        """When the oldest event held happened."""
        return self._spans[min(self._spans)].times_s[0] if self._spans else None

    def _begin(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise Damaged(f"epoch {epoch} after epoch {self.epoch}")
        if epoch > self.epoch:
            self.epoch, self.last = epoch, 0
