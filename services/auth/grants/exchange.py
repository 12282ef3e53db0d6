"""Exchanges a proven credential for a token: client credentials (RFC 6749, section 4.4), API keys, our own
tokens and those of corporate identity providers (RFC 8693)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto

from services.auth.credentials.proof import Proofs, Proven
from services.auth.grants import policy
from services.auth.grants.own_tokens import OwnTokens
from services.auth.grants.people import People, ProviderPort
from services.auth.grants.tokens import Grant, SignedToken, TokenIssuer
from services.auth.store import Kind, Owned, Store
from services.mesh.access_token import Audience
from services.mesh.clock import Clock
from services.mesh.errors import CredentialInvalid
from services.mesh.policy import BUILT_IN_ROLES, Role

_BUILT_IN = {role.role_id: role for role in BUILT_IN_ROLES}


class SubjectKind(Enum):
    """What is exchanged."""

    API_KEY = auto()
    ACCESS_TOKEN = auto()
    """One of ours, for the gateway."""
    JWT = auto()
    """An ID token, or another JWT, of a corporate identity provider."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What a client can reach at all."""

    scopes: frozenset[str]
    unconditional: frozenset[str]
    """Those of them that hang on no rule."""
    roles: frozenset[str]
    """Those of its roles that count in its tenant."""


class Exchange:
    """`providers`: None where this deployment has no corporate identity provider."""

    def __init__(
        self,
        store: Store,
        proofs: Proofs,
        tokens: OwnTokens,
        issuer: TokenIssuer,
        clock: Clock,
        providers: ProviderPort | None = None,
    ) -> None:
        self._store = store
        self._proofs = proofs
        self._tokens = tokens
        self._issuer = issuer
        self._clock = clock
        self._people = People(store, clock)
        self._providers = providers

    async def by_secret(
        self,
        client_id: str,
        secret: str,
        audience: Audience,
        wanted: Collection[str],
        *,
        assertion: str = "",
    ) -> SignedToken:
        """A token for a client that shows its secret, one of its API keys, or a JWT that it has signed.

        Raises what `Proofs.client` raises, and then what `policy.granted` raises.
        """
        asked_at = self._clock.now()
        proven = await self._proofs.client(client_id, secret, assertion)
        return await self._issued(proven, audience, wanted, asked_at)

    async def by_api_key(
        self, text: str, audience: Audience = Audience.GATEWAY, wanted: Collection[str] = ()
    ) -> SignedToken:
        """A token for whoever has the key. Raises as `by_secret` does."""
        asked_at = self._clock.now()
        return await self._issued(await self._proofs.api_key(text), audience, wanted, asked_at)

    async def exchange(
        self, subject_token: str, kind: SubjectKind, audience: Audience, wanted: Collection[str]
    ) -> SignedToken:
        """A token in the place of another credential (RFC 8693, section 2).

        Raises CredentialInvalid, CredentialExpired, CredentialRevoked, what `policy.granted` raises, and what
        `ProviderPort.verify` raises.
        """
        if kind is SubjectKind.API_KEY:
            return await self.by_api_key(subject_token, audience, wanted)
        if kind is SubjectKind.ACCESS_TOKEN:
            return await self._narrowed(subject_token, audience, wanted)
        if self._providers is None:
            raise CredentialInvalid("No identity provider is configured here.")
        person = await self._providers.verify(subject_token)
        asked_at = self._clock.now()
        owned = await self._people.client(person)
        return await self._issued(Proven(owned.client.client_id, owned), audience, wanted, asked_at)

    async def reach(self, owned: Owned) -> Reach:
        """The scopes that a client could use, under whatever conditions, and the roles that count for it."""
        tenants = {"", owned.tenant.tenant_id, owned.tenant.parent_id}
        roles = [role for role in await self._roles(owned.client.roles) if role.tenant_id in tenants]
        return Reach(
            policy.reachable(owned.client.scopes, roles),
            owned.client.scopes.union(*(role.scopes for role in roles)),
            frozenset(role.role_id for role in roles),
        )

    async def _issued(
        self, proven: Proven, audience: Audience, wanted: Collection[str], asked_at: datetime
    ) -> SignedToken:
        owned, key = proven.owned, proven.key
        if owned is None:
            scopes = policy.granted(proven.client_id, frozenset(), audience, wanted)
            return self._issuer.issue(Grant(proven.client_id, audience, scopes))
        reach = await self.reach(owned)
        held = reach.scopes & key.scopes if key is not None and key.scopes else reach.scopes
        scopes = policy.granted(proven.client_id, held, audience, wanted)
        return self._issuer.issue(
            Grant(
                proven.client_id,
                audience,
                scopes,
                tenant_id=owned.tenant.tenant_id,
                key_id="" if key is None else key.key_id,
                not_after=None if key is None else key.expires_at,
                roles=reach.roles,
                direct_scopes=owned.client.scopes & scopes,
                models=() if key is None else key.models,
                addresses=() if key is None else key.addresses,
            ),
            asked_at,
        )

    async def _narrowed(self, token: str, audience: Audience, wanted: Collection[str]) -> SignedToken:
        """One that says the same of fewer scopes, and ends when the first one does."""
        asked_at = self._clock.now()
        verified = await self._tokens.verify(token)
        identity = verified.identity()
        if verified.audience != Audience.GATEWAY:
            raise CredentialInvalid("Only tokens for the gateway can be exchanged.")
        scopes = policy.granted(identity.client_id, identity.scopes, audience, wanted)
        direct = scopes if identity.direct_scopes is None else identity.direct_scopes & scopes
        return self._issuer.issue(
            Grant(
                identity.client_id,
                audience,
                scopes,
                tenant_id=identity.tenant_id,
                key_id=identity.key_id,
                not_after=verified.expires_at,
                roles=identity.roles,
                direct_scopes=direct,
                models=identity.models,
                addresses=identity.addresses,
            ),
            asked_at,
        )

    async def _roles(self, role_ids: Iterable[str]) -> list[Role]:
        found = []
        for role_id in sorted(role_ids):
            role = _BUILT_IN.get(role_id)
            if role is None:
                stored = await self._store.get(Kind.ROLE, role_id)
                role = stored.resource if stored is not None and isinstance(stored.resource, Role) else None
            if role is not None:
                found.append(role)
        return found
