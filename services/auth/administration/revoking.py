"""Which tokens a change refuses, so that what was taken away is gone within seconds. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from services.auth.store import ApiKey, Client, NewRevocation, Resource, Tenant
from services.mesh.access_token import MAX_LIFETIME_S
from services.mesh.policy import Effect, RevocationKind, Role

MARGIN_S = 60
"""Clocks differ, and a verifier takes a token for a moment longer."""


def revocation(kind: RevocationKind, subject_id: str, now: datetime, *, cut_streams: bool) -> NewRevocation:
    """Refuses what was issued up to now, until the last of it has ended by itself."""
    return NewRevocation(
        kind, subject_id, now, now + timedelta(seconds=MAX_LIFETIME_S + MARGIN_S), cut_streams
    )


def subjects(
    before: Resource, after: Resource | None, roles: Mapping[str, Role], projects: Iterable[str]
) -> list[tuple[RevocationKind, str]]:
    """Whose tokens a change, or the deletion, of `before` refuses; `projects` are those of a tenant."""
    match before:
        case Tenant():
            now = after if isinstance(after, Tenant) else None
            if now is None or (now.disabled and not before.disabled):
                ids = (before.tenant_id, *projects)
                return [(RevocationKind.TENANT, tenant_id) for tenant_id in ids]
        case Client():
            if takes_away(before, after if isinstance(after, Client) else None, roles):
                return [(RevocationKind.CLIENT, before.client_id)]
        case ApiKey():
            if narrows(before, after if isinstance(after, ApiKey) else None):
                return [(RevocationKind.API_KEY, before.key_id)]
        case _:
            pass
    return []


def takes_away(before: Client, after: Client | None, roles: Mapping[str, Role]) -> bool:
    """Whether a token of the client might allow what the client may no longer do."""
    if after is None or (after.disabled and not before.disabled):
        return True
    denying = {
        role.role_id for role in roles.values() if any(rule.effect is Effect.DENY for rule in role.rules)
    }
    added = after.roles - before.roles
    return not (before.scopes <= after.scopes and before.roles <= after.roles) or bool(added & denying)


def narrows(before: ApiKey, after: ApiKey | None) -> bool:
    """Whether a token of the key might allow what the key no longer does. Any change of its limits counts."""
    if after is None or (after.disabled and not before.disabled):
        return True
    ends_sooner = after.expires_at is not None and (
        before.expires_at is None or after.expires_at < before.expires_at
    )
    limits = (before.scopes, before.models, before.addresses)
    return ends_sooner or limits != (after.scopes, after.models, after.addresses)
