"""Who asks for administration, as the store knows it now: a token lives on for minutes after its client has
lost a scope, and administration must not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from msgspec import structs

from services.auth.administration.authority import Administrator
from services.auth.administration.world import projects_of
from services.auth.store import ApiKey, Kind, Store
from services.mesh.context import Identity
from services.mesh.errors import CredentialExpired, CredentialRevoked


@dataclass(frozen=True, slots=True)
class By:
    """Who asks, and by which request."""

    identity: Identity
    request_id: str = ""


async def administrator(
    store: Store, identity: Identity, now: datetime, *, with_projects: bool = True
) -> Administrator:
    """Raises CredentialRevoked or CredentialExpired where the credential would get no token any more, and
    ScopeMissing where its client is no administrator."""
    owned = await store.find_client(identity.client_id)
    if owned is None or owned.disabled or owned.tenant.tenant_id != identity.tenant_id:
        raise CredentialRevoked("The client that asks was disabled or deleted.")
    is_limited = False
    if identity.key_id:
        stored = await store.get(Kind.API_KEY, identity.key_id)
        key = stored.resource if stored is not None else None
        if not isinstance(key, ApiKey) or key.client_id != identity.client_id or key.disabled:
            raise CredentialRevoked("The API key was disabled or deleted.")
        if key.expires_at is not None and key.expires_at <= now:
            raise CredentialExpired("The API key has expired.")
        if key.scopes:
            identity = structs.replace(identity, scopes=identity.scopes & key.scopes)
        is_limited = bool(key.models)
    _, document = await store.policy()
    roles = {role.role_id: role for role in document.roles}
    found = Administrator.of(identity, owned.client, owned.tenant, roles, is_limited_to_models=is_limited)
    if found.tenants is None or not with_projects or owned.tenant.parent_id:
        return found
    projects = await projects_of(store, owned.tenant.tenant_id)
    return replace(found, tenants=found.tenants | set(projects))
