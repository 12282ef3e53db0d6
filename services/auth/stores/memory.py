"""A store in memory: for tests, and as the plainest reading of the port."""

from __future__ import annotations

from collections.abc import Sequence

from services.auth.store import ApiKey, Client, SigningKey, Tenant
from services.mesh.errors import AlreadyExists, NotFound


class MemoryStore:
    """Forgets everything when the process ends."""

    def __init__(self) -> None:
        self._tenants: dict[str, Tenant] = {}
        self._clients: dict[str, Client] = {}
        self._keys: dict[str, ApiKey] = {}
        self._signing: dict[str, SigningKey] = {}

    async def start(self) -> None:
        """Nothing to open."""

    async def stop(self) -> None:
        """Nothing to close."""

    async def is_empty(self) -> bool:
        return not self._tenants

    async def create_first(self, tenant: Tenant, client: Client, key: ApiKey) -> None:
        if self._tenants:
            raise AlreadyExists("The store is not empty.")
        await self.create_tenant(tenant)
        await self.create_client(client)
        await self.create_api_key(key)

    async def create_tenant(self, tenant: Tenant) -> None:
        if tenant.tenant_id in self._tenants:
            raise AlreadyExists("A tenant of this id exists.")
        self._tenants[tenant.tenant_id] = tenant

    async def create_client(self, client: Client) -> None:
        if client.client_id in self._clients:
            raise AlreadyExists("A client of this id exists.")
        if client.tenant_id not in self._tenants:
            raise NotFound("There is no such tenant.")
        self._clients[client.client_id] = client

    async def find_client(self, client_id: str) -> Client | None:
        return self._clients.get(client_id)

    async def create_api_key(self, key: ApiKey) -> None:
        if key.prefix in self._keys or any(other.key_id == key.key_id for other in self._keys.values()):
            raise AlreadyExists("An API key of this id exists.")
        if key.client_id not in self._clients:
            raise NotFound("There is no such client.")
        self._keys[key.prefix] = key

    async def find_api_key(self, prefix: str) -> tuple[ApiKey, Client] | None:
        key = self._keys.get(prefix)
        return None if key is None else (key, self._clients[key.client_id])

    async def signing_keys(self) -> Sequence[SigningKey]:
        return sorted(self._signing.values(), key=lambda key: (key.signs_from, key.kid))

    async def put_signing_key(self, key: SigningKey) -> None:
        self._signing[key.kid] = key

    async def delete_signing_key(self, kid: str) -> None:
        self._signing.pop(kid, None)
