"""What the schedule measures of itself; all its instruments in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from services.logging.schedule.job import (
    CancelledByTenant,
    Failed,
    Postponed,
    Report,
    Succeeded,
)
from services.logging.schedule.store import JobClaim, ReportTaken, Totals
from services.mesh.errors import BY_REASON

_meter = metrics.get_meter("llmos.jobs")
_accepted = _meter.create_counter("llmos.jobs.accepted", unit="{job}", description="Jobs taken in")
_claimed = _meter.create_counter("llmos.jobs.attempts", unit="{attempt}", description="Attempts begun")
_ended = _meter.create_counter(
    "llmos.jobs.reports", unit="{attempt}", description="Reports of attempts, by how they ended"
)
_late = _meter.create_counter(
    "llmos.jobs.reports.refused", unit="{report}", description="Reports under a fence that was passed"
)
_lost = _meter.create_counter("llmos.jobs.leases.lost", unit="{lease}", description="Leases that ended")
_dead = _meter.create_counter(
    "llmos.jobs.dead_letters", unit="{letter}", description="What was given up, by reason"
)
_replayed = _meter.create_counter(
    "llmos.jobs.dead_letters.replayed", unit="{letter}", description="Dead letters that were replayed"
)
_OUTCOMES: Mapping[type, str] = {
    Succeeded: "succeeded",
    Failed: "failed",
    Postponed: "postponed",
    CancelledByTenant: "cancelled",
}


class ScheduleMeasures:
    """The instruments of one schedule."""

    def __init__(self) -> None:
        self._totals: Totals | None = None
        self._oldest_age_s = 0.0

    def observe(self) -> None:
        """Begins to show how things stand."""
        self._totals = Totals()
        gauges: list[tuple[str, str, str, Callable[[Totals], float]]] = [
            ("waiting", "{job}", "Jobs that wait", lambda t: t.waiting),
            ("running", "{job}", "Jobs that run", lambda t: t.running),
            ("kept", "{job}", "Jobs in the schedule, ended ones too", lambda t: t.kept),
            (
                "oldest_due_age",
                "s",
                "How long ago the job that waits longest fell due",
                lambda t: self._oldest_age_s,
            ),
            ("dead_letters.kept", "{letter}", "Dead letters in the schedule", lambda t: t.dead_letters),
            ("outbox", "{event}", "News that Kafka has not been told", lambda t: t.outbox),
        ]
        for name, unit, description, read in gauges:
            _meter.create_observable_gauge(
                f"llmos.jobs.{name}", callbacks=[self._callback(read)], unit=unit, description=description
            )

    def close(self) -> None:
        """A schedule that was stopped shows nothing more."""
        self._totals = None

    def totals(self, totals: Totals, now_us: int) -> None:
        if self._totals is not None:
            self._totals = totals
            due_us = totals.oldest_due_us
            self._oldest_age_s = 0.0 if due_us is None else max(now_us - due_us, 0) / 1e6

    def accepted(self, jobs: int) -> None:
        if jobs:
            _accepted.add(jobs)

    def claimed(self, claims: Sequence[JobClaim]) -> None:
        _claimed.add(len(claims))

    def reported(self, report: Report, taken: ReportTaken) -> None:
        if taken.taken:
            _ended.add(1, {"llmos.job.outcome": "retried" if taken.retried else _OUTCOMES[type(report)]})
        else:
            _late.add(1)

    def lost(self, leases: int) -> None:
        if leases:
            _lost.add(leases)

    def dead(self, by_reason: Mapping[str, int]) -> None:
        for reason, count in by_reason.items():
            _dead.add(count, {"llmos.error.reason": reason if reason in BY_REASON else "OTHER"})

    def replayed(self) -> None:
        _replayed.add(1)

    def _callback(
        self, read: Callable[[Totals], float]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(read(self._totals))] if self._totals is not None else []

        return observe
