"""Whether policy allows what a caller does, and by which rule. Pure: no clock, no input and output.

A request is allowed where

1. the address rules of the deployment, of the tenant and of its organisation let the address in,
2. the key's own limits do, to addresses and to models,
3. one of the action's scopes is in the credential, and the client has it without condition or one of its
   roles allows it,
4. and no rule of its roles denies it.

Deny over allow, and nothing is allowed by default. An engine stands for one version of the policy; what is
compiled of it is remembered and bounded. Decisions do not depend on the order of rules.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple, TypeVar

from msgspec import Struct

from services.mesh.actions import Action
from services.mesh.addresses import Address, NetworkMap, parse_address
from services.mesh.context import Identity
from services.mesh.policy import EVERY_SCOPE, AddressRule, Effect, Network, Plan, PolicyDocument, Role, Rule
from services.mesh.rule_index import Glob, Query, RuleIndex

MAX_CALLERS = 4096
"""Pairs of a tenant and a set of roles that are remembered."""
MAX_VIEWS = 256
"""Sets of roles whose rules are compiled; most tenants have the same."""
MAX_KEY_LIMITS = 4096
"""Keys' lists of addresses that are compiled."""
DEFAULT = "default"
"""The name of the rule where no rule made it so."""


_K = TypeVar("_K")
_V = TypeVar("_V")


class Facts(Struct, frozen=True):
    """What is known of a request.

    None: not known yet. A rule that allows and depends on it may still hold; one that denies does not fire
    yet.
    """

    at: datetime
    """When; with a time zone."""
    address: str = ""
    """The caller's. What is no address, such as an empty text, is in no block."""
    model: str | None = None
    task: str | None = None
    max_tokens: int | None = None
    """Over all choices."""
    labels: Mapping[str, str] | None = None


class Decision(NamedTuple):
    """What policy says."""

    allowed: bool
    rule: str
    """`role ROLE, rule RULE`, `role ROLE`, `client scope SCOPE`, `address rule ID`, `key addresses`,
    `key models` or `default`."""
    explanation: str
    """A sentence for the caller."""
    missing_scope: str = ""
    """Set where nothing grants the credential any of the action's scopes: the least of them."""


