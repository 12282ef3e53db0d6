"""A token for somebody who is known by identity only, since the request waited: a job that runs now.

No credential is shown, so only the gateway may ask, which checked one when the job was submitted. The store
says what that credential is worth today: nothing, as much as then, or less, but never more.
"""

from __future__ import annotations

from services.auth.grants.exchange import Exchange
from services.auth.grants.own_tokens import OwnTokens
from services.auth.grants.tokens import Grant, SignedToken, TokenIssuer
from services.auth.store import ApiKey, Kind, Owned, Store
from services.mesh.access_token import SERVICE_PREFIX, Audience
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import CredentialExpired, CredentialInvalid, CredentialRevoked


class Renewal:
    """Renews what was proven once."""

    def __init__(
        self, store: Store, exchange: Exchange, tokens: OwnTokens, issuer: TokenIssuer, clock: Clock
    ) -> None:
        self._store = store
        self._exchange = exchange
        self._tokens = tokens
        self._issuer = issuer
        self._clock = clock

    async def renew(self, identity: Identity) -> SignedToken:
        """A token for the gateway, with those of the identity's scopes that its client can reach today, and
        with today's roles and limits of its API key.

        Raises CredentialRevoked where the client, its tenant or its key was revoked, disabled or deleted
        since, or the token that the identity came with was revoked; CredentialExpired where the key has
        expired; CredentialInvalid for what never can have been a caller of the gateway.
        """
        asked_at = self._clock.now()
        if identity.client_id.startswith(SERVICE_PREFIX):
            raise CredentialInvalid("A service is nobody's caller.")
        owned = await self._owned(identity)
        key = await self._key(identity) if identity.key_id else None
        # A key's own revocations say only that tokens are old: what the key is worth today was just read.
        await self._tokens.check_not_revoked(identity, with_key=False)
        reach = await self._exchange.reach(owned)
        scopes = identity.scopes & reach.scopes
        if key is not None and key.scopes:
            scopes &= key.scopes
        return self._issuer.issue(
            Grant(
                identity.client_id,
                Audience.GATEWAY,
                scopes,
                tenant_id=owned.tenant.tenant_id,
                key_id=identity.key_id,
                not_after=None if key is None else key.expires_at,
                roles=reach.roles,
                direct_scopes=owned.client.scopes & scopes,
                models=() if key is None else key.models,
                addresses=() if key is None else key.addresses,
            ),
            asked_at,
        )

    async def _owned(self, identity: Identity) -> Owned:
        owned = await self._store.find_client(identity.client_id)
        if owned is None:
            raise CredentialRevoked("The client was deleted.")
        if owned.client.tenant_id != identity.tenant_id:
            raise CredentialInvalid("The client belongs to another tenant.")
        if owned.disabled:
            what = "client" if owned.client.disabled else "tenant"
            raise CredentialRevoked(f"The {what} is disabled.")
        return owned

    async def _key(self, identity: Identity) -> ApiKey:
        stored = await self._store.get(Kind.API_KEY, identity.key_id)
        key = None if stored is None else stored.resource
        if not isinstance(key, ApiKey):
            raise CredentialRevoked("The API key was deleted.")
        if key.client_id != identity.client_id:
            raise CredentialInvalid("The API key belongs to another client.")
        if key.disabled:
            raise CredentialRevoked("The API key was revoked.")
        if key.expires_at is not None and key.expires_at <= self._clock.now():
            raise CredentialExpired("The API key has expired.", hint="Ask your administrator for a new key.")
        return key
