"""The way of a job as a state machine under seeded crashes: two gateways' spools, a broker that loses its
disk, reorders and repeats, logging's intake and schedule, two workers, the outbox.

The schedule is the real one, over a store that is handed in; the rest is a model of what happens around it.
What is durable and what is not are apart, so that a crash is the loss of what is not. A rule that a step
breaks is asserted at once; the whole is judged after everything healed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta

from services.logging.schedule.job import CancelledByTenant, Failed, Postponed, Report, Succeeded, from_us
from services.logging.schedule.store import (
    Beat,
    DeadLetterFilter,
    JobClaim,
    JobFilter,
    OutboxRow,
    ScheduleStore,
)
from services.mesh.errors import AlreadyExists, NotFound
from services.mesh.jobs import JobEvent, JobKind, JobRequested, JobState, RetryRequested, Sealed
from tests.framework.schedule_jobs import NOW, OTHER, TENANT, S, report_one, requested

LEASE_S = 10
GATEWAYS = 2
STEPS = {
    "submit": 6,
    "publish": 6,
    "land": 2,
    "wipe": 1,
    "consume": 8,
    "trim": 4,
    "claim": 8,
    "beat": 3,
    "report": 8,
    "late": 3,
    "crash worker": 1,
    "stall worker": 1,
    "crash logging": 2,
    "time": 6,
    "sweep": 5,
    "cancel": 1,
    "replay": 1,
    "tell": 3,
}
"""What may happen, and how often in proportion."""
EVERYTHING = JobFilter(kinds=frozenset(JobKind))
Reopen = Callable[[ScheduleStore], Awaitable[ScheduleStore]]


@dataclass
class Logging:
    """What of logging is durable beside the schedule, and what it knows of the topic."""

    offset: int = 0
    stored: set[str] = field(default_factory=set)
    """Places of events that spools may forget."""


@dataclass
class JobWorld:
    """One run. `reopen` gives the store after a crash of logging."""

    seed: int
    store: ScheduleStore
    reopen: Reopen
    rng: random.Random = field(init=False)
    now_us: int = NOW
    spools: list[dict[str, JobEvent]] = field(default_factory=lambda: [{} for _ in range(GATEWAYS)])
    topic: list[tuple[str, JobEvent]] = field(default_factory=list)
    delayed: list[tuple[str, JobEvent]] = field(default_factory=list)
    logging: Logging = field(default_factory=Logging)
    workers: list[list[JobClaim]] = field(default_factory=lambda: [[], []])
    late: list[JobClaim] = field(default_factory=list)
    """What a worker that stood still, or whose answer was lost, will still report."""
    events: dict[str, JobEvent] = field(default_factory=dict)
    """The truth: what was submitted."""
    claims: Counter[str] = field(default_factory=Counter)
    postponed: Counter[str] = field(default_factory=Counter)
    fences: dict[str, int] = field(default_factory=dict)
    not_before_us: dict[str, int] = field(default_factory=dict)
    results: dict[str, Sealed] = field(default_factory=dict)
    ended: dict[str, JobState] = field(default_factory=dict)
    asked_to_cancel: set[str] = field(default_factory=set)
    replayed: set[str] = field(default_factory=set)
    told: Counter[str] = field(default_factory=Counter)
    """Events that the outbox published, by id."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    async def run(self, steps: int) -> None:
        """Raises AssertionError, which names the seed."""
        try:
            for _ in range(steps):
                await self._step()
                await self._look()
            await self._heal()
            await self._judge()
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed}: {error}") from error

    async def _step(self) -> None:
        roll = self.rng.random
        match self.rng.choices(list(STEPS), list(STEPS.values()))[0]:
            case "submit":
                self._submit()
            case "publish":
                self._publish()
            case "land":
                self.topic += self.delayed
                self.delayed.clear()
            case "wipe":
                self.topic.clear()
            case "consume":
                await self._consume(crash=roll() < 0.2)
            case "trim":
                self._trim()
            case "claim":
                await self._claim(self.rng.randrange(2), answered=roll() < 0.95)
            case "beat":
                await self._beat()
            case "report":
                await self._report()
            case "late":
                await self._report_late()
            case "crash worker":
                self.workers[self.rng.randrange(2)].clear()
            case "stall worker":
                claims = self.workers[self.rng.randrange(2)]
                self.late += claims
                claims.clear()
            case "crash logging":
                self.store = await self.reopen(self.store)
            case "time":
                self.now_us += self.rng.choice([S // 2, 2 * S, 6 * S, (LEASE_S + 1) * S])
            case "sweep":
                await self.store.sweep(self.now_us, 3)
            case "cancel":
                await self._cancel()
            case "replay":
                await self._replay()
            case "tell":
                await self._tell(crash=roll() < 0.3)

    def _submit(self) -> None:
        job_id = f"job-{len(self.events)}"
        not_before_us = self.now_us + self.rng.choice([0, 0, 0, 5 * S])
        job = requested(
            job_id,
            identity=self.rng.choice([TENANT, OTHER]),
            create_time=from_us(self.now_us),
            not_before=from_us(not_before_us),
            max_attempts=self.rng.randint(1, 3),
            give_up_time=from_us(not_before_us + self.rng.choice([15, 600]) * S),
            result_ttl_s=86_400.0,
            has_webhook=self.rng.random() < 0.2,
        )
        event: JobEvent = job
        if self.rng.random() < 0.2:
            event = RetryRequested(job, "req", "REPLICA_LOST", 1)
            self.claims[job_id] = 1
        self.events[job_id] = event
        self.not_before_us[job_id] = not_before_us
        self.spools[self.rng.randrange(GATEWAYS)][job_id] = event

    def _publish(self) -> None:
        held = list(self.spools[self.rng.randrange(GATEWAYS)].items())
        batch = held[: self.rng.randint(1, 4)] if self.rng.random() < 0.7 else held[-2:]
        (self.delayed if self.rng.random() < 0.2 else self.topic).extend(batch)
        if self.topic and self.rng.random() < 0.2:
            self.topic.append(self.rng.choice(self.topic))

    async def _consume(self, *, crash: bool) -> None:
        at = self.logging
        if at.offset > len(self.topic):  # the broker lost its disk
            at.offset = 0
        batch = self.topic[at.offset : at.offset + self.rng.randint(1, 5)]
        await self.store.accept([event for _, event in batch], self.now_us)
        if crash:  # between the schedule and the offsets
            self.store = await self.reopen(self.store)
            return
        at.offset += len(batch)
        at.stored |= {place for place, _ in batch}

    def _trim(self) -> None:
        for spool in self.spools:
            for job_id in [each for each in spool if each in self.logging.stored]:
                del spool[job_id]

    async def _claim(self, worker: int, *, answered: bool) -> None:
        lease_us = self.now_us + LEASE_S * S
        found = await self.store.claim(f"w{worker}", self.rng.randint(1, 3), lease_us, self.now_us)
        for claim in found.claims:
            job = claim.job
            assert job.job_id not in self.ended, f"{job.job_id} has ended and runs again"
            assert job.fence > self.fences.get(job.job_id, 0), f"{job.job_id}: the fence did not grow"
            assert self.now_us >= self.not_before_us.get(job.job_id, 0), f"{job.job_id} runs early"
            assert job.attempts <= job.request.max_attempts, f"{job.job_id} is tried too often"
            self.fences[job.job_id] = job.fence
            self.claims[job.job_id] += 1
            if answered:
                self.workers[worker].append(claim)

    async def _beat(self) -> None:
        for worker, claims in enumerate(self.workers):
            beats = [Beat(claim.job.job_id, claim.job.fence) for claim in claims]
            standings = await self.store.heartbeat(beats, self.now_us + LEASE_S * S, self.now_us)
            held = [claim for claim, standing in zip(claims, standings, strict=True) if standing.held]
            for claim in held:
                assert self.fences[claim.job.job_id] == claim.job.fence, "an older claim is held"
            self.workers[worker] = held

    async def _report(self) -> None:
        claims = self.rng.choice(self.workers)
        if claims:
            claim = claims.pop(self.rng.randrange(len(claims)))
            await self._say(claim, self._outcome(claim))

    def _outcome(self, claim: JobClaim) -> Report:
        reports: list[Report] = [
            Succeeded(Sealed("k", f"{claim.job.job_id}/{claim.job.fence}".encode())),
            Failed("REPLICA_LOST", 14, "lost", True, self.rng.choice([0.0, 7.0])),
            Failed("REQUEST_INVALID", 3, "no", False),
            Postponed(self.rng.choice([0.0, 3.0]), self.rng.choice([0.0, 4.0])),
        ]
        if claim.job.job_id in self.asked_to_cancel:
            reports.append(CancelledByTenant())
        return self.rng.choice(reports)

    async def _say(self, claim: JobClaim, report: Report) -> None:
        job_id, fence = claim.job.job_id, claim.job.fence
        before = await self.store.get(job_id)
        taken = await report_one(self.store, job_id, fence, f"r{fence}", report, self.now_us)
        repeated = before is not None and before[0].reported_fence == fence
        if taken.taken and not repeated:
            assert fence == self.fences[job_id], f"{job_id}: a late report was taken"
            assert before is not None
            assert before[0].state is JobState.RUNNING, f"{job_id}: reported though it does not run"
            if isinstance(report, Succeeded):
                self.results[job_id] = report.result
            elif isinstance(report, Postponed):
                self.postponed[job_id] += 1
                self.not_before_us[job_id] = self.now_us + int(report.retry_after_s * S)
            elif isinstance(report, Failed):
                self.not_before_us[job_id] = self.now_us + int(max(0.5, report.retry_after_s) * S)
        if self.rng.random() < 0.1:  # the answer was lost
            self.late.append(claim)

    async def _report_late(self) -> None:
        if self.late:
            claim = self.late.pop(self.rng.randrange(len(self.late)))
            await self._say(claim, self._outcome(claim))

    async def _cancel(self) -> None:
        if self.events:
            job_id = self.rng.choice(list(self.events))
            try:
                await self.store.cancel(job_id, "", self.now_us)
                self.asked_to_cancel.add(job_id)
            except NotFound:
                pass

    async def _replay(self) -> None:
        letters = (await self.store.dead_letters(DeadLetterFilter(), 5, None)).items
        letters = [letter for letter in letters if letter.job and letter.dead_letter_id in self.events]
        if not letters:
            return
        letter = self.rng.choice(letters)
        assert letter.job is not None
        new = replace(
            letter.job.request,
            job_id=f"job-{len(self.events)}",
            not_before=from_us(self.now_us),
            give_up_time=from_us(self.now_us) + timedelta(seconds=600),
        )
        for _ in range(self.rng.choice([1, 2])):  # the answer may have been lost
            try:
                await self.store.replay(letter.dead_letter_id, "", new, self.now_us)
            except (NotFound, AlreadyExists):
                assert letter.dead_letter_id in self.replayed
                continue
            assert letter.dead_letter_id not in self.replayed, "replayed twice"
            self.replayed.add(letter.dead_letter_id)
            self.events[new.job_id] = new

    async def _tell(self, *, crash: bool) -> None:
        rows: list[OutboxRow] = await self.store.outbox(5)
        for row in rows:
            self.told[row.event_id] += 1
            if isinstance(row.event, RetryRequested):  # comes back to logging, as its own topic
                self.topic.append((row.event_id, row.event))
        if not crash:
            await self.store.published([row.number for row in rows])

    async def _look(self) -> None:
        """What must hold at any moment."""
        jobs = {job.job_id: job for job, _ in (await self.store.list_jobs(EVERYTHING, 1000, None)).items}
        for job_id, job in jobs.items():
            counted = self.claims[job_id] - self.postponed[job_id]
            assert job.attempts == counted, f"{job_id}: {job.attempts} attempts, not {counted}"
            assert job_id not in self.replayed, f"{job_id} is back though it was replayed"
            if job_id in self.ended:
                assert job.state is self.ended[job_id], f"{job_id} ended twice"
            elif job.state.is_final:
                self.ended[job_id] = job.state
        for job_id in self.ended:
            assert job_id in jobs or job_id in self.replayed, f"{job_id} is gone"
        totals = await self.store.totals()
        states = [job.state for job in jobs.values()]
        assert totals.waiting == states.count(JobState.WAITING), "the count of waiting jobs is wrong"
        assert totals.running == states.count(JobState.RUNNING), "the count of running jobs is wrong"
        assert totals.dead_letters == states.count(JobState.FAILED), "the count of dead letters is wrong"

    async def _heal(self) -> None:
        """Nothing fails any more, and everything goes on until it has ended."""
        for _ in range(400):
            self.topic += [event for spool in self.spools for event in spool.items()]
            while self.logging.offset != len(self.topic):
                await self._consume(crash=False)
            self._trim()
            await self._claim(0, answered=True)
            for claims in self.workers:
                while claims:
                    await self._say(claims.pop(), Succeeded(Sealed("k", b"healthy")))
            self.late.clear()
            await self._tell(crash=False)
            await self.store.sweep(self.now_us, 10)
            await self._look()
            totals = await self.store.totals()
            if not (totals.waiting or totals.running or totals.outbox or any(self.spools)):
                return
            self.now_us += 3 * S
        raise AssertionError("it does not come to rest")

    async def _judge(self) -> None:
        for job_id in self.events:
            if job_id in self.replayed:
                continue
            found = await self.store.get(job_id)
            assert found is not None, f"{job_id} was lost"
            job, _, result = found
            assert job.state.is_final, f"{job_id} has not ended"
            assert (result is not None) == (job.state is JobState.SUCCEEDED), (
                f"{job_id}: a result too many or few"
            )
            assert result == self.results.get(job_id), f"{job_id} has another's result"
            if job.state is JobState.FAILED:
                letter, sealed = await self.store.dead_letter(job_id, "")
                assert letter.error_reason in REASONS
                assert sealed is not None, f"{job_id} cannot be replayed"
                assert self.told[f"dead/{job_id}"], f"nobody was told of {job_id}"
            elif job.state is JobState.CANCELLED:
                assert job_id in self.asked_to_cancel, f"nobody asked to cancel {job_id}"
        webhooks = [job for job, _ in (await self.store.list_jobs(EVERYTHING, 1000, None)).items]
        told_of = Counter(job.ended.job_id for job in webhooks if job.ended is not None)
        assert all(count == 1 for count in told_of.values())
        for job_id, event in self.events.items():
            requested_job = event if isinstance(event, JobRequested) else event.job
            if requested_job is not None and requested_job.has_webhook:
                assert told_of[job_id] == 1, f"{job_id}'s webhook is not told of its end"


REASONS = {"REPLICA_LOST", "REQUEST_INVALID", "WORKER_LOST", "DEADLINE_EXCEEDED"}
