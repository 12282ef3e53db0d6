"""A store in memory: the reference that tests hold SQLite against. It forgets everything when stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from services.logging.store import (
    Applied,
    Batch,
    Cursor,
    RecordFilter,
    RequestRecord,
)
from services.mesh import event_codec
from services.mesh.audit_protocol import (
    Place,
    ProducerAnswer,
    ProducerReport,
    SequenceTracker,
    may_settle,
)
from services.mesh.event_codec import IntentRead, OtherRead, OutcomeRead, PlaceRead
from services.mesh.events import Outcome


@dataclass
class _Request:
    record: RequestRecord
    tenant_id: str
    client_id: str
    outcome: int = 0
    producer: str = ""
    place: Place | None = None


@dataclass
class MemoryStore:
    """An `AuditStore`."""

    _requests: dict[str, _Request] = field(default_factory=dict)
    _others: dict[tuple[str, Place], OtherRead] = field(default_factory=dict)
    _trackers: dict[tuple[str, int], SequenceTracker] = field(default_factory=dict)
    _epochs: dict[str, int] = field(default_factory=dict)
    _fenced: dict[str, int] = field(default_factory=dict)
    _offsets: dict[str, dict[int, int]] = field(default_factory=dict)
    _position: int = 0

    async def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Nothing to do."""

    async def apply(self, batch: Batch, now_us: int) -> Applied:
        late = 0
        for event in batch.events:
            self._track(event.producer, event.place, event.floor)
            if isinstance(event.record, PlaceRead):
                continue
            if isinstance(event.record, OtherRead):
                self._others.setdefault((event.producer, event.place), event.record)
            elif isinstance(event.record, IntentRead):
                self._intent(event.producer, event.place, event.record, now_us)
            else:
                late += self._outcome(event.record, now_us)
        self._offsets.setdefault(batch.topic, {}).update(batch.offsets)
        return Applied(self._position, late)

    async def offsets(self, topic: str) -> dict[int, int]:
        return dict(self._offsets.get(topic, {}))

    async def sync(self, report: ProducerReport, now_us: int) -> tuple[ProducerAnswer, int]:
        producer = report.producer
        for held in report.held:
            tracker = self._trackers.setdefault((producer, held.epoch), SequenceTracker())
            tracker.raise_floor(held.floor)
        asked = {report.epoch, *(held.epoch for held in report.held)}
        for key in [k for k in self._trackers if k[0] == producer and k[1] < min(asked)]:
            del self._trackers[key]
        watermarks = {
            epoch: found.watermark
            for epoch in sorted(asked)
            if (found := self._trackers.get((producer, epoch))) is not None
        }
        closed = 0
        settled = may_settle(report, watermarks)
        if settled is not None:
            for request in self._open_of(producer):
                if request.place is not None and request.place < settled:
                    self._close(request, now_us)
                    closed += 1
        known = max(self._epochs.get(producer, 0), report.epoch)
        self._epochs[producer] = known
        fenced_epoch = self._fenced.get(producer, 0)
        fenced = report.epoch <= fenced_epoch or report.epoch < known
        return ProducerAnswer(watermarks, fenced, max(known, fenced_epoch) + 1 if fenced else 0), closed

    async def producers_with_open_requests(self) -> list[str]:
        return sorted({r.producer for r in self._requests.values() if r.producer and not r.outcome})

    async def fence(self, producer: str, now_us: int) -> int:
        self._fenced[producer] = self._epochs.get(producer, 0)
        requests = self._open_of(producer)
        for request in requests:
            self._close(request, now_us)
        return len(requests)

    async def search(self, which: RecordFilter, limit: int, after: Cursor | None) -> list[RequestRecord]:
        def key(record: RequestRecord) -> Cursor:
            return Cursor(record.receive_time_us, record.request_id)

        found = sorted(self._matching(which), key=key, reverse=True)
        return [record for record in found if after is None or key(record) < after][:limit]

    async def newest(self, which: RecordFilter, limit: int) -> tuple[list[RequestRecord], int]:
        found = sorted(self._matching(which), key=lambda record: record.position)
        return found[len(found) - min(limit, len(found)) :], self._position

    async def changed(
        self, which: RecordFilter, after_position: int, limit: int
    ) -> tuple[list[RequestRecord], int]:
        found = sorted(self._matching(which), key=lambda record: record.position)
        page = [record for record in found if record.position > after_position][:limit]
        return page, page[-1].position if len(page) == limit else max(self._position, after_position)

    async def other_events(self, limit: int) -> list[tuple[str, Place, str, bytes]]:
        found = [(p, place, other.kind, other.body) for (p, place), other in self._others.items()]
        return found[::-1][:limit]

    def _track(self, producer: str, place: Place, floor: int) -> None:
        tracker = self._trackers.setdefault((producer, place.epoch), SequenceTracker())
        tracker.raise_floor(floor)
        tracker.add(place.sequence)
        self._epochs[producer] = max(place.epoch, self._epochs.get(producer, 0))

    def _request(self, event: IntentRead | OutcomeRead) -> _Request:
        if event.request_id not in self._requests:
            record = RequestRecord(event.request_id, event.receive_time_us, None, None, False, 0, 0)
            self._requests[event.request_id] = _Request(record, event.tenant_id, event.client_id)
        return self._requests[event.request_id]

    def _intent(self, producer: str, place: Place, intent: IntentRead, now_us: int) -> None:
        request = self._request(intent)
        if request.record.started is None:
            request.producer, request.place = producer, place
            self._change(request, now_us, started=intent.body)

    def _outcome(self, outcome: OutcomeRead, now_us: int) -> bool:
        """Whether it was another one than the request has."""
        request = self._request(outcome)
        if request.outcome:
            return request.record.ended != outcome.body
        request.outcome = outcome.outcome
        self._change(request, now_us, ended=outcome.body)
        return False

    def _close(self, request: _Request, now_us: int) -> None:
        request.outcome = Outcome.ABORTED
        started = request.record.started
        ended = event_codec.abort(started or b"", now_us)
        self._change(request, now_us, ended=ended, closed_by_logging=True)

    def _change(self, request: _Request, now_us: int, **fields: bytes | bool) -> None:
        self._position += 1
        request.record = replace(
            request.record,
            position=self._position,
            store_time_us=now_us,
            **fields,  # type: ignore[arg-type]
        )

    def _open_of(self, producer: str) -> list[_Request]:
        return [r for r in self._requests.values() if r.producer == producer and not r.outcome]

    def _matching(self, which: RecordFilter) -> list[RequestRecord]:
        tests: list[tuple[object, Callable[[_Request], bool]]] = [
            (which.request_id, lambda r: r.record.request_id == which.request_id),
            (which.tenant_id, lambda r: r.tenant_id == which.tenant_id),
            (which.client_id, lambda r: r.client_id == which.client_id),
            (which.outcome, lambda r: r.outcome == which.outcome),
            (which.open_only, lambda r: not r.outcome),
        ]
        active = [test for value, test in tests if value]
        from_us, before_us = which.receive_time_from_us, which.receive_time_before_us
        return [
            request.record
            for request in self._requests.values()
            if all(test(request) for test in active)
            and (from_us is None or request.record.receive_time_us >= from_us)
            and (before_us is None or request.record.receive_time_us < before_us)
        ]
