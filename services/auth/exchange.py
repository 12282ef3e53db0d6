"""Proves a credential and exchanges it for a token.

An unknown client and a wrong secret end in one and the same error, after the same work: one query and one
comparison. No error and no log line repeats a credential.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from services.auth import keys, policy
from services.auth.store import ApiKey, Client, Store
from services.auth.tokens import Grant, TokenIssuer
from services.mesh.access_token import SERVICE_PREFIX, Audience
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import CredentialExpired, CredentialInvalid
from services.mesh.tokens import IssuedToken


class Exchange:
    """`service_digests` are those of the services' secrets, by client id."""

    def __init__(
        self, store: Store, issuer: TokenIssuer, clock: Clock, service_digests: Mapping[str, bytes]
    ) -> None:
        self._store = store
        self._issuer = issuer
        self._clock = clock
        self._service_digests = service_digests

    async def by_secret(
        self, client_id: str, secret: str, audience: Audience, wanted: Collection[str]
    ) -> tuple[IssuedToken, frozenset[str]]:
        """A token for a client that shows its secret, or one of its API keys, and the token's scopes.

        Raises CredentialInvalid, CredentialExpired, and what `policy.granted` raises.
        """
        if client_id.startswith(SERVICE_PREFIX):
            stored = self._service_digests.get(client_id, keys.NO_DIGEST)
            if not keys.matches(stored, keys.digest(secret)):
                raise _wrong()
            scopes = policy.granted(client_id, frozenset(), audience, wanted)
            return self._issuer.issue(Grant(client_id, audience, scopes)), scopes
        if keys.is_api_key(secret):
            key, client = await self._proven_key(secret)
            if client.client_id != client_id:
                raise _wrong()
            scopes = policy.granted(client_id, key.scopes & client.scopes, audience, wanted)
            return self._issuer.issue(_grant_of_key(key, client, audience, scopes)), scopes
        found = await self._store.find_client(client_id)
        stored = keys.NO_DIGEST if found is None else found.secret_digest
        if not keys.matches(stored, keys.digest(secret)) or found is None:
            raise _wrong()
        scopes = policy.granted(client_id, found.scopes, audience, wanted)
        return self._issuer.issue(Grant(client_id, audience, scopes, found.tenant_id)), scopes

    async def by_api_key(self, text: str) -> tuple[IssuedToken, Identity]:
        """A token for the gateway, and the identity that it asserts.

        Raises CredentialInvalid and CredentialExpired.
        """
        key, client = await self._proven_key(text)
        scopes = key.scopes & client.scopes
        token = self._issuer.issue(_grant_of_key(key, client, Audience.GATEWAY, scopes))
        return token, Identity(client.tenant_id, client.client_id, key.key_id, scopes)

    async def _proven_key(self, text: str) -> tuple[ApiKey, Client]:
        parsed = keys.parse_api_key(text)
        found = await self._store.find_api_key(parsed.prefix)
        stored = keys.NO_DIGEST if found is None else found[0].digest
        if not keys.matches(stored, parsed.digest) or found is None:
            raise CredentialInvalid("The API key is not known.")
        key, _ = found
        if key.expires_at is not None and key.expires_at <= self._clock.now():
            raise CredentialExpired("The API key has expired.", hint="Ask your administrator for a new key.")
        return found


def _grant_of_key(key: ApiKey, client: Client, audience: Audience, scopes: frozenset[str]) -> Grant:
    return Grant(client.client_id, audience, scopes, client.tenant_id, key.key_id, key.expires_at)


def _wrong() -> CredentialInvalid:
    return CredentialInvalid(
        "The client id or its secret is wrong.", hint="Check both; a secret is shown only when it is made."
    )
