"""The rules of the audit protocol, pure: no I/O, no clock, no threads.

The way of an event: a producer's spool -> relay -> Kafka -> logging's store. Any part may die, and Kafka
may lose everything, at any step. What holds the way together:

- An event's place is (epoch, sequence). Sequences of an epoch count from 1 without a gap; an epoch is
  begun, durably, before anything is written under it, and never again.
- The store keeps, for each epoch, up to where it has everything (`SequenceTracker`).
- The spool keeps an event until the store says that it has it (`trim_limits`), and the relay publishes
  again whatever the store still lacks after a while (`PublishPlan`). So Kafka may lose or repeat anything.
- A request has at most one outcome in its spool, and the first that reaches the store stands.
- Intents that are open when a spool is opened belong to a dead process: the same transaction that begins
  the epoch writes ABORTED outcomes for them.
- The intents of a producer that has fallen silent are closed by logging (`SilenceWatch`), and its epoch is
  fenced: should it live after all, it begins another one.
- An intent that is open in the store although its spool has settled it has lost its outcome, which takes a
  power loss that took the end of the spool, or a store restored from a backup; logging closes it as well
  (`may_settle`).

The spool, the relay, the consumer and the store use these classes; so does the model that
tests/unit/test_audit_protocol_model.py runs through seeded crashes, wipes and partitions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Place(NamedTuple):
    """Where an event stands in its producer's life. Places of one producer are ordered."""

    epoch: int
    sequence: int


START = Place(0, 0)
"""Before every event."""


class HeldEpoch(NamedTuple):
    """What a spool holds of an epoch: all sequences from `floor` to `last`."""

    epoch: int
    floor: int
    last: int


MAX_HELD_EPOCHS = 1024
"""A report names so many epochs at most, the oldest ones; trimming them makes room for the others."""


@dataclass(frozen=True, slots=True)
class ProducerReport:
    """What a producer tells logging of its spool."""

    producer: str
    epoch: int
    held: tuple[HeldEpoch, ...] = ()
    """In order of their epochs."""
    settled_before: Place | None = None
    """Each intent before this place has its outcome among the events written so far. None where `held`
    leaves epochs out."""


@dataclass(frozen=True, slots=True)
class ProducerAnswer:
    """What logging says to a report."""

    watermarks: Mapping[int, int]
    """By epoch: everything up to this sequence is stored."""
    fenced: bool = False
    next_epoch: int = 0
    """Where fenced: the lowest epoch that the producer may begin."""


@dataclass(slots=True)
class SequenceTracker:
    """Which sequences of one epoch are stored: all up to the watermark, and ranges beyond it."""

    watermark: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """Inclusive, sorted, disjoint, none touching another or the watermark."""
    max_ranges: int = 2048
    """Topics of one spool are read side by side: while one is behind, each of its events is a hole."""

    def __contains__(self, sequence: int) -> bool:
        if sequence <= self.watermark:
            return True
        index = bisect_right(self.ranges, (sequence, 2**63)) - 1
        return index >= 0 and self.ranges[index][1] >= sequence

    def add(self, sequence: int) -> bool:
        """Notes that a sequence is stored; False where that was known.

        Beyond `max_ranges` the highest range is forgotten: its events are stored, but will be sent again.
        """
        if sequence == self.watermark + 1:  # as nearly all do; no range touches the watermark
            self.watermark = sequence
            self._absorb()
            return True
        if sequence in self:
            return False
        low = high = sequence
        index = bisect_right(self.ranges, (sequence, sequence))
        if index < len(self.ranges) and self.ranges[index][0] == sequence + 1:
            high = self.ranges.pop(index)[1]
        if index > 0 and self.ranges[index - 1][1] == sequence - 1:
            low = self.ranges.pop(index - 1)[0]
            index -= 1
        self.ranges.insert(index, (low, high))
        if len(self.ranges) > self.max_ranges:
            self.ranges.pop()
        return True

    def raise_floor(self, floor: int) -> None:
        """The spool holds nothing below `floor`, since a store had it: do not wait for that."""
        if floor - 1 > self.watermark:
            self.watermark = floor - 1
            self._absorb()

    def _absorb(self) -> None:
        while self.ranges and self.ranges[0][0] <= self.watermark + 1:
            self.watermark = max(self.watermark, self.ranges.pop(0)[1])


