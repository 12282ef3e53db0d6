"""The auth service without its process: real parts over the store in memory, on a clock that is moved."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from services.auth.access import AccessControl
from services.auth.credentials import keys
from services.auth.credentials.assertions import Assertions
from services.auth.credentials.last_use import LastUse
from services.auth.credentials.proof import Proofs
from services.auth.grants.exchange import Exchange
from services.auth.grants.introspection import Introspection
from services.auth.grants.own_tokens import OwnTokens
from services.auth.grants.policy import SERVICES
from services.auth.grants.renewal import Renewal
from services.auth.grants.tokens import TokenIssuer
from services.auth.providers.provider_tokens import ProvenPerson
from services.auth.signing.ring import KeyRing
from services.auth.store import ApiKey, Batch, Client, Kind, Put, Resource, Tenant
from services.auth.stores.memory import MemoryStore
from services.mesh.clock import ManualClock
from services.mesh.errors import CredentialInvalid
from services.mesh.tokens import Audience, VerifiedToken, Verifier

ISSUER = "https://auth.example"
TOKEN_ENDPOINT = "https://api.example/oauth2/token"
SERVICE_SECRETS = {f"service:{name}": f"secret-of-{name}-".ljust(40, "x") for name in SERVICES}


class Providers:
    """Corporate identity providers: whoever is in `people`, by token."""

    def __init__(self) -> None:
        self.people: dict[str, ProvenPerson] = {}

    async def verify(self, token: str) -> ProvenPerson:
        if token not in self.people:
            raise CredentialInvalid("nobody knows this token")
        return self.people[token]


@dataclass
class Auth:
    """The parts, put together as in app.py."""

    clock: ManualClock
    store: MemoryStore
    ring: KeyRing
    issuer: TokenIssuer
    exchange: Exchange
    introspection: Introspection
    renewal: Renewal
    access: AccessControl
    last_use: LastUse
    providers: Providers
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def verify(self, token: str, audience: Audience = Audience.GATEWAY) -> VerifiedToken:
        """As the service of that audience would, with an empty memory."""
        return await Verifier(self.ring, issuer=ISSUER, audience=audience, clock=self.clock).verify(token)

    async def put(self, *resources: Resource, create: bool = True) -> None:
        """Makes resources, or with `create=False` replaces them."""
        writes = [Put(resource, create=create) for resource in resources]
        await self.store.commit(Batch(at=self.clock.now(), actor="acme/root", writes=writes))

    async def tenant(self, tenant_id: str = "acme", **fields: Any) -> Tenant:
        tenant = Tenant(tenant_id, **fields)
        await self.put(tenant)
        return tenant

    async def client(self, client_id: str = "app", tenant_id: str = "acme", **fields: Any) -> str:
        """Makes a client, and returns its secret."""
        secret = keys.new_client_secret()
        fields = {"scopes": frozenset({"generate", "models.read"})} | fields
        await self.put(Client(client_id, tenant_id, secret_digest=keys.digest(secret), **fields))
        return secret

    async def key(self, client_id: str = "app", **fields: Any) -> str:
        """Makes an API key, and returns its text. Its id is `key_` and a number, from 0."""
        text = keys.new_api_key()
        parsed = keys.parse_api_key(text)
        key_id = f"key_{next(self._numbers)}"
        await self.put(ApiKey(key_id, client_id, parsed.prefix, parsed.digest, **fields))
        return text

    async def change(self, kind: Kind, resource_id: str, **fields: Any) -> None:
        """Changes fields of a resource."""
        stored = await self.store.get(kind, resource_id)
        assert stored is not None
        await self.put(replace(stored.resource, **fields), create=False)  # type: ignore[type-var]


@pytest.fixture
async def auth() -> AsyncIterator[Auth]:
    clock, store = ManualClock(), MemoryStore()
    ring = KeyRing(store, clock, rotation_s=86_400, publish_ahead_s=3600, token_ttl_s=900)
    await ring.start()
    issuer = TokenIssuer(ring, clock, issuer=ISSUER, ttl_s=300, service_ttl_s=900)
    digests = {name: keys.digest(secret) for name, secret in SERVICE_SECRETS.items()}
    verifier = Verifier(ring, issuer=ISSUER, audience=Audience.AUTH, clock=clock)
    last_use, providers = LastUse(store, clock), Providers()
    assertions = Assertions(store, clock, audiences=frozenset({ISSUER, TOKEN_ENDPOINT}))
    proofs = Proofs(store, clock, assertions, last_use, digests)
    tokens = OwnTokens(store, ring, clock, issuer=ISSUER)
    exchange = Exchange(store, proofs, tokens, issuer, clock, providers)
    yield Auth(
        clock=clock,
        store=store,
        ring=ring,
        issuer=issuer,
        exchange=exchange,
        introspection=Introspection(store, proofs, tokens, exchange, clock),
        renewal=Renewal(store, exchange, tokens, issuer, clock),
        access=AccessControl(verifier, store, clock),
        last_use=last_use,
        providers=providers,
    )
    await ring.stop()
