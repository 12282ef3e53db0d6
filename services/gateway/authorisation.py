"""Whether policy lets a caller do what it asks for: when a call comes in, and when its request is parsed.

The chain's link decides by what is known then: who calls, from where and when. A rule may also depend on the
model, the number of tokens, the task or the labels; the use case asks again when it knows them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Protocol

from msgspec import structs

from services.mesh.actions import ACTIONS, OPEN_METHODS
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.decision import Decision, Facts, PolicyEngine
from services.mesh.errors import PolicyDenied, ScopeMissing
from services.mesh.interceptors import Call, Rest

GENERATE = "/llmos.gateway.v1.GenerationService/StreamGenerate"
LIST_MODELS = "/llmos.gateway.v1.ModelService/ListModels"


class PolicySource(Protocol):
    """The policy in force."""

    @property
    def engine(self) -> PolicyEngine:
        """What decides by it. Raises DependencyUnavailable where it is not known yet."""


class Authorisation:
    """Refuses what policy does not allow."""

    def __init__(self, policy: PolicySource, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock

    def link(self, call: Call, rest: Rest) -> Awaitable[None]:
        """The chain's link. It stands inside `audit`, so that a refusal leaves an outcome. Open methods pass.

        Raises ScopeMissing or PolicyDenied; a method that is not listed is denied to all.
        """
        context = call.context
        if context.method not in OPEN_METHODS:
            self.decide_request(context.identity, context.method, address=context.source_address)
            if ACTIONS[context.method].by_scopes:
                facts = Facts(self._clock.now(), context.source_address)
                scopes = self._policy.engine.allowed_scopes(context.identity, facts)
                context.caller = structs.replace(
                    context.caller, identity=structs.replace(context.identity, scopes=scopes)
                )
        return rest(call)

    def decide_request(
        self,
        identity: Identity,
        method: str,
        *,
        address: str,
        model: str | None = None,
        task: str | None = None,
        max_tokens: int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Raises ScopeMissing or PolicyDenied, which name what refuses. None: not known yet.

        `max_tokens` is over all choices.
        """
        facts = Facts(self._clock.now(), address, model, task, max_tokens, labels)
        decision = self._decide(identity, method, facts)
        if not decision.allowed:
            raise _refusal(decision)

    def may_call(self, identity: Identity, method: str, *, address: str) -> bool:
        """Whether the method is open to the caller, as far as can be said before there is a request."""
        return self._decide(identity, method, Facts(self._clock.now(), address)).allowed

    def may_see(self, identity: Identity, model: str, *, address: str) -> bool:
        """Whether a model exists for the caller: it may be told of it, and use it. A caller that generates
        nothing at all sees what it may be told of."""
        facts = Facts(self._clock.now(), address, model)
        if not self._decide(identity, LIST_MODELS, facts).allowed:
            return False
        use = self._decide(identity, GENERATE, facts)
        return use.allowed or bool(use.missing_scope)

    @property
    def engine(self) -> PolicyEngine:
        """The policy in force. Raises DependencyUnavailable where it is not known yet."""
        return self._policy.engine

    def _decide(self, identity: Identity, method: str, facts: Facts) -> Decision:
        action = ACTIONS.get(method)
        if action is None:
            return Decision(False, "default", "This method is not open to anybody.")
        return self._policy.engine.decide(identity, action, facts)


def _refusal(decision: Decision) -> ScopeMissing | PolicyDenied:
    scope = decision.missing_scope
    if scope:
        hint = f"Use a credential that has the scope `{scope}`."
        return ScopeMissing(decision.explanation, hint=hint, metadata={"scope": scope})
    return PolicyDenied(decision.explanation, metadata={"rule": decision.rule})
