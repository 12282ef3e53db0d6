"""Which limits a request meets: those of the plan of its tenant, for its key, its client and its tenant, for
its model and for all models together. Worked out once for a caller and a model, for each version of the
policy.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from operator import attrgetter

from services.gateway.authorisation import PolicySource
from services.gateway.limits.limiter import Limit
from services.mesh.context import Identity
from services.mesh.decision import PolicyEngine
from services.mesh.policy import LimitScope, ModelPrice, Plan, PlanLimit

MAX_REMEMBERED = 8192
"""Pairs of a caller and a model."""
_FREE = ModelPrice()
_by_unit = attrgetter("unit", "scope", "model", "period")


@dataclass(frozen=True, slots=True)
class Applying:
    """What holds for one caller and model."""

    limits: tuple[Limit, ...] = ()
    price: ModelPrice = _FREE
    currency: str = ""


class Plans:
    """Finds what applies."""

    def __init__(self, policy: PolicySource) -> None:
        self._policy = policy
        self._engine: PolicyEngine | None = None
        self._remembered: OrderedDict[tuple[str, str, str, str | None], Applying] = OrderedDict()

    def applying(self, identity: Identity, model: str | None) -> Applying:
        """To a request for the model; None: to any. Raises DependencyUnavailable where the policy is not
        known yet."""
        engine = self._policy.engine
        if engine is not self._engine:
            self._engine = engine
            self._remembered.clear()
        key = (identity.tenant_id, identity.client_id, identity.key_id, model)
        found = self._remembered.get(key)
        if found is None:
            found = self._remembered[key] = _compiled(engine.plan(identity.tenant_id), identity, model)
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return found


def _compiled(plan: Plan | None, identity: Identity, model: str | None) -> Applying:
    if plan is None:
        return Applying()
    least: dict[str, Limit] = {}
    for entry in sorted(plan.limits, key=_by_unit):
        if model is None or entry.model in ("", model):
            limit = _limit(entry, identity)
            # said twice, the smaller one holds
            if limit.counter not in least or limit.limit < least[limit.counter].limit:
                least[limit.counter] = limit
    prices = {price.model: price for price in plan.prices}
    price = prices.get(model or "") or prices.get("") or _FREE
    return Applying(tuple(least.values()), price, plan.currency)


def _limit(entry: PlanLimit, identity: Identity) -> Limit:
    subject = _subject(entry.scope, identity)
    return Limit(
        counter=f"{entry.unit.name.lower()}:{entry.period.name.lower()}:{subject}:{entry.model}",
        tenant_id=identity.tenant_id,
        unit=entry.unit,
        scope=entry.scope,
        subject=subject,
        limit=entry.limit,
        model=entry.model,
        period=entry.period,
    )


def _subject(scope: LimitScope, identity: Identity) -> str:
    """A caller without a key has one of its client's, as it were: a token is no way past the key's limits."""
    if scope is LimitScope.TENANT:
        return f"tenant:{identity.tenant_id}"
    if scope is LimitScope.CLIENT:
        return f"client:{identity.tenant_id}/{identity.client_id}"
    return f"key:{identity.tenant_id}/{identity.client_id}/{identity.key_id}"