class PolicyEngine:
    """Decides by one version of the policy."""

    def __init__(self, document: PolicyDocument, version: int = 0) -> None:
        self.document = document
        self.version = version
        self._roles = {role.role_id: role for role in document.roles}
        self._parents = {tenant.tenant_id: tenant.parent_id for tenant in document.tenants}
        self._plan_ids = {tenant.tenant_id: tenant.plan_id for tenant in document.tenants}
        self._plans = {plan.plan_id: plan for plan in document.plans}
        self._address_rules: dict[str, list[AddressRule]] = {}
        for rule in document.address_rules:
            self._address_rules.setdefault(rule.tenant_id, []).append(rule)
        self._gates: dict[str, _Gate | None] = {}
        self._callers: OrderedDict[tuple[str, frozenset[str]], _Caller] = OrderedDict()
        self._views: OrderedDict[tuple[frozenset[str], frozenset[str]], _View] = OrderedDict()
        self._key_limits: OrderedDict[int, tuple[tuple[Network, ...], NetworkMap[bool]]] = OrderedDict()

    def decide(self, identity: Identity, action: Action, facts: Facts) -> Decision:
        """Raises nothing."""
        caller = self._caller(identity.tenant_id, identity.roles)
        address = parse_address(facts.address)
        for gate in caller.gates:
            refused = gate.refusal(address)
            if refused is not None:
                return refused
        if identity.addresses and not self._key_addresses(identity.addresses).find(address):
            return Decision(False, "key addresses", "The API key may not be used from this address.")
        model = facts.model
        if identity.models and model is not None and not any_matches(identity.models, model):
            return Decision(False, "key models", f"The API key may not be used for the model `{model}`.")
        return _by_roles(identity, action, facts, address, caller.view)

    def prepare_for(self, before: PolicyEngine) -> None:
        """Compiles what the engine before had to, so that no request waits for it. May run in a thread, while
        `before` decides."""
        for key, known in tuple(before._callers.items()):
            view = self._caller(*key).view
            for made in tuple(known.view.indexes):
                view.index(*made)

    def plan(self, tenant_id: str) -> Plan | None:
        """The tenant's plan; None where the policy knows no such tenant, or its plan is gone."""
        return self._plans.get(self._plan_ids.get(tenant_id, ""))

    def allowed_scopes(self, identity: Identity, facts: Facts) -> frozenset[str]:
        """Those of the credential's scopes that policy allows now: what it holds is only the most of it."""
        return frozenset(
            scope for scope in identity.scopes if self.decide(identity, Action("", (scope,)), facts).allowed
        )

    def _caller(self, tenant_id: str, roles: frozenset[str]) -> _Caller:
        key = (tenant_id, roles)
        found = self._callers.get(key)
        if found is not None:
            self._callers.move_to_end(key)
            return found
        parent_id = self._parents.get(tenant_id, "")
        own = ("", tenant_id, parent_id)
        named = [self._roles[role_id] for role_id in roles if role_id in self._roles]
        theirs = frozenset(role.role_id for role in named if role.tenant_id in own)
        # Another tenant's role gives nothing; what it denies stays denied.
        foreign = frozenset(role.role_id for role in named) - theirs
        gates = (self._gate(owner) for owner in dict.fromkeys(own))
        found = _Caller(tuple(gate for gate in gates if gate is not None), self._view(theirs, foreign))
        return _remember(self._callers, key, found, MAX_CALLERS)

    def _view(self, theirs: frozenset[str], foreign: frozenset[str]) -> _View:
        key = (theirs, foreign)
        found = self._views.get(key)
        if found is not None:
            self._views.move_to_end(key)
            return found
        roles = self._roles
        found = _View([roles[name] for name in sorted(theirs)], [roles[name] for name in sorted(foreign)])
        return _remember(self._views, key, found, MAX_VIEWS)

    def _gate(self, tenant_id: str) -> _Gate | None:
        rules = self._address_rules.get(tenant_id)
        if rules is None:
            return None
        gate = self._gates.get(tenant_id)
        if gate is None:
            gate = self._gates[tenant_id] = _Gate(tenant_id, rules)
        return gate

    def _key_addresses(self, addresses: tuple[Network, ...]) -> NetworkMap[bool]:
        # By the tuple's own identity, which the entry keeps alive: to hash networks costs more than to find
        # one.
        found = self._key_limits.get(id(addresses))
        if found is not None:
            self._key_limits.move_to_end(id(addresses))
            return found[1]
        compiled = NetworkMap((block, True) for block in addresses)
        return _remember(self._key_limits, id(addresses), (addresses, compiled), MAX_KEY_LIMITS)[1]


class _Gate:
    """The address rules of one tenant, or of the deployment."""

    def __init__(self, tenant_id: str, rules: Sequence[AddressRule]) -> None:
        self._whose = f"the tenant `{tenant_id}`" if tenant_id else "the deployment"
        denied = [rule for rule in rules if rule.effect is Effect.DENY]
        allowed = [rule for rule in rules if rule.effect is Effect.ALLOW]
        self._denied = NetworkMap((rule.network, rule.rule_id) for rule in denied)
        self._allowed = NetworkMap((rule.network, True) for rule in allowed)

    def refusal(self, address: Address | None) -> Decision | None:
        """None where the address may come in."""
        denied = self._denied.find(address)
        if denied:
            rule_id = min(min(ids) for ids in denied)  # the same one whatever their order
            explanation = f"The address rule `{rule_id}` of {self._whose} keeps this address out."
            return Decision(False, f"address rule {rule_id}", explanation)
        if not self._allowed.empty and not self._allowed.find(address):
            return Decision(False, DEFAULT, f"No address rule of {self._whose} lets this address in.")
        return None


