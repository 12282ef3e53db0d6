"""Administration: making tenants, clients and keys. Who may do so is decided before, in `access`."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from services.auth import keys, policy
from services.auth.store import ApiKey, Client, Store, Tenant
from services.mesh.clock import Clock
from services.mesh.errors import NotFound, RequestInvalid, ScopeMissing, Violation


class Administration:
    """Secrets leave it once, in the answer that makes them."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create_tenant(self, tenant_id: str) -> None:
        """Raises AlreadyExists."""
        await self._store.create_tenant(Tenant(tenant_id, self._clock.now()))

    async def create_client(self, tenant_id: str, client_id: str, scopes: Collection[str]) -> str:
        """Returns its secret. Raises AlreadyExists, NotFound, and RequestInvalid for unknown scopes."""
        policy.check_scopes(scopes)
        secret = keys.new_client_secret()
        await self._store.create_client(
            Client(client_id, tenant_id, keys.digest(secret), frozenset(scopes), self._clock.now())
        )
        return secret

    async def create_api_key(
        self, client_id: str, scopes: Collection[str], expires_at: datetime | None
    ) -> tuple[str, str]:
        """Returns the key and its id; no scopes means all of the client's.

        Raises NotFound, ScopeMissing for a scope that the client lacks, and RequestInvalid for an unknown
        scope or an end in the past.
        """
        policy.check_scopes(scopes)
        now = self._clock.now()
        if expires_at is not None and expires_at <= now:
            raise RequestInvalid(
                "The key would have expired already.",
                violations=[Violation("expire_time", "must be in the future")],
            )
        client = await self._store.find_client(client_id)
        if client is None:
            raise NotFound("There is no such client.")
        missing = sorted(set(scopes) - client.scopes)
        if missing:
            raise ScopeMissing(f"The client lacks the scope `{missing[0]}`.", metadata={"scope": missing[0]})
        text = keys.new_api_key()
        key = keys.parse_api_key(text)
        key_id = keys.new_key_id()
        held = frozenset(scopes) or client.scopes
        await self._store.create_api_key(
            ApiKey(key_id, client_id, key.prefix, key.digest, held, now, expires_at)
        )
        return text, key_id
