"""Administration over the store in memory, on a clock that is moved: for tests of what administrators do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from services.auth.administration.apply import Applied, Configuration
from services.auth.administration.authority import reach
from services.auth.administration.callers import By
from services.auth.administration.explain import Explanation
from services.auth.administration.resources import Given
from services.auth.administration.service import Administration, Made, Wanted
from services.auth.store import Batch, Client, Kind, NewRevocation, Put, Resource, Stored, Tenant
from services.auth.stores.memory import MemoryStore
from services.mesh.clock import ManualClock
from services.mesh.context import Identity

ALL = frozenset({"admin", "tenant.admin", "generate", "models.read", "audit.read"})
OF_TENANT = ALL - {"admin"}


class Office:
    """A deployment with the client `root` of the tenant `default`, which may do everything."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore()
        self.administration = Administration(self.store, self.clock)
        self.configuration = Configuration(self.store, self.clock)
        self.explanation = Explanation(self.store, self.clock)

    @classmethod
    async def open(cls) -> Office:
        office = cls()
        await office.put(Tenant("default"), Client("root", "default", scopes=ALL))
        return office

    async def put(self, *resources: Resource) -> None:
        """Makes resources without asking anybody."""
        writes = [Put(resource, create=True) for resource in resources]
        await self.store.commit(Batch(at=self.clock.now(), actor="service:auth", writes=writes))

    async def tenant_with_admin(self, tenant_id: str, **fields: Any) -> str:
        """A tenant with a client that administers it; returns the client's id."""
        client_id = f"{tenant_id}-admin"
        await self.put(Tenant(tenant_id, **fields), Client(client_id, tenant_id, scopes=OF_TENANT))
        return client_id

    async def by(self, client_id: str = "root", *, key_id: str = "") -> By:
        """Who asks, with all that the client can reach."""
        owned = await self.store.find_client(client_id)
        if owned is None:
            raise AssertionError(client_id)
        _, document = await self.store.policy()
        roles = {role.role_id: role for role in document.roles}
        scopes = reach(owned.client, owned.tenant, roles)
        identity = Identity(
            owned.tenant.tenant_id, client_id, key_id, scopes=scopes, roles=owned.client.roles
        )
        return By(identity, f"req-{client_id}")

    async def create(self, resource: Resource, by: str = "root", *, without_secret: bool = False) -> Made:
        return await self.administration.create(
            await self.by(by), Given(resource), without_secret=without_secret
        )

    async def update(
        self, kind: Kind, resource_id: str, by: str = "root", *, etag: int | None = None, **fields: Any
    ) -> Stored:
        """Changes the fields that are given by the names of their attributes."""
        stored = await self.store.get(kind, resource_id)
        if stored is None:
            raise AssertionError(resource_id)
        given = Given(replace(stored.resource, **fields), etag)  # type: ignore[type-var]
        return await self.administration.update(await self.by(by), given)

    async def delete(self, kind: Kind, resource_id: str, by: str = "root", etag: int | None = None) -> None:
        await self.administration.delete(await self.by(by), (kind, resource_id), etag)

    async def get(self, kind: Kind, resource_id: str, by: str = "root") -> Stored:
        return await self.administration.get(await self.by(by), (kind, resource_id))

    async def ids(self, kind: Kind, by: str = "root", **wanted: str) -> list[str]:
        """Of all that is listed, over all pages."""
        found, token = [], ""
        while True:
            page, token = await self.administration.page(
                await self.by(by), Wanted(kind, **wanted), page_size=2, page_token=token
            )
            found += [Given(stored.resource).key[1] for stored in page]
            if not token:
                return found

    async def export(self, by: str = "root", tenant_id: str = "", *, digests: bool = False) -> list[Stored]:
        asked = self.configuration.export(await self.by(by), tenant_id, digests=digests)
        return [stored async for stored in asked]

    async def apply(
        self, resources: Sequence[Resource], by: str = "root", *, prune: bool = False, dry_run: bool = False
    ) -> list[Applied]:
        return await self.configuration.apply(
            await self.by(by), [Given(resource) for resource in resources], prune=prune, dry_run=dry_run
        )

    async def revoked(self) -> list[NewRevocation]:
        """All, in their order."""
        found = await self.store.revocations(after_version=0, now=self.clock.now())
        return [one.revoked for one in found]
