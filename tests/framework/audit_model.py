"""The audit protocol as a pure state machine: a `World` in memory, over the real rules.

Durable and volatile state are apart, so that a crash is the loss of the volatile part. Each broken rule
that a run can see at once is asserted at once: nothing is trimmed that the store lacks, and no outcome
ever changes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from services.mesh.audit_protocol import (
    HeldEpoch,
    Place,
    ProducerAnswer,
    ProducerReport,
    PublishPlan,
    SequenceTracker,
    SilenceWatch,
    may_settle,
    must_begin_epoch,
    trim_limits,
)
from tests.framework.audit_trace import ABORTED, FENCE_AFTER_S, PARTITIONS, Crash, Fate, StoredRecord

TOPICS = 3
"""Audit events, jobs, retries."""


@dataclass(frozen=True)
class Event:
    """An event of a model spool. `outcome` of an intent is None; a note, or a job, has a number."""

    request_id: str = ""
    outcome: str | None = None
    note: int | None = None
    job: int | None = None

    @property
    def topic(self) -> int:
        return 0 if self.job is None else 1 + self.job % 2


@dataclass(frozen=True)
class Message:
    """An event on its way."""

    producer: str
    place: Place
    floor: int
    event: Event


@dataclass
class Spool:
    """The durable part of a gateway."""

    producer: str
    epoch: int = 0
    last: int = 0
    events: dict[Place, Event] = field(default_factory=dict)
    open: dict[str, Place] = field(default_factory=dict)

    history: list[Spool] = field(default_factory=list)
    """As it was after the beginning of its life, which is durable at once, and after each commit since."""

    keeps_history: bool = False

    def commit(self) -> None:
        if not self.keeps_history:
            return
        self.history.append(replace(self, events=dict(self.events), open=dict(self.open), history=[]))

    def append(self, event: Event) -> None:
        self.last += 1
        place = Place(self.epoch, self.last)
        self.events[place] = event
        if event.note is not None or event.job is not None:
            return
        if event.outcome is None:
            self.open[event.request_id] = place
        else:
            self.open.pop(event.request_id, None)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.last = epoch, 0

    def begin_life(self) -> None:
        self.begin_epoch(self.epoch + 1)
        for request_id in list(self.open):
            self.append(Event(request_id, ABORTED))
        self.history.clear()
        self.commit()

    def report(self) -> ProducerReport:
        held: dict[int, list[int]] = {}
        for place in self.events:
            held.setdefault(place.epoch, []).append(place.sequence)
        return ProducerReport(
            self.producer,
            self.epoch,
            tuple(HeldEpoch(epoch, min(s), max(s)) for epoch, s in sorted(held.items())),
            min(self.open.values(), default=Place(self.epoch, self.last + 1)),
        )


@dataclass
class Store:
    """The durable part of logging."""

    requests: dict[str, StoredRecord] = field(default_factory=dict)
    intents: dict[str, tuple[str, Place]] = field(default_factory=dict)
    notes: dict[tuple[str, Place], int] = field(default_factory=dict)
    trackers: dict[tuple[str, int], SequenceTracker] = field(default_factory=dict)
    offsets: dict[tuple[int, int], int] = field(default_factory=dict)
    """By topic and partition."""
    jobs: dict[int, None] = field(default_factory=dict)
    """The schedule, which is durable on its own."""
    epochs: dict[str, int] = field(default_factory=dict)
    fenced: dict[str, int] = field(default_factory=dict)
    settled: int = 0

    def apply(self, message: Message) -> None:
        producer, place, event = message.producer, message.place, message.event
        tracker = self.trackers.setdefault((producer, place.epoch), SequenceTracker(max_ranges=4))
        tracker.raise_floor(message.floor)
        tracker.add(place.sequence)
        self.epochs[producer] = max(place.epoch, self.epochs.get(producer, 0))
        if event.job is not None:
            return
        if event.note is not None:
            self.notes.setdefault((producer, place), event.note)
            return
        record = self.requests.get(event.request_id, StoredRecord(False, None, False))
        if event.outcome is None:
            self.intents.setdefault(event.request_id, (producer, place))
            record = record._replace(started=True)
        elif record.outcome is None:
            record = record._replace(outcome=event.outcome)
        self.requests[event.request_id] = record

    def open_intents(self) -> dict[str, tuple[str, Place]]:
        return {r: self.intents[r] for r, record in self.requests.items() if record.outcome is None}

    def close(self, request_id: str) -> None:
        record = self.requests[request_id]
        assert record.outcome is None
        self.requests[request_id] = record._replace(outcome=ABORTED, closed_by_logging=True)

    def fence(self, producer: str) -> None:
        self.fenced[producer] = self.epochs[producer]
        for request_id, (owner, _) in self.open_intents().items():
            if owner == producer:
                self.close(request_id)

    def sync(self, report: ProducerReport) -> ProducerAnswer:
        producer = report.producer
        for epoch, floor, _ in report.held:
            self.trackers.setdefault((producer, epoch), SequenceTracker(max_ranges=4)).raise_floor(floor)
        keep = min([report.epoch, *(held.epoch for held in report.held)])
        self.trackers = {k: v for k, v in self.trackers.items() if k[0] != producer or k[1] >= keep}
        asked = {report.epoch, *(held.epoch for held in report.held)}
        watermarks = {
            e: tracker.watermark for e in asked if (tracker := self.trackers.get((producer, e))) is not None
        }
        settled = may_settle(report, watermarks)
        if settled is not None:
            for request_id, (owner, place) in self.open_intents().items():
                if owner == producer and place < settled:
                    self.close(request_id)
                    self.settled += 1
        known = max(self.epochs.get(producer, 0), report.epoch)
        self.epochs[producer] = known
        fenced_epoch = self.fenced.get(producer, 0)
        fenced = report.epoch <= fenced_epoch or report.epoch < known
        return ProducerAnswer(watermarks, fenced, max(known, fenced_epoch) + 1 if fenced else 0)


class ModelWorld:
    """All of it, in one place. `power_loss` needs a world that `keeps_history`, which is slower."""

    def __init__(self, keeps_history: bool = False) -> None:
        self._keeps_history = keeps_history
        self._now_s = 0.0
        self._names = 0
        self._spools: dict[int, Spool] = {}
        self._plans: dict[int, PublishPlan] = {}
        self._owners: dict[str, int] = {}
        self._logs: dict[tuple[int, int], list[Message]] = {
            (topic, partition): [] for topic in range(TOPICS) for partition in range(PARTITIONS)
        }
        self._delayed: list[tuple[int, Message]] = []
        self._store = Store()
        self._watch = SilenceWatch(FENCE_AFTER_S)
        self._ever_fenced: set[int] = set()
        self._contact_s: dict[str, float] = {}

    async def open(self, gateway: int) -> None:
        if gateway not in self._spools:
            self._names += 1
            self._spools[gateway] = Spool(
                f"gateway-{gateway}-{self._names}", keeps_history=self._keeps_history
            )
            self._owners[self._spools[gateway].producer] = gateway
        self._spools[gateway].begin_life()
        self._plans[gateway] = PublishPlan()

    async def crash(self, gateway: int) -> None:
        del self._plans[gateway]

    async def lose(self, gateway: int) -> None:
        self._spools.pop(gateway, None)

    async def power_loss(self, gateway: int, share: float) -> set[str]:
        await self.crash(gateway)
        spool = self._spools[gateway]
        left = spool.history[int(len(spool.history) * share)]
        gone = {event.request_id for place, event in spool.events.items() if place not in left.events}
        # An intent may have been written, answered and trimmed since.
        gone |= set(spool.open) ^ set(left.open)
        self._spools[gateway] = replace(left, events=dict(left.events), open=dict(left.open), history=[])
        return gone

    async def start(self, gateway: int, request_id: str) -> None:
        self._spools[gateway].append(Event(request_id))
        self._spools[gateway].commit()

    async def end(self, gateway: int, request_id: str, outcome: str) -> None:
        self._spools[gateway].append(Event(request_id, outcome))
        self._spools[gateway].commit()

    async def note(self, gateway: int, number: int) -> None:
        self._spools[gateway].append(Event(note=number))
        self._spools[gateway].commit()

    async def job(self, gateway: int, number: int) -> None:
        self._spools[gateway].append(Event(job=number))
        self._spools[gateway].commit()

    async def publish(self, gateway: int, limit: int, fate: Fate) -> None:
        spool, plan = self._spools[gateway], self._plans[gateway]
        batch = [
            Message(
                spool.producer,
                place,
                min(p.sequence for p in spool.events if p.epoch == place.epoch),
                spool.events[place],
            )
            for place in sorted(place for place in spool.events if place > plan.mark)[:limit]
        ]
        if not batch:
            return
        partition = gateway % PARTITIONS
        landed = {Fate.TAKEN: len(batch), Fate.UNACKNOWLEDGED: len(batch), Fate.TORN: len(batch) // 2}
        for message in batch[: landed.get(fate, 0)]:
            self._logs[message.event.topic, partition].append(message)
        if fate is Fate.DELAYED:
            self._delayed += [(partition, message) for message in batch]
        if fate is Fate.TAKEN:
            plan.published(batch[-1].place)

    async def sync(self, gateway: int, answered: bool) -> None:
        spool = self._spools[gateway]
        self._heard(spool.producer)
        answer = self._store.sync(spool.report())
        if not answered:
            return
        plan = self._plans[gateway]
        epoch = must_begin_epoch(spool.epoch, spool.last, answer)
        limits = trim_limits(spool.report().held, answer.watermarks, plan.highest)
        for place in [p for p in spool.events if p.sequence <= limits.get(p.epoch, 0)]:
            self._judge_trim(spool.producer, place, spool.events.pop(place))
        if epoch is not None:
            spool.begin_epoch(epoch)
            spool.history.clear()
        spool.commit()
        plan.confirmed(min(spool.events, default=None), self._now_s)

    def _heard(self, producer: str) -> None:
        self._watch.heard(producer, self._now_s)
        self._contact_s[producer] = self._now_s

    def _judge_trim(self, producer: str, place: Place, event: Event) -> None:
        if event.job is not None:
            assert event.job in self._store.jobs, f"trimmed the job {event.job}, which the schedule lacks"
        elif event.note is not None:
            assert (producer, place) in self._store.notes, f"trimmed {place}, which the store lacks"
        else:
            record = self._store.requests.get(event.request_id)
            found = record is not None and (record.started if event.outcome is None else record.outcome)
            assert found, f"trimmed {place} of {event.request_id}, which the store lacks"

    async def land_delayed(self) -> None:
        for partition, message in self._delayed:
            self._logs[message.event.topic, partition].append(message)
        self._delayed.clear()

    async def duplicate(self, partition: int, back: int) -> None:
        for topic in range(TOPICS):
            log = self._logs[topic, partition]
            if log:
                log.append(log[-min(back, len(log))])

    async def wipe_broker(self) -> None:
        for log in self._logs.values():
            log.clear()

    async def consume(self, partition: int, limit: int, crash: Crash) -> None:
        await self._take(0, partition, limit, crash)

    async def schedule(self, partition: int, limit: int, crash: Crash) -> None:
        for topic in (1, 2):
            await self._take(topic, partition, limit, crash)

    async def _take(self, topic: int, partition: int, limit: int, crash: Crash) -> None:
        log = self._logs[topic, partition]
        offset = self._store.offsets.get((topic, partition), 0)
        if offset > len(log):  # the log is another one than it was: from its beginning
            offset = 0
        batch = log[offset : offset + limit]
        self._store.jobs.update({m.event.job: None for m in batch if m.event.job is not None})
        store = copy.deepcopy(self._store) if crash is Crash.BEFORE_COMMIT else self._store
        before = {r: record.outcome for r, record in store.requests.items() if record.outcome}
        for message in batch:
            store.apply(message)
            self._heard(message.producer)
        store.offsets[topic, partition] = offset + len(batch)
        assert all(store.requests[r].outcome == outcome for r, outcome in before.items())
        if crash is not Crash.NEVER:
            await self.restart_store()

    async def restart_store(self) -> None:
        self._watch = SilenceWatch(FENCE_AFTER_S)

    async def wipe_store(self) -> None:
        self._store = Store()
        await self.restart_store()

    async def check(self) -> None:
        offsets = self._store.offsets
        if all(offsets.get((0, p), 0) >= len(self._logs[0, p]) for p in range(PARTITIONS)):
            self._watch.read_all(self._now_s)
        with_open = sorted({producer for producer, _ in self._store.open_intents().values()})
        for producer in self._watch.silent(with_open):
            assert self._now_s - self._contact_s.get(producer, 0) >= FENCE_AFTER_S, f"{producer} was heard"
            self._store.fence(producer)
            self._ever_fenced.add(self._owners[producer])

    async def advance(self, duration_s: float) -> None:
        self._now_s += duration_s

    async def records(self) -> dict[str, StoredRecord]:
        return dict(self._store.requests)

    async def notes(self) -> list[int]:
        return list(self._store.notes.values())

    async def jobs(self) -> list[int]:
        return list(self._store.jobs)

    async def held(self, gateway: int) -> int:
        return len(self._spools[gateway].events)

    async def settled_by_logging(self) -> int:
        return self._store.settled

    async def fenced(self) -> set[int]:
        return self._ever_fenced
