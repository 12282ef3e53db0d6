"""What a producer of audit events measures of itself; all its instruments in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from services.mesh.spool import Spool

_meter = metrics.get_meter("llmos.audit")
_published = _meter.create_counter(
    "llmos.audit.events.published", unit="{event}", description="Audit events that Kafka took"
)
_republished = _meter.create_counter(
    "llmos.audit.events.republished", unit="{event}", description="Those of them that were sent before"
)
_trimmed = _meter.create_counter(
    "llmos.audit.events.trimmed", unit="{event}", description="Audit events that logging confirmed"
)
_fenced = _meter.create_counter(
    "llmos.audit.fenced", unit="{fence}", description="Epochs that logging closed while this process lived"
)
_failures = _meter.create_counter(
    "llmos.audit.failures", unit="{attempt}", description="Failed attempts of the relay, by what it tried"
)


class AuditMetrics:
    """The instruments of one spool and its relay."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._open = False

    def observe(self) -> None:
        """Begins to show the spool's state."""
        self._open = True
        gauges: list[tuple[str, str, str, Callable[[], float]]] = [
            ("depth", "{event}", "Events held, or room promised", lambda: self._spool.ledger.events),
            ("size", "By", "Bytes held or promised", lambda: self._spool.ledger.bytes),
            ("limit", "By", "Bytes that fit", lambda: self._spool.ledger.max_bytes),
            ("oldest_age", "s", "Age of the oldest event held", lambda: self._spool.oldest_age_s),
            ("open_requests", "{request}", "Intents without outcome", lambda: len(self._spool.ledger.open)),
            ("turned_away", "{event}", "Events dropped or refused", lambda: self._spool.turned_away),
        ]
        for name, unit, description, read in gauges:
            _meter.create_observable_gauge(
                f"llmos.audit.spool.{name}",
                callbacks=[self._callback(read)],
                unit=unit,
                description=description,
            )

    def close(self) -> None:
        """A spool that was stopped shows nothing more."""
        self._open = False

    def published(self, events: int, *, again: bool) -> None:
        _published.add(events)
        if again:
            _republished.add(events)

    def trimmed(self, events: int) -> None:
        if events:
            _trimmed.add(events)

    def fenced(self) -> None:
        _fenced.add(1)

    def failed(self, what: str) -> None:
        _failures.add(1, {"llmos.audit.attempt": what})

    def _callback(self, read: Callable[[], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(read())] if self._open else []

        return observe
