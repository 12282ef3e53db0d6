"""How much work a gateway claims: what can begin at once, and where jobs are short, what will soon.

A place that comes free while nobody waits for it stands empty until a report and a claim have been to the
schedule and back: for short jobs a good part of what they take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.gateway.admission.permits import Admission
from services.gateway.jobs.working.ports import Attempt
from services.mesh.jobs import JobKind

BESIDE = 64
"""Jobs that need no place at a model (webhooks, batches) may run beside, so many at a time."""
PROBES = 4
"""While no model can be reached, so many jobs are tried at a time: somebody has to notice that it is back,
and webhooks must go out. The rest waits in the schedule, where an outage costs it no attempt."""

AHEAD_S = 2.0
"""As many jobs wait for a place as places come free within that time, but half as many as there are places at
most: of long jobs none, since it would wait for longer than admission lets it."""


@dataclass(frozen=True, slots=True)
class Room:
    """What may be claimed now."""

    jobs: int
    is_probe: bool = False
    """No model can be reached at present."""


class Places:
    """Counts them. `most` is the deployment's limit on requests that run as jobs; 0: none but what models
    leave to batch."""

    def __init__(self, admission: Admission, models: Callable[[], Iterable[str]], *, most: int = 0) -> None:
        self._admission = admission
        self._models = models
        self._most = most

    def room(self, attempts: Iterable[Attempt]) -> Room:
        """`attempts` are those at work."""
        requests = beside = waiting = 0
        for attempt in attempts:
            if attempt.job.kind is JobKind.REQUEST:
                requests += 1
                waiting += attempt.waits
            else:
                beside += 1
        if beside >= BESIDE:
            return Room(0)
        found = self._admission.batch_room(self._models())
        if not found.places:
            return Room(max(PROBES - requests, 0), is_probe=True)
        most, ahead = found.places, min(int(found.ending_per_s * AHEAD_S), found.places // 2)
        if 0 < self._most < found.places:
            # Whoever waited would be let in.
            most, ahead = self._most, 0
        if not found.free and 2 * waiting > ahead:
            # A claim costs about as much for several jobs as for one.
            return Room(0)
        return Room(max(min(most + ahead - requests, found.free + ahead - waiting), 0))
