"""What `make bench-auth` measures: policies of many shapes, and a deployment of few or many tenants."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path

from services.auth.credentials import keys
from services.auth.credentials.assertions import Assertions
from services.auth.credentials.last_use import LastUse
from services.auth.credentials.proof import Proofs
from services.auth.grants.exchange import Exchange
from services.auth.grants.own_tokens import OwnTokens
from services.auth.grants.tokens import Grant, TokenIssuer
from services.auth.signing.ring import KeyRing as SigningRing
from services.auth.store import ApiKey, Batch, Client, Put, Tenant
from services.auth.stores.opening import sqlite_store
from services.mesh.access_token import Audience
from services.mesh.clock import SystemClock
from services.mesh.context import Identity
from services.mesh.decision import Facts, PolicyEngine
from services.mesh.policy import (
    BUILT_IN_ROLES,
    AddressRule,
    Condition,
    Effect,
    PolicyDocument,
    Role,
    Rule,
    TenantPolicy,
)
from services.mesh.tokens import Verifier

ISSUER = "https://auth.llmos.internal"
GENERATE = frozenset({"generate"})
NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
AT_WORK = 10
"""So many credentials and callers are used in turn, whatever number there is: the same work on both sides."""
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy, and requests to decide by it."""

    engine: PolicyEngine
    requests: Sequence[tuple[Identity, Facts]]


def _caller(roles: Sequence[str], tenant_id: str = "acme") -> Identity:
    return Identity(
        tenant_id, "app", scopes=GENERATE, roles=frozenset(roles), direct_scopes=frozenset(), token_id="t"
    )


