"""The metrics of jobs at work. No label holds text of a caller's, or names a tenant."""

from __future__ import annotations

from opentelemetry import metrics

from services.gateway.jobs.ports import CancelledByTenant, Failed, Postponed, Report
from services.mesh.histograms import HISTOGRAMS, Histograms
from services.mesh.jobs import JobKind

_WAIT_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21_600.0)


class JobInstruments:
    """Counts what the worker does."""

    def __init__(
        self, *, meters: metrics.MeterProvider | None = None, histograms: Histograms = HISTOGRAMS
    ) -> None:
        """Without a provider, that of the process."""
        meter = metrics.get_meter("llmos.gateway", meter_provider=meters)
        self._running = meter.create_up_down_counter(
            "llmos.jobs.running", unit="{job}", description="Jobs that this gateway has at work, by kind."
        )
        self._attempts = meter.create_counter(
            "llmos.jobs.attempts",
            unit="{attempt}",
            description="Attempts that ended, by kind, outcome and the reason why they failed.",
        )
        self._wait = histograms.make(
            "llmos.jobs.wait",
            unit="s",
            description="From when a job was first due to when its first attempt began.",
            bounds=_WAIT_S,
            labels=("llmos.job.kind",),
        )

    def began(self, kind: JobKind, wait_s: float | None) -> None:
        """`wait_s`: of a first attempt."""
        name = kind.name.lower()
        self._running.add(1, {"llmos.job.kind": name})
        if wait_s is not None:
            self._wait.record(max(wait_s, 0.0), (name,))

    def ended(self, kind: JobKind, report: Report | None, *, taken: bool) -> None:
        """`report` None: the attempt was broken off, since its lease was lost. Not `taken`: the report was
        refused or could not be made."""
        name = kind.name.lower()
        self._running.add(-1, {"llmos.job.kind": name})
        labels = {"llmos.job.kind": name, "outcome": _outcome(report) if taken else "lost"}
        if taken and isinstance(report, Failed):
            labels["error.type"] = report.error_reason
        self._attempts.add(1, labels)


def _outcome(report: Report | None) -> str:
    match report:
        case None:
            return "lost"
        case Failed(retryable=retryable):
            return "failed" if retryable else "refused"
        case Postponed():
            return "postponed"
        case CancelledByTenant():
            return "cancelled"
        case _:
            return "succeeded"
