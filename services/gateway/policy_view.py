"""The policy in force, as it is for one caller."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from services.gateway.auditing import RequestRecord
from services.gateway.authorisation import Authorisation
from services.gateway.limits.guard import Left, Limits
from services.gateway.models import Models
from services.mesh.actions import ACTIONS
from services.mesh.clock import Clock
from services.mesh.context import Identity


@dataclass(frozen=True, slots=True)
class EffectivePolicy:
    """What a caller may do, and how much."""

    identity: Identity
    methods: tuple[str, ...]
    """Full names, sorted: those that policy may let it call, depending on what it asks for."""
    models: tuple[str, ...]
    """Ids, sorted."""
    limits: tuple[Left, ...]
    """Of its tenant's plan, sorted by unit, scope and model."""
    at: datetime
    """When they stood so."""
    max_request_bytes: int
    max_tokens: int
    """For each choice."""
    credential_expires_at: datetime | None
    """None where it does not expire, or where that is not known here."""


class PolicyView:
    """Answers what a caller may do, by the policy in force and the limits of this deployment."""

    def __init__(
        self,
        authorisation: Authorisation,
        models: Models,
        limits: Limits,
        clock: Clock,
        *,
        max_request_bytes: int,
        max_tokens: int,
    ) -> None:
        self._authorisation = authorisation
        self._models = models
        self._limits = limits
        self._clock = clock
        self._max_request_bytes = max_request_bytes
        self._max_tokens = max_tokens

    async def effective(self, record: RequestRecord) -> EffectivePolicy:
        """Raises DependencyUnavailable where the policy is not known yet."""
        identity, address = record.identity, record.source_address
        may_call = self._authorisation.may_call
        return EffectivePolicy(
            identity=identity,
            methods=tuple(
                method for method in sorted(ACTIONS) if may_call(identity, method, address=address)
            ),
            models=tuple(model.id for model in await self._models.visible(record)),
            limits=await self._limits.left(identity),
            at=self._clock.now(),
            max_request_bytes=self._max_request_bytes,
            max_tokens=self._max_tokens,
            credential_expires_at=record.credential_expires_at,
        )
