"""The gateway with some of its parts left out, as a process of its own: what does each of them cost?

`BENCH_WITHOUT=auth,audit python -m tests.bench.gateway_pieces`, with the gateway's settings beside it. It is
`services.gateway.app.build` itself, where the names of some classes stand for others that do nothing, so what
is served is always today's composition. A name that is no longer there ends the process. `BENCH_PROFILE=FILE`
writes a profile (cProfile) when the process is told to end.
"""

from __future__ import annotations

import cProfile
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from services.gateway import app, auditing
from services.gateway.auditing import AuditTrail, RequestRecord
from services.gateway.authorisation import Authorisation
from services.gateway.generation import ValidGeneration
from services.gateway.settings import GatewaySettings
from services.gateway.telemetry import Instruments, Measured
from services.mesh.app import run
from services.mesh.context import Caller, Identity
from services.mesh.interceptors import Call, Chain, Rest
from services.mesh.telemetry import NO_SPAN

SCOPES = frozenset({"generate", "models.read"})


class Nobody:
    """A part that does nothing, whatever it is asked."""

    def __init__(self, *args: Any, **settings: Any) -> None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class EveryoneIsIn(Nobody):
    """Instead of the authenticator."""

    _caller = Caller(Identity("bench", "bench", scopes=SCOPES))

    async def __call__(self, method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        return self._caller


class EverythingIsAllowed(Authorisation):
    """Instead of policy."""

    def decide_request(self, *args: Any, **facts: Any) -> None: ...

    def may_see(self, *args: Any, **facts: Any) -> bool:
        return True


class NoTicket(Nobody):
    """What `NoLimits` gives."""

    def correct(self, *args: Any) -> None: ...

    def settle(self, *args: Any) -> None: ...


class NoLimits(Nobody):
    """Instead of the limits of plans."""

    _ticket = NoTicket()

    async def reserve(self, *args: Any, **facts: Any) -> NoTicket:
        return self._ticket


class NoAdmission(Nobody):
    """Instead of permits and the queue."""

    running = 0

    def permit(self, *args: Any, **facts: Any) -> NoPermit:
        return NoPermit()

    def capacity_changed(self) -> None: ...


class NoPermit:
    """What everybody gets."""

    waited_s = 0.0

    def __enter__(self) -> NoPermit:
        return self

    def __exit__(self, *ended: object) -> None: ...

    async def __aenter__(self) -> NoPermit:
        return self

    async def __aexit__(self, *ended: object) -> None: ...

    def first_token(self, *args: Any) -> None: ...


class NotMeasured(Instruments):
    """Instead of spans and metrics."""

    def generation(self, request: ValidGeneration, record: RequestRecord) -> Any:
        return nullcontext(Measured(NO_SPAN))


class NoRecord(RequestRecord):
    """What the use case fills in, and nobody reads."""

    def begin(self, *, urgent: bool = True) -> None: ...

    async def committed(self) -> None: ...


class NoTrail(AuditTrail):
    """Instead of the audit link."""

    async def link(self, call: Call, rest: Rest) -> None:
        record = NoRecord(
            call.context,
            auditing._EDGES[call.protocol],
            receive_time=self._clock.now(),
            received_s=self._clock.monotonic(),
            audit=self._audit,
        )
        auditing._current.set(record)
        await rest(call)


class NoSpool(Nobody):
    """Instead of the spool: nothing is opened."""

    @classmethod
    def open(cls, *args: Any, **settings: Any) -> NoSpool:
        return cls()

    def count_anonymous(self, source_address: str, reason: str) -> None: ...


PARTS: Mapping[str, Mapping[str, type]] = {
    "telemetry": {"Instruments": NotMeasured},
    "auth": {"GatewayAuthenticator": EveryoneIsIn},
    "authorisation": {"Authorisation": EverythingIsAllowed},
    "limits": {"Limits": NoLimits},
    "admission": {"Admission": NoAdmission},
    "audit": {"AuditTrail": NoTrail, "Spool": NoSpool, "Relay": Nobody, "KafkaPublisher": Nobody},
    "cache": {},
}
"""What can be left out, and which names of `services.gateway.app` then mean something else."""
SETTINGS: Mapping[str, Mapping[str, str]] = {"cache": {"LLMOS_GATEWAY_CACHE_MAX_BYTES": "0"}}
"""What is switched off by a setting."""
LINKS: Mapping[str, frozenset[str]] = {
    "telemetry": frozenset({"trace", "metrics"}),
    "auth": frozenset({"slowdown", "revoked"}),
    "authorisation": frozenset({"authorise"}),
}
"""Which links of the chain go with it."""
ALL = tuple(PARTS)


def leave_out(parts: frozenset[str]) -> None:
    """Raises AttributeError where the composition has no such part."""
    for part in parts:
        for name, instead in PARTS[part].items():
            getattr(app, name)  # it must be there
            setattr(app, name, instead)
        os.environ.update(SETTINGS.get(part, {}))
    gone = frozenset[str]().union(*(LINKS.get(part, ()) for part in parts))

    def chain(links: Mapping[str, Any]) -> Chain:
        return Chain({name: link for name, link in links.items() if name not in gone})

    setattr(app, "Chain", chain)  # noqa: B010 - mypy knows it as a class


def main() -> int:
    parts = frozenset(filter(None, os.environ.pop("BENCH_WITHOUT", "").split(",")))
    profile = os.environ.pop("BENCH_PROFILE", "")
    if unknown := parts - PARTS.keys():
        print(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    leave_out(parts)
    serve: Callable[[], int] = lambda: run(GatewaySettings, app.build, [])  # noqa: E731
    if not profile:
        return serve()
    profiler = cProfile.Profile()
    try:
        return profiler.runcall(serve)
    finally:
        profiler.dump_stats(profile)


if __name__ == "__main__":
    sys.exit(main())