class _View:
    """What a set of roles allows and denies. Indexes are made as they are needed: one for each scope, effect
    and set of known facts."""

    def __init__(self, theirs: Iterable[Role], foreign: Iterable[Role]) -> None:
        """Both sorted by id."""
        self.unconditional: dict[str, str] = {}
        """The first role by scope."""
        self._allows: list[tuple[Rule, Decision]] = []
        self._denies: list[tuple[Rule, Decision]] = []
        for role in theirs:
            for scope in role.scopes:
                self.unconditional.setdefault(scope, role.role_id)
            self._allows += _rules(role, Effect.ALLOW)
            self._denies += _rules(role, Effect.DENY)
        for role in foreign:
            self._denies += _rules(role, Effect.DENY)
        self.has_rules = bool(self._allows or self._denies)
        self._may = frozenset(self.unconditional).union(*(rule.scopes for rule, _ in self._allows))
        self.indexes: dict[tuple[Effect, str, int], RuleIndex[Decision]] = {}

    def may_allow(self, scope: str) -> bool:
        """Whether anything allows the scope, under whatever condition."""
        return scope in self._may or EVERY_SCOPE in self._may

    def index(self, effect: Effect, scope: str, known: int) -> RuleIndex[Decision]:
        """What the rules say. An empty scope is that of an action that needs none."""
        key = (effect, scope, known)
        index = self.indexes.get(key)
        if index is None:
            rules = self._allows if effect is Effect.ALLOW else self._denies
            fit = [each for each in rules if not each[0].scopes.isdisjoint((scope, EVERY_SCOPE))]
            index = self.indexes[key] = RuleIndex(fit, effect, known)
        return index


@dataclass(frozen=True, slots=True)
class _Caller:
    """What counts for all callers of one tenant that have the same roles."""

    gates: tuple[_Gate, ...]
    view: _View


def _rules(role: Role, effect: Effect) -> list[tuple[Rule, Decision]]:
    ordered = sorted(role.rules, key=lambda rule: rule.rule_id)
    return [(rule, _decided(role, rule)) for rule in ordered if rule.effect is effect]


def _by_roles(
    identity: Identity, action: Action, facts: Facts, address: Address | None, view: _View
) -> Decision:
    direct = identity.scopes if identity.direct_scopes is None else identity.direct_scopes
    scopes = [
        scope
        for scope in action.scopes
        if scope in identity.scopes and (scope in direct or view.may_allow(scope))
    ]
    if action.scopes and not scopes:
        # The last is the least of them.
        missing = action.scopes[-1]
        return Decision(False, DEFAULT, f"The credential lacks the scope `{missing}`.", missing)
    query: Query | None = None
    if view.has_rules:
        query = Query(address, facts.at, facts.model, facts.task, facts.max_tokens, facts.labels)
        # A rule that denies any of the scopes denies the action, even where another scope would do.
        for scope in action.scopes or ("",):
            denied = view.index(Effect.DENY, scope, query.known).first(query)
            if denied is not None:
                return denied
    if not action.scopes:
        return Decision(True, DEFAULT, "Any valid credential may do this.")
    for scope in scopes:
        if scope in direct:
            return _by_client(scope)
        role_id = view.unconditional.get(scope)
        if role_id is not None:
            return Decision(True, f"role {role_id}", f"The role `{role_id}` allows `{scope}`.")
    if query is not None:
        for scope in scopes:
            allowed = view.index(Effect.ALLOW, scope, query.known).first(query)
            if allowed is not None:
                return allowed
    return Decision(False, DEFAULT, "No rule of the credential's roles allows this request.")


@lru_cache(maxsize=256)
def _by_client(scope: str) -> Decision:
    return Decision(True, f"client scope {scope}", f"The credential has the scope `{scope}`.")


def _decided(role: Role, rule: Rule) -> Decision:
    allowed = rule.effect is Effect.ALLOW
    does = "allows" if allowed else "denies"
    explanation = f"The rule `{rule.rule_id}` of the role `{role.role_id}` {does} this request."
    return Decision(allowed, f"role {role.role_id}, rule {rule.rule_id}", explanation)


def any_matches(patterns: Iterable[str], model: str) -> bool:
    """Whether one of the patterns, in which `*` stands for any characters, is that model."""
    return any(pattern == model or ("*" in pattern and Glob(pattern).matches(model)) for pattern in patterns)


def _remember(memory: OrderedDict[_K, _V], key: _K, value: _V, most: int) -> _V:
    memory[key] = value
    while len(memory) > most:
        memory.popitem(last=False)
    return value
