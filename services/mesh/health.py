"""What the process says of itself: gRPC health, and the HTTP edge's /readyz by the same state."""

from __future__ import annotations

from collections.abc import Iterable

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

LIVENESS = "liveness"
"""A health name that serves as long as the process answers at all, whatever it waits for: a supervisor that
restarts by it does not restart a process for the loss of another one."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Ready when all named parts are; not ready for good once draining began.

    Each gRPC service of the process and the empty name tell the same: a router must not send a call to a
    process of which a needed part is missing.
    """

    def __init__(self, parts: Iterable[str] = ()) -> None:
        self.servicer = HealthServicer()
        self._parts = dict.fromkeys(parts, False)
        self._services: list[str] = [""]
        self._started = False
        self._draining = False

    @property
    def ready(self) -> bool:
        return self._started and not self._draining and all(self._parts.values())

    @property
    def waiting_for(self) -> list[str]:
        """The parts that are missing, for a person to read."""
        if self._draining:
            return ["draining"]
        return [part for part, ready in self._parts.items() if not ready] + (
            [] if self._started else ["start"]
        )

    async def add_service(self, name: str) -> None:
        self._services.append(name)
        await self._tell()

    async def set_part(self, part: str, ready: bool) -> None:
        """`part` must have been named at the start, so that none is forgotten."""
        if part not in self._parts:
            raise KeyError(part)
        if self._parts[part] != ready:
            self._parts[part] = ready
            await self._tell()

    async def started(self) -> None:
        """The listeners are open."""
        self._started = True
        await self._tell()

    async def drain(self) -> None:
        """First step of the drain; nothing makes the process ready again."""
        self._draining = True
        await self._tell()
        await self.servicer.enter_graceful_shutdown()

    async def _tell(self) -> None:
        status = _SERVING if self.ready else _NOT_SERVING
        for name in self._services:
            await self.servicer.set(name, status)
        await self.servicer.set(LIVENESS, _SERVING)
