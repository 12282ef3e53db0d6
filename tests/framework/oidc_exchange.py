"""What a corporate provider's tokens are verified with, over a store in memory that knows the provider."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from services.auth.providers.fetching import Fetcher
from services.auth.providers.provider_tokens import ProvenPerson, ProviderTokens
from services.auth.store import Batch, ClaimRule, Delete, IdentityProvider, Kind, Put, Resource, Tenant
from services.auth.stores.memory import MemoryStore
from services.mesh.clock import ManualClock
from services.mesh.policy import Role
from tests.framework.oidc_provider import AUDIENCE, MockProvider

OWN_ISSUER = "https://auth.llmos.internal"
RULES = (
    ClaimRule("groups", "ml", "user"),
    ClaimRule("groups", "admins", "tenant-admin"),
    ClaimRule("realm_access.roles", "audit", "auditor"),
)


class StaleStore(MemoryStore):
    """Can answer with a provider as it was before the last change, as a call beside that change would."""

    read_before: IdentityProvider | None = None

    async def find_provider(self, issuer: str) -> IdentityProvider | None:
        return self.read_before or await super().find_provider(issuer)


@dataclass
class Trust:
    """One provider, trusted by the tenant acme."""

    provider: MockProvider
    configured: IdentityProvider
    store: StaleStore
    clock: ManualClock
    tokens: ProviderTokens

    async def verify(self, token: str) -> ProvenPerson:
        return await self.tokens.verify(token)

    async def person(self, **changes: Any) -> ProvenPerson:
        """Who an honest token is about, but for what is changed of its claims."""
        return await self.verify(self.provider.token(self.clock.now(), **changes))

    async def configure(self, **changes: Any) -> None:
        self.configured = replace(self.configured, **changes)
        await self.put(self.configured, create=False)

    async def put(self, *resources: Resource, create: bool = True) -> None:
        writes = [Put(resource, create=create) for resource in resources]
        await self.store.commit(Batch(at=self.clock.now(), actor="default/admin", writes=writes))

    async def delete_role(self, role_id: str) -> None:
        writes = [Delete(Kind.ROLE, role_id)]
        await self.store.commit(Batch(at=self.clock.now(), actor="default/admin", writes=writes))


@asynccontextmanager
async def trust(provider: MockProvider, *, timeout_s: float = 5.0) -> AsyncIterator[Trust]:
    """`timeout_s`: of one fetch."""
    clock, store = ManualClock(), StaleStore()
    tokens = ProviderTokens(store, clock, Fetcher(timeout_s=timeout_s), own_issuer=OWN_ISSUER)
    configured = IdentityProvider("corp", provider.issuer, AUDIENCE, "acme", claim_rules=RULES)
    trusted = Trust(provider, configured, store, clock, tokens)
    await trusted.put(Tenant("acme"), Role("research", "acme"), configured)
    await tokens.start()
    yield trusted
    await tokens.stop()
