"""The audit spool: where events wait, on this machine's disk, until logging has them.

`append_started` and `append_ended` return when the event is committed. The spool is bounded, in bytes and
in events. An intent that is admitted takes the room of its outcome with it, so an outcome is never turned
away for want of room. What is turned away depends on the mode: `strict` refuses (AuditUnavailable, so the
request is not served), `permissive` goes on; both count, and record the count as an event once there is
room. A disk that fails is like a spool that is full; outcomes of admitted intents are kept in memory and
tried again, and a disk that hangs holds no caller longer than `append_timeout_s`.

A request has one intent at most and one outcome: more are refused with StateConflict. An outcome without an
intent is right for a request that was refused before it began. Jobs go the same way (`append_job`), in three
quarters of the room; where they cannot be written they are refused in either mode, and the submitter is told.

`spool_file` has the files, `spool_writer` the ways to them, `spool_ledger` the limits, `spool_gap` the count
of what was turned away, `spool_anonymous` those of refusals; `relay` takes what is here to Kafka.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from services.mesh import job_codec
from services.mesh.audit_protocol import Place, ProducerReport
from services.mesh.broker import Topic
from services.mesh.clock import Clock
from services.mesh.errors import Internal, MessageTooLarge, StateConflict
from services.mesh.event_codec import EventEncoder
from services.mesh.events import OtherEvent, RequestEnded, RequestStarted
from services.mesh.jobs import JobRequested, RetryRequested
from services.mesh.spool_anonymous import AnonymousCounts
from services.mesh.spool_file import Opened, SpooledEvent, SpoolFile
from services.mesh.spool_frames import Append, Gap
from services.mesh.spool_gap import GapCounter
from services.mesh.spool_ledger import OpenIntent, SpoolLedger
from services.mesh.spool_waiting import Mode, Waiting, failed, refuse
from services.mesh.spool_writer import SPACING_S, SpoolWriter
from services.mesh.telemetry import traceparent

logger = logging.getLogger(__name__)

OUTCOME_EXTRA_BYTES = 512
"""An outcome repeats its intent's facts and adds no more than this."""
MAX_EVENT_BYTES = 64 * 1024
JOBS_SHARE = 0.75
"""Of the spool's room; beyond it is for audit events alone."""
JOB_TIMEOUT_S = 5.0
"""A submitter rather waits for a disk that hangs than is told wrongly that the job is not taken."""
HOUSEKEEPING_S = 1.0
STOP_TIMEOUT_S = 5.0


