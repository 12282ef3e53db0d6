"""What there is, and what there would be after the writes that are planned."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from services.auth.administration.resources import built_in, there_is_no
from services.auth.store import ApiKey, Client, Filter, Kind, Resource, Store, Stored, Tenant
from services.auth.stores import shapes
from services.mesh.policy import PolicyDocument, Role

_PAGE = 1000


async def every(store: Store, kind: Kind, filter_: Filter) -> AsyncIterator[Stored]:
    """All of a kind that pass the filter, a page at a time, sorted by id."""
    after_id = ""
    while True:
        page = await store.list(kind, filter_, limit=_PAGE, after_id=after_id)
        for stored in page:
            yield stored
        if len(page) < _PAGE:
            return
        after_id = shapes.key_of(page[-1].resource)[1]


async def projects_of(store: Store, tenant_id: str) -> list[str]:
    """The ids of a tenant's projects, disabled ones included."""
    return [
        stored.resource.tenant_id
        async for stored in every(store, Kind.TENANT, Filter())
        if isinstance(stored.resource, Tenant) and stored.resource.parent_id == tenant_id
    ]


class World:
    """Reads what it needs once; planned writes lie on top."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[shapes.Key, Stored | None] = {}
        self._planned: dict[shapes.Key, Resource | None] = {}
        self._roles: Mapping[str, Role] | None = None
        self._policy: PolicyDocument | None = None

    async def load(self, kind: Kind, filter_: Filter) -> list[Stored]:
        """Reads all of a kind at once."""
        found = [stored async for stored in every(self._store, kind, filter_)]
        for stored in found:
            self._read[shapes.key_of(stored.resource)] = stored
        return found

    async def stored(self, key: shapes.Key) -> Stored | None:
        """As it is kept now; without what is built in."""
        if key not in self._read:
            self._read[key] = await self._store.get(*key)
        return self._read[key]

    @property
    def planned(self) -> Mapping[shapes.Key, Resource | None]:
        """What will be other than it is; None: deleted."""
        return self._planned

    def plan(self, key: shapes.Key, resource: Resource | None) -> None:
        """None: it will be deleted."""
        self._planned[key] = resource

    async def after(self, key: shapes.Key) -> Resource | None:
        """As it will be; what is built in included."""
        if key in self._planned:
            return self._planned[key]
        return await self.before(key)

    async def before(self, key: shapes.Key) -> Resource | None:
        """As it is; what is built in included."""
        found = built_in(key[0]).get(key[1])
        if found is not None:
            return found
        stored = await self.stored(key)
        return None if stored is None else stored.resource

    async def tenant(self, tenant_id: str) -> Tenant:
        """As it will be; as it is, where it will be deleted. Raises NotFound."""
        key = (Kind.TENANT, tenant_id)
        found = await self.after(key) or await self.before(key)
        if not isinstance(found, Tenant):
            there_is_no(key)
        return found

    async def client(self, client_id: str) -> Client:
        """As `tenant`."""
        key = (Kind.CLIENT, client_id)
        found = await self.after(key) or await self.before(key)
        if not isinstance(found, Client):
            there_is_no(key)
        return found

    async def owner(self, resource: Resource) -> str:
        """The tenant that it belongs to; empty: it belongs to the deployment. Raises NotFound for a key of a
        client that does not exist."""
        client = await self.client(resource.client_id) if isinstance(resource, ApiKey) else None
        return shapes.tenant_of(resource, client)

    async def policy_before(self) -> PolicyDocument:
        """The policy in force."""
        if self._policy is None:
            _, self._policy = await self._store.policy()
        return self._policy

    async def roles_before(self) -> Mapping[str, Role]:
        """By id, what is built in included."""
        if self._roles is None:
            document = await self.policy_before()
            self._roles = {role.role_id: role for role in document.roles}
        return self._roles

    async def roles(self) -> Mapping[str, Role]:
        """As they will be."""
        found = dict(await self.roles_before())
        for (kind, role_id), resource in self._planned.items():
            if kind is Kind.ROLE:
                found.pop(role_id, None)
                if isinstance(resource, Role):
                    found[role_id] = resource
        return found

    async def projects(self, tenant_id: str) -> list[str]:
        """The ids of a tenant's projects as they are kept."""
        return await projects_of(self._store, tenant_id)
