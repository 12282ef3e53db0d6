"""Proves a credential: whose is it, and is it still good?

An unknown client and a wrong secret end in one and the same error, after the same work. That something is
disabled is said only to those who have proven the credential: to all others it looks wrong. No error and no
log line repeats a credential.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.auth.credentials import keys
from services.auth.credentials.assertions import Assertions
from services.auth.credentials.last_use import LastUse
from services.auth.store import ApiKey, Client, Owned, Store
from services.mesh.access_token import SERVICE_PREFIX
from services.mesh.clock import Clock
from services.mesh.errors import CredentialExpired, CredentialInvalid, CredentialRevoked


@dataclass(frozen=True, slots=True)
class Proven:
    """Who has proven a credential that is in force."""

    client_id: str
    owned: Owned | None
    """None: one of the platform's services."""
    key: ApiKey | None = None
    """The API key that it was proven with."""


class Proofs:
    """`service_digests` are those of the services' secrets, by client id."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        assertions: Assertions,
        last_use: LastUse,
        service_digests: Mapping[str, bytes],
    ) -> None:
        self._store = store
        self._clock = clock
        self._assertions = assertions
        self._last_use = last_use
        self._service_digests = service_digests

    async def client(self, client_id: str, secret: str, assertion: str = "") -> Proven:
        """A client, by its secret, one of its API keys, or a JWT that it has signed (`assertion`, which comes
        in the place of the secret).

        Raises CredentialInvalid, CredentialExpired and CredentialRevoked.
        """
        if assertion:
            if secret:  # RFC 6749, section 2.3: one method in each request
                raise CredentialInvalid("A client proves itself in one way: by a secret or an assertion.")
            return await self._by_assertion(client_id, assertion)
        if client_id.startswith(SERVICE_PREFIX):
            stored = self._service_digests.get(client_id, keys.NO_DIGEST)
            if not keys.matches(stored, keys.digest(secret)):
                raise _wrong()
            return Proven(client_id, None)
        if keys.is_api_key(secret):
            return await self.api_key(secret, client_id)
        owned = await self._store.find_client(client_id)
        if not self._is_secret(None if owned is None else owned.client, secret) or owned is None:
            raise _wrong()
        return Proven(client_id, _enabled(owned))

    async def api_key(self, text: str, client_id: str | None = None) -> Proven:
        """The client of an API key; `client_id`: it must be this one.

        Raises as `client` does.
        """
        parsed = keys.parse_api_key(text)
        found = await self._store.find_api_key(parsed.prefix)
        stored = keys.NO_DIGEST if found is None else found[0].digest
        if not keys.matches(stored, parsed.digest) or found is None:
            raise _wrong() if client_id is not None else CredentialInvalid("The API key is not known.")
        key, owned = found
        if client_id is not None and owned.client.client_id != client_id:
            raise _wrong()
        if key.disabled:
            raise CredentialRevoked("The API key was revoked.")
        if key.expires_at is not None and key.expires_at <= self._clock.now():
            raise CredentialExpired("The API key has expired.", hint="Ask your administrator for a new key.")
        _enabled(owned)
        self._last_use.note(key.key_id)
        return Proven(owned.client.client_id, owned, key)

    async def _by_assertion(self, client_id: str, assertion: str) -> Proven:
        owned = None
        if not client_id.startswith(SERVICE_PREFIX):
            owned = await self._store.find_client(client_id)
        await self._assertions.prove(client_id, "" if owned is None else owned.client.jwks_json, assertion)
        if owned is None:
            raise _wrong()
        return Proven(client_id, _enabled(owned))

    def _is_secret(self, client: Client | None, secret: str) -> bool:
        """Whether it is the client's secret, or the one before while that works; compares twice."""
        given = keys.digest(secret)
        present = previous = keys.NO_DIGEST
        if client is not None:
            present = client.secret_digest or keys.NO_DIGEST
            if client.old_secret_until is not None and self._clock.now() < client.old_secret_until:
                previous = client.old_secret_digest or keys.NO_DIGEST
        is_present, is_previous = keys.matches(present, given), keys.matches(previous, given)
        return is_present or is_previous


def _enabled(owned: Owned) -> Owned:
    """For a credential that was proven."""
    if owned.disabled:
        what = "client" if owned.client.disabled else "tenant"
        raise CredentialRevoked(f"The {what} is disabled.")
    return owned


def _wrong() -> CredentialInvalid:
    return CredentialInvalid(
        "The client id or its secret is wrong.", hint="Check both; a secret is shown only when it is made."
    )