@dataclass(slots=True)
class PublishPlan:
    """What the relay publishes next, and when it begins again.

    `mark` is the last place published. What the store does not confirm within `timeout_s` is published
    again, from the oldest event held; each repetition in vain doubles the wait, any progress resets it.
    The wait runs on answers of the store only: while logging is away, nothing is repeated.
    """

    first_timeout_s: float = 5.0
    max_timeout_s: float = 120.0
    mark: Place = START
    highest: Place = START
    """The last place ever published in this life; rewinding leaves it."""
    timeout_s: float = 0.0
    _awaited: Place | None = None
    _since_s: float = 0.0

    def __post_init__(self) -> None:
        self.timeout_s = self.first_timeout_s

    def published(self, last: Place) -> None:
        """Kafka took everything up to `last`."""
        self.mark = max(self.mark, last)
        self.highest = max(self.highest, last)

    def awaits(self, oldest_held: Place | None) -> bool:
        """Whether something published is not yet confirmed."""
        return oldest_held is not None and oldest_held <= self.mark

    def confirmed(self, oldest_held: Place | None, now_s: float) -> bool:
        """The store answered, and what it has was trimmed. True where the plan was rewound."""
        if oldest_held is None or oldest_held > self.mark:
            self._awaited = None
            self.timeout_s = self.first_timeout_s
            return False
        if oldest_held != self._awaited:
            if self._awaited is not None:
                self.timeout_s = self.first_timeout_s
            self._awaited, self._since_s = oldest_held, now_s
            return False
        if now_s - self._since_s < self.timeout_s:
            return False
        self.mark = Place(oldest_held.epoch, oldest_held.sequence - 1)
        self._since_s = now_s
        self.timeout_s = min(self.timeout_s * 2, self.max_timeout_s)
        return True


def trim_limits(held: Iterable[HeldEpoch], watermarks: Mapping[int, int], highest: Place) -> dict[int, int]:
    """What a spool may forget: by epoch, everything up to a sequence.

    Only what the store confirmed, and only what was published in this life: a spool restored from a backup
    must not take the confirmation of its other self's events for its own.
    """
    limits: dict[int, int] = {}
    for epoch, floor, last in held:
        limit = min(watermarks.get(epoch, 0), last)
        if epoch == highest.epoch:
            limit = min(limit, highest.sequence)
        if epoch <= highest.epoch and limit >= floor:
            limits[epoch] = limit
    return limits


def must_begin_epoch(epoch: int, last_sequence: int, answer: ProducerAnswer) -> int | None:
    """The epoch that a living spool has to begin, or None.

    Beside a fence, a watermark beyond what this life has written asks for it: someone else wrote under the
    same epoch, which takes a spool restored from a backup.
    """
    if answer.fenced:
        return max(epoch + 1, answer.next_epoch)
    if answer.watermarks.get(epoch, 0) > last_sequence:
        return epoch + 1
    return None


def may_settle(report: ProducerReport, watermarks: Mapping[int, int]) -> Place | None:
    """The place before which the producer's intents have their outcomes in the store, as far as they ever
    will; None while events of the report are missing."""
    if all(watermarks.get(epoch, 0) >= last for epoch, _, last in report.held):
        return report.settled_before
    return None


@dataclass(slots=True)
class SilenceWatch:
    """Which producers have been silent for `fence_after_s` while logging could hear them.

    Time counts up to `read_all`, the last moment of which everything that Kafka had is known to be read;
    where that stood still for more than `max_gap_s` (logging was down, stopped, or cut off), it counts anew
    for everybody. An intent that comes in under a fenced epoch proves that its producer lived, so it is
    closed like any other, after another silence: a request that still runs is not called aborted.
    """

    fence_after_s: float
    max_gap_s: float = 30.0
    max_producers: int = 10_000
    _listening_since_s: float | None = None
    _read_until_s: float = 0.0
    _heard_s: dict[str, float] = field(default_factory=dict)
    _forgotten_s: float = float("-inf")
    """When any of those was heard that `max_producers` made us forget."""

    def heard(self, producer: str, now_s: float) -> None:
        """A report or an event came from it."""
        self._heard_s.pop(producer, None)
        if len(self._heard_s) >= self.max_producers:
            self._forgotten_s = self._heard_s.pop(next(iter(self._heard_s)))
        self._heard_s[producer] = now_s

    def read_all(self, until_s: float) -> None:
        """Logging has read all that Kafka had at that moment."""
        if self._listening_since_s is None or until_s - self._read_until_s > self.max_gap_s:
            self._listening_since_s = until_s
        self._read_until_s = until_s

    def silent(self, producers: Iterable[str]) -> list[str]:
        """Those of `producers` that are to be fenced."""
        if self._listening_since_s is None:
            return []
        since_s = max(self._listening_since_s, self._forgotten_s)
        return [
            producer
            for producer in producers
            if self._read_until_s - max(since_s, self._heard_s.get(producer, since_s)) >= self.fence_after_s
        ]
