"""Resources to fill a store of auth with, and the stores to fill."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Protocol

from services.auth.store import (
    ApiKey,
    Batch,
    ClaimRule,
    Client,
    Delete,
    IdentityProvider,
    Kind,
    NewRevocation,
    Put,
    Resource,
    Store,
    Tenant,
)
from services.mesh.policy import (
    AddressRule,
    BudgetPeriod,
    Condition,
    Effect,
    LimitScope,
    LimitUnit,
    ModelPrice,
    Plan,
    PlanLimit,
    RevocationKind,
    Role,
    Rule,
    TimeWindow,
)

NOW = datetime(2030, 1, 1, 12, 30, 15, 123456, tzinfo=UTC)
HOSTILE = [
    "'; DROP TABLE resources; --",
    "' OR '1'='1",
    '" OR ""="',
    "%",
    "_",
    "\\'; --",
    "/* */",
    "?1 :name @name $name $1 %s %(name)s",
    "Ünïcödé 名前 🔑 \u202e",
    " ",
    "a" * 10_000,
    "NULL",
    "1; PRAGMA writable_schema=1",
    "\x01\x7f\ufeff\ufffe",
    '{}[]"\\u0000',
]
UNSTORABLE = ["a\x00b", "\x00", "\ud800"]
"""NUL, and what is no character at all."""


class StartedStore(Store, Protocol):
    """A store with its life."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


StoresOf = Callable[[str, int], Awaitable[list[StartedStore]]]
"""`await stores_of("postgresql", 2)`: so many on one database, started; one where it cannot be shared."""


def batch(
    *writes: Put | Delete, actor: str = "acme/admin", revocations: Sequence[NewRevocation] = ()
) -> Batch:
    return Batch(NOW, actor, "request-1", writes, revocations)


def creates(*resources: Resource) -> Batch:
    return batch(*(Put(resource, create=True) for resource in resources))


def update(resource: Resource, version: int | None = None, at: datetime = NOW) -> Batch:
    return replace(batch(Put(resource, create=False, expected_version=version)), at=at)


def delete(kind: Kind, resource_id: str, version: int | None = None) -> Batch:
    return batch(Delete(kind, resource_id, version))


def tenant(tenant_id: str = "acme", parent_id: str = "") -> Tenant:
    return Tenant(tenant_id, parent_id, display_name=f"The {tenant_id}")


def client(client_id: str = "app", tenant_id: str = "acme", *scopes: str) -> Client:
    return Client(client_id, tenant_id, scopes=frozenset(scopes), secret_digest=bytes(range(224, 256)))


def api_key(key_id: str = "key_1", client_id: str = "app", prefix: str = "abcdefgh", *scopes: str) -> ApiKey:
    return ApiKey(key_id, client_id, prefix, bytes(range(128, 160)), scopes=frozenset(scopes))


def revocation(
    subject_id: str,
    kind: RevocationKind = RevocationKind.TOKEN,
    expires_at: datetime = NOW + timedelta(minutes=5),
) -> NewRevocation:
    return NewRevocation(kind, subject_id, NOW, expires_at, cut_streams=kind is RevocationKind.CLIENT)


def everything(text: str = "x") -> list[Resource]:
    """One of each kind with all its fields set, in an order in which they can be made. `text` is in each."""
    names = frozenset({text, f"{text}-2"})
    networks = (ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"))
    condition = Condition(
        models=(text,),
        tasks=(text,),
        addresses=networks,
        times=(TimeWindow((1, 7), 0, 90, text), TimeWindow()),
        max_tokens=7,
        labels={text: text},
    )
    limit = PlanLimit(LimitUnit.BUDGET_TOKENS, LimitScope.CLIENT, 2**62, text, BudgetPeriod.MONTH)
    return [
        Plan(
            text,
            text,
            (limit, PlanLimit(LimitUnit.REQUESTS_PER_MINUTE, LimitScope.KEY, 0)),
            "EUR",
            (ModelPrice(text, 1, 2, 3), ModelPrice()),
        ),
        Tenant(text, display_name=text, plan_id=text, disabled=True),
        Tenant(f"{text}-2", parent_id=text, plan_id=text),
        Role(text, text, text, names, (Rule(text, Effect.DENY, names, condition),)),
        Role(f"{text}-2", rules=(Rule(text, Effect.ALLOW, frozenset({"*"})),)),
        AddressRule(text, Effect.DENY, networks[1], text, text),
        AddressRule(f"{text}-2", Effect.ALLOW, networks[0]),
        IdentityProvider(
            text, f"https://{text}", text, f"{text}-2", names, (ClaimRule(text, text, text),), disabled=True
        ),
        Client(
            text,
            f"{text}-2",
            is_user=True,
            display_name=text,
            scopes=names,
            roles=names,
            jwks_json=text,
            disabled=True,
            external_subject=text,
            secret_digest=bytes(range(256)),
            old_secret_digest=b"\x00",
            old_secret_until=NOW,
        ),
        ApiKey(text, text, text, b"\xff\xfe", text, names, (text, "*"), networks, NOW, disabled=True),
    ]