class Spool:
    """See the module. A component: `start` opens the file and begins an epoch."""

    def __init__(
        self,
        file: SpoolFile,
        ledger: SpoolLedger,
        *,
        source: str,
        mode: Mode,
        clock: Clock,
        append_timeout_s: float,
        anonymous_interval_s: float,
        max_anonymous: int,
    ) -> None:
        self._file = file
        self._writer = SpoolWriter(file)
        self.ledger = ledger
        self._source = source
        self._mode = mode
        self._clock = clock
        self._waiting = Waiting(refuses=mode is Mode.STRICT, timeout_s=append_timeout_s)
        self._waiting_jobs = Waiting(refuses=True, timeout_s=max(append_timeout_s, JOB_TIMEOUT_S), what="job")
        self._anonymous = AnonymousCounts(max_anonymous, anonymous_interval_s, clock.now())
        self._encoder = EventEncoder(source, "")
        self._retained: list[Append] = []
        self._written: asyncio.Future[None]
        """For whoever need not wait."""
        self._gap = GapCounter(
            refuses=mode is Mode.STRICT,
            clock=clock,
            remember=lambda gap: self._writer.call(lambda: file.remember_gap(gap)),
            append=lambda event: self._append_other(event, gap=Gap()),
        )
        self._housekeeping: asyncio.Task[None] | None = None
        self._running = False
        self.appended = asyncio.Event()
        """Set when something was committed; the relay clears it."""
        self.hurried = asyncio.Event()
        """As `appended`, when somebody waits for it to arrive: for a job."""
        self.producer = ""
        self.oldest_age_s = 0.0

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        source: str,
        instance: str,
        mode: Mode | str,
        max_bytes: int,
        clock: Clock,
        max_events: int = 200_000,
        append_timeout_s: float | None = None,
        anonymous_interval_s: float = 60.0,
        max_anonymous: int = 256,
    ) -> Spool:
        """A spool in the folder `path`, which is touched by `start` only.

        `source` is the service, `instance` the replica that the producer's name begins with. `max_bytes`
        bounds what is held, about as the files' size. `append_timeout_s` bounds how long a caller waits for
        a hanging disk: by default 5 s in `strict` mode and 0.25 s otherwise.
        """
        mode = Mode(mode)
        if append_timeout_s is None:
            append_timeout_s = 5.0 if mode is Mode.STRICT else 0.25
        return cls(
            SpoolFile(path, source=source, instance=instance, durable=mode is Mode.STRICT),
            SpoolLedger(max_bytes=max_bytes, max_events=max_events),
            source=source,
            mode=mode,
            clock=clock,
            append_timeout_s=append_timeout_s,
            anonymous_interval_s=anonymous_interval_s,
            max_anonymous=max_anonymous,
        )

    async def start(self) -> None:
        """Raises OSError with a sentence where the file cannot be used."""
        self._writer.start()
        now = self._clock.now()
        opened: Opened = await self._writer.call(lambda: self._file.open(now))
        self.producer = opened.producer
        self._encoder = EventEncoder(self._source, opened.producer)
        self.ledger.found(opened.epoch, opened.holding)
        self._gap.load(opened.gap)
        self._anonymous.begin(now)
        self._running = True
        self._written = asyncio.get_running_loop().create_future()
        self._written.set_result(None)
        self.appended.set()
        self._housekeeping = asyncio.create_task(self._keep_house())
        if opened.closed:
            logger.warning("closed %d requests of a former process as aborted", opened.closed)
        logger.info(
            "audit spool %s, epoch %d, holds %d events", self.producer, opened.epoch, opened.holding.events
        )

    async def stop(self) -> None:
        """Writes the counts that are left and closes the file, in bounded time."""
        if self._housekeeping is not None:
            self._housekeeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._housekeeping
            self._tidy(anonymous=True)
            await self._gap.stop()
        self._running = False
        if not await self._writer.stop(STOP_TIMEOUT_S):
            logger.error("the audit spool's disk hangs; what was not committed is lost")

    def append_started(self, event: RequestStarted, *, urgent: bool = True) -> asyncio.Future[None]:
        """Hands an intent over; the future has its result when it is on disk. One that is not urgent waits a
        moment for others, or until it is hurried.

        The future raises AuditUnavailable in strict mode where it cannot be written, StateConflict where the
        request has one already.
        """
        request_id = event.facts.request_id
        ledger = self.ledger
        if request_id in ledger.open:
            return failed(StateConflict(f"the request {request_id} has begun before"))
        now = self._clock.now()
        body, facts = self._encoder.started(event, now)
        if len(body) > MAX_EVENT_BYTES:
            return failed(Internal(f"an intent of {len(body)} bytes"))
        promised = len(body) + OUTCOME_EXTRA_BYTES
        if not self._running or not ledger.admit(len(body), promised):
            self._gap.count()
            return self._waiting.turned_away()
        append = Append(body, now.timestamp(), traceparent(), request_id)
        opened = ledger.open[request_id] = OpenIntent(promised, facts, self._writer.put(append))
        if opened.place is not None:
            self._committed(append, opened.place)
            return self._written
        waiting = self._waiting.begin(otherwise=self._mode is Mode.PERMISSIVE)

        def done(place: Place | None, error: Exception | None) -> None:
            if place is not None:
                opened.place = place
                self._committed(append, place)
            else:
                self._gap.count()
                ledger.withdraw(len(body))
                if opened.promised:
                    ledger.withdraw(opened.promised)
                if ledger.open.get(request_id) is opened:
                    del ledger.open[request_id]
            self._waiting.settle(waiting, written=place is not None)

        opened.group = self._writer.append(append, done, spacing_s=0.0 if urgent else SPACING_S)
        return waiting

    def hurry(self, request_id: str) -> None:
        """Somebody waits for a request's intent."""
        opened = self.ledger.open.get(request_id)
        if opened is not None and opened.place is None:
            self._writer.hurry(opened.group)

    def append_ended(self, event: RequestEnded) -> asyncio.Future[None]:
        """Hands an outcome over.

        Of a request with an intent it is never turned away: where the disk fails it is kept and tried
        again. Otherwise as `append_started`. The future raises StateConflict for a second outcome.
        """
        request_id = event.facts.request_id
        ledger = self.ledger
        opened = ledger.open.get(request_id)
        if opened is not None and opened.ending:
            return failed(StateConflict(f"the request {request_id} has an outcome"))
        now = self._clock.now()
        body = self._encoder.ended(event, now, b"" if opened is None else opened.facts)
        if opened is not None:
            opened.ending = True
            ledger.resize(opened.promised, len(body))
            opened.promised = 0
        elif not self._running or not ledger.admit(len(body)):
            self._gap.count()
            return self._waiting.turned_away()
        append = Append(body, now.timestamp(), traceparent(), "", request_id)
        place = self._writer.put(append)
        if place is not None:
            self._outcome_written(append, place)
            return self._written
        waiting = self._waiting.begin(otherwise=opened is not None or self._mode is Mode.PERMISSIVE)

        def done(place: Place | None, error: Exception | None) -> None:
            retained = error is not None and opened is not None and ledger.open.get(request_id) is opened
            if retained:
                self._retained.append(append)
            else:
                self._outcome_written(append, place)
                if error is not None:
                    self._gap.count()
            if place is None and error is None:
                refuse(waiting, StateConflict(f"the request {request_id} has an outcome"))
            else:
                self._waiting.settle(waiting, written=place is not None or retained)

        # The caller has its answer, and waits for nothing: it goes with what comes in the next moment.
        self._writer.append(append, done, spacing_s=SPACING_S)
        return waiting

    async def append_other(self, event: OtherEvent) -> None:
        """Writes an event that belongs to no request. Raises AuditUnavailable in strict mode."""
        written = self._append_other(event)
        if written is None:
            self._gap.count()
            await self._waiting.turned_away()
            return
        waiting = self._waiting.begin(otherwise=self._mode is Mode.PERMISSIVE)
        written.add_done_callback(lambda future: self._waiting.settle(waiting, written=future.result()))
        await waiting

    def append_job(self, event: JobRequested | RetryRequested) -> asyncio.Future[None]:
        """Hands a job over; the future has its result when it is on disk, not merely with the system.

        The future raises AuditUnavailable where it cannot be written, in either mode, and MessageTooLarge.
        Where the disk hangs, it may be written all the same.
        """
        now = self._clock.now()
        body = job_codec.encode(event, source=self._source, producer=self.producer, time=now)
        size = len(body)
        if size > job_codec.MAX_EVENT_BYTES:
            limit = job_codec.MAX_EVENT_BYTES
            return failed(MessageTooLarge(f"A job has {limit:,} bytes at most; this one has {size:,}."))
        if not self._running or not self.ledger.admit(size, share=JOBS_SHARE):
            return self._waiting_jobs.turned_away()
        waiting = self._waiting_jobs.begin(otherwise=False)

        topic = Topic.JOBS if isinstance(event, JobRequested) else Topic.RETRY
        append = Append(body, now.timestamp(), traceparent(), topic=topic)

        def done(place: Place | None, error: Exception | None) -> None:
            if place is not None:
                self._committed(append, place)
                self.hurried.set()
            else:
                self.ledger.withdraw(size)
            self._waiting_jobs.settle(waiting, written=place is not None)

        self._writer.append(append, done)
        return waiting

    def count_anonymous(self, source_address: str, reason: str) -> None:
        """Counts a refusal of someone unknown. Written once in an interval, for each source and reason."""
        self._anonymous.add(source_address, reason)

    async def read_after(self, mark: Place, max_events: int, max_bytes: int) -> list[SpooledEvent]:
        """The next events in order. Raises OSError where the disk fails."""
        events: list[SpooledEvent] | None = self.ledger.recent.after(mark, max_events, max_bytes)
        if events is None:
            events = await self._writer.call(lambda: self._file.read_after(mark, max_events, max_bytes))
        return events

    async def trim(self, limits: Mapping[int, int]) -> int:
        """Forgets each epoch's events up to a sequence; returns how many. Raises as `read_after`."""
        if not limits:
            return 0
        events, _ = await self._writer.call(
            lambda: self._file.trim(limits), then=lambda trimmed: self.ledger.trimmed(limits, *trimmed)
        )
        self._gap.record()
        return int(events)

    async def begin_epoch(self, epoch: int) -> None:
        """Goes on under another epoch, since logging fenced this one. Running requests stay open."""
        await self._writer.call(
            lambda: self._file.begin_epoch(epoch), then=lambda _: self.ledger.begun(epoch)
        )

    def report(self) -> ProducerReport:
        """What logging is told of this spool."""
        return self.ledger.report(self.producer)

    @property
    def turned_away(self) -> int:
        """Events dropped or refused in this life."""
        return self._gap.total

    def _committed(self, append: Append, place: Place) -> None:
        self.ledger.committed(append, place)
        self.appended.set()

    def _outcome_written(self, append: Append, place: Place | None) -> None:
        """`place` is None where it was the second one, or is given up."""
        if place is not None:
            self._committed(append, place)
        else:
            self.ledger.withdraw(len(append.body))
        self.ledger.open.pop(append.outcome_of, None)

    def _append_other(self, event: OtherEvent, gap: Gap | None = None) -> asyncio.Future[bool] | None:
        """Whether it was written, once that is known; None where there is no room. `gap` is what is left to
        be recorded with it."""
        now = self._clock.now()
        body = self._encoder.other(event, now)
        if not self._running or not self.ledger.admit(len(body)):
            return None
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        append = Append(body, now.timestamp(), traceparent(), gap=gap)

        def done(place: Place | None, error: Exception | None) -> None:
            if place is not None:
                self._committed(append, place)
            else:
                self.ledger.withdraw(len(body))
                if gap is None:
                    self._gap.count()
            if not written.done():
                written.set_result(place is not None)

        self._writer.append(append, done)
        return written

    async def _keep_house(self) -> None:
        while True:
            await self._clock.sleep(HOUSEKEEPING_S)
            self._tidy(anonymous=self._anonymous.is_due(self._clock.now()))
            self._gap.remember()
            self.oldest_age_s = await self._oldest_age_s()

    async def _oldest_age_s(self) -> float:
        if self.ledger.oldest_held is None:
            return 0.0
        try:
            oldest_s = await self._writer.call(self._file.oldest_time_s)
        except OSError:
            return self.oldest_age_s + HOUSEKEEPING_S
        return 0.0 if oldest_s is None else max(0.0, self._clock.now().timestamp() - float(oldest_s))

    def _tidy(self, *, anonymous: bool) -> None:
        retained, self._retained = self._retained, []
        for append in retained:
            self._writer.append(append, partial(self._retried, append))
        self._gap.record()
        if anonymous:
            self._anonymous.flush(self._clock.now(), lambda event: self._append_other(event) is not None)

    def _retried(self, append: Append, place: Place | None, error: Exception | None) -> None:
        if error is not None:
            self._retained.append(append)
        else:
            self._outcome_written(append, place)