def _requests(identity: Identity, count: int) -> list[tuple[Identity, Facts]]:
    """That differ in all that rules look at."""
    return [
        (
            identity,
            Facts(
                at=NOW,
                address=f"10.{number % 200}.{number % 7}.9",
                model=f"model-{number}",
                task="chat",
                max_tokens=64,
                labels={"team": f"team-{number}"},
            ),
        )
        for number in range(0, count, max(1, count // 64))
    ]


def _policy(roles: Sequence[Role], count: int, rules: Sequence[AddressRule] = ()) -> Policy:
    document = PolicyDocument(roles=tuple(roles), address_rules=tuple(rules), tenants=(TenantPolicy("acme"),))
    return Policy(PolicyEngine(document), _requests(_caller([role.role_id for role in roles]), count))


def shapes(count: int) -> Iterator[tuple[str, Policy]]:
    """Policies of `count` rules, by what there is much of."""

    def rules(effect: Effect, *conditions: Condition) -> tuple[Rule, ...]:
        return tuple(
            Rule(f"r{number}", effect, GENERATE, condition) for number, condition in enumerate(conditions)
        )

    def model(number: int) -> Condition:
        return Condition(models=(f"model-{number}",))

    def block(number: int) -> Condition:
        return Condition(addresses=(ip_network(f"10.{number % 250}.{number // 250}.0/24"),))

    numbers = range(count)
    last = Rule("rest", Effect.ALLOW, GENERATE)
    yield "models", _policy([Role("a", rules=rules(Effect.ALLOW, *map(model, numbers)))], count)
    globs = (Condition(models=(f"model-{number}*",)) for number in numbers)
    yield "model globs", _policy([Role("a", rules=rules(Effect.ALLOW, *globs))], count)
    yield "addresses", _policy([Role("a", rules=(*rules(Effect.ALLOW, *map(block, numbers)), last))], count)
    labels = (Condition(labels={"team": f"team-{number}"}) for number in numbers)
    yield "labels", _policy([Role("a", rules=rules(Effect.ALLOW, *labels))], count)
    ten = [
        Role(f"role-{role}", rules=rules(Effect.ALLOW, *(model(number) for number in numbers[role::10])))
        for role in range(10)
    ]
    yield "ten roles", _policy(ten, count)
    # None of them fires, so that all of them have to be ruled out.
    denying = (Condition(models=(f"other-{number}",), max_tokens=128, tasks=("chat",)) for number in numbers)
    yield "denying", _policy([Role("a", scopes=GENERATE, rules=rules(Effect.DENY, *denying))], count)
    gates = [
        AddressRule(f"a{number}", Effect.DENY, ip_network(f"172.{number % 250}.{number // 250}.0/24"))
        for number in numbers
    ]
    yield "address rules", _policy([Role("a", scopes=GENERATE)], count, gates)


def tenants_policy(tenants: int) -> Policy:
    """Each tenant with a role and an address rule of its own; requests of `AT_WORK` callers among them."""
    rule = Rule("r", Effect.ALLOW, GENERATE, Condition(models=("m*",)))
    names = [f"tenant-{number}" for number in range(tenants)]
    document = PolicyDocument(
        roles=(
            *BUILT_IN_ROLES,
            *(Role(f"role-{name}", name, rules=(rule,)) for name in names),
        ),
        address_rules=tuple(
            AddressRule(f"a-{name}", Effect.ALLOW, ip_network("10.0.0.0/8"), name) for name in names
        ),
        tenants=tuple(TenantPolicy(name) for name in names),
    )
    some = [names[number * tenants // AT_WORK] for number in range(AT_WORK)]
    facts = Facts(at=NOW, address="10.1.2.3", model="model-1", task="chat", max_tokens=64, labels={})
    return Policy(PolicyEngine(document), [(_caller([f"role-{name}"], name), facts) for name in some])


@dataclass(slots=True)
class Deployment:
    """Auth on SQLite with tenants and keys, and what verifies its tokens."""

    keys: list[str]
    """All API keys."""
    tenants: int
    exchange: Exchange
    issuer: TokenIssuer
    ring: SigningRing
    policy: Policy
    clock: SystemClock

    def verifier(self, max_entries: int = 10_000) -> Verifier:
        """As the gateway's; with 0 entries it remembers nothing."""
        return Verifier(
            self.ring,
            issuer=ISSUER,
            audience=Audience.GATEWAY,
            clock=self.clock,
            cache_max_entries=max_entries,
        )

    @property
    def some_keys(self) -> list[str]:
        """`AT_WORK` of them, spread over all."""
        return [self.keys[number * len(self.keys) // AT_WORK] for number in range(AT_WORK)]

    def tokens(self) -> dict[str, str]:
        """By API key, what it would be exchanged for; signed without asking the store."""
        return {key: self._signed(number) for number, key in enumerate(self.keys)}

    def _signed(self, number: int) -> str:
        owner = number % self.tenants
        grant = Grant(
            f"app-{owner}", Audience.GATEWAY, GENERATE, tenant_id=f"tenant-{owner}", key_id=f"key_{number}"
        )
        return self.issuer.issue(grant).token


@contextlib.asynccontextmanager
async def deployment(database: Path, *, tenants: int, api_keys: int) -> AsyncIterator[Deployment]:
    """Filled, each tenant with one client, and the keys shared out over them."""
    clock = SystemClock()
    store = sqlite_store(database)
    await store.start()
    ring = SigningRing(store, clock, rotation_s=86_400, publish_ahead_s=3600, token_ttl_s=3600)
    await ring.start()
    try:
        texts = [keys.new_api_key() for _ in range(api_keys)]
        writes: list[Put] = []
        for number in range(tenants):
            writes.append(Put(Tenant(f"tenant-{number}"), create=True))
            writes.append(Put(Client(f"app-{number}", f"tenant-{number}", scopes=GENERATE), create=True))
        for number, text in enumerate(texts):
            parsed = keys.parse_api_key(text)
            key = ApiKey(f"key_{number}", f"app-{number % tenants}", parsed.prefix, parsed.digest)
            writes.append(Put(key, create=True))
        for begin in range(0, len(writes), _BATCH):
            await store.commit(
                Batch(at=clock.now(), actor="service:auth", writes=writes[begin : begin + _BATCH])
            )
        last_use = LastUse(store, clock)
        proofs = Proofs(store, clock, Assertions(store, clock, audiences=frozenset({ISSUER})), last_use, {})
        issuer = TokenIssuer(ring, clock, issuer=ISSUER, ttl_s=3600, service_ttl_s=3600)
        own = OwnTokens(store, ring, clock, issuer=ISSUER)
        yield Deployment(
            texts,
            tenants,
            Exchange(store, proofs, own, issuer, clock),
            issuer,
            ring,
            tenants_policy(tenants),
            clock,
        )
    finally:
        await ring.stop()
        await store.stop()
