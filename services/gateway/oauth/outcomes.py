"""The audit record of an open method: exactly one for each request that auth has told us the owner of.

Before auth has answered nobody is known to record it under; a refusal is counted, by the chain's guard of
open methods, and leaves no record.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.gateway.auditing import AuditTrail
from services.mesh import context as request_context
from services.mesh.context import Caller, Identity
from services.mesh.events import Edge

T = TypeVar("T")


class Outcomes:
    """Serves open methods."""

    def __init__(self, trail: AuditTrail) -> None:
        self._trail = trail

    async def of(
        self,
        edge: Edge,
        method: str,
        answer: Callable[[], Awaitable[T]],
        whose: Callable[[T], Identity | None],
    ) -> T:
        """The answer, once its record is on disk.

        `method` is the full gRPC name that the request stands for. Raises what `answer` raises, and
        AuditUnavailable.
        """
        found = await answer()
        identity = whose(found)
        if identity is None:
            return found
        context = request_context.require_current()
        context.caller = Caller(identity)
        with self._trail.around(context, edge) as record:
            record.method = method
            record.begin()
            await record.committed()
        return found
