"""People of a corporate identity provider, as clients of ours: made by their first token exchange."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from typing import Protocol

from services.auth.providers.provider_tokens import ProvenPerson
from services.auth.store import Batch, Client, Kind, Owned, Put, Store
from services.mesh import context as request_context
from services.mesh.clock import Clock
from services.mesh.errors import AlreadyExists, Conflict, CredentialRevoked, NotFound, PolicyDenied

USER_PREFIX = "user:"
"""Begins the client ids of people of identity providers."""
_ID_CHARS = 26
_ATTEMPTS = 3
_NOTE = "token exchange"


class ProviderPort(Protocol):
    """The identity providers that are configured."""

    async def verify(self, token: str) -> ProvenPerson:
        """Whom an ID token, or another JWT, of a provider stands for.

        Raises CredentialInvalid, CredentialExpired, PolicyDenied where the person is mapped to no role, and
        DependencyUnavailable where the provider's keys cannot be had.
        """


def client_id_of(issuer: str, subject: str) -> str:
    """`user:` and 130 bits of a SHA-256: one person is one client for ever, and the id does not tell who."""
    digest = hashlib.sha256(f"{issuer} {subject}".encode("utf-8", "surrogatepass")).digest()
    return USER_PREFIX + base64.b32encode(digest).decode("ascii").lower()[:_ID_CHARS]


class People:
    """Makes the clients of people, and keeps their roles as the provider says."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def client(self, person: ProvenPerson) -> Owned:
        """The client of a person.

        Raises CredentialRevoked where it, or what it belongs to, is disabled, PolicyDenied where it is of
        another tenant than the provider's people now are, and what `Store.commit` raises.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return await self._as_mapped(person)
            except (AlreadyExists, Conflict, NotFound):
                # another exchange of the same person, or an administrator, was faster
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    async def _as_mapped(self, person: ProvenPerson) -> Owned:
        client_id = client_id_of(person.provider.issuer, person.subject)
        stored = await self._store.get(Kind.CLIENT, client_id)
        if stored is None:
            await self._put(_new(client_id, person), None)
        else:
            client = stored.resource
            if not isinstance(client, Client) or client.tenant_id != person.provider.tenant_id:
                raise PolicyDenied("This person belongs to another tenant.")
            if not client.disabled:
                mapped = replace(client, roles=person.roles)
                if person.display_name:
                    mapped = replace(mapped, display_name=person.display_name)
                if mapped != client:
                    await self._put(mapped, stored.version)
        owned = await self._store.find_client(client_id)
        if owned is None:
            raise Conflict("The client was deleted meanwhile.")
        if owned.disabled:
            raise CredentialRevoked("This person's access was withdrawn.")
        return owned

    async def _put(self, client: Client, expected_version: int | None) -> None:
        request = request_context.current()
        put = Put(client, create=expected_version is None, expected_version=expected_version, note=_NOTE)
        await self._store.commit(
            Batch(
                at=self._clock.now(),
                actor="service:auth",
                request_id="" if request is None else request.request_id,
                writes=[put],
            )
        )


def _new(client_id: str, person: ProvenPerson) -> Client:
    provider = person.provider
    return Client(
        client_id,
        provider.tenant_id,
        is_user=True,
        display_name=person.display_name,
        roles=person.roles,
        external_subject=f"{provider.provider_id} {person.subject}",
    )
