"""What a token is worth (RFC 7662), and making it worth nothing (RFC 7009)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from services.auth.credentials import keys
from services.auth.credentials.proof import Proofs, Proven
from services.auth.grants.exchange import Exchange
from services.auth.grants.own_tokens import OwnTokens
from services.auth.store import Batch, NewRevocation, Store
from services.mesh import context as request_context
from services.mesh.access_token import SERVICE_PREFIX
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import (
    CredentialExpired,
    CredentialInvalid,
    CredentialRevoked,
    PolicyDenied,
    RequestInvalid,
    Violation,
)
from services.mesh.policy import ADMIN, RevocationKind
from services.mesh.tokens import LEEWAY_S, VerifiedToken

_INACTIVE = (CredentialInvalid, CredentialExpired, CredentialRevoked)


@dataclass(frozen=True, slots=True)
class ClientProof:
    """How a client proves itself: by one of the two."""

    client_id: str
    secret: str = ""
    assertion: str = ""


@dataclass(frozen=True, slots=True)
class Introspected:
    """What the asker is told."""

    token: VerifiedToken | None
    """None: it is not active, or none of the asker's business; nothing else is said."""
    asked_by: Identity | None
    """None: one of the platform's services."""


class Introspection:
    """Both of them."""

    def __init__(
        self, store: Store, proofs: Proofs, tokens: OwnTokens, exchange: Exchange, clock: Clock
    ) -> None:
        self._store = store
        self._proofs = proofs
        self._tokens = tokens
        self._exchange = exchange
        self._clock = clock

    async def introspect(self, client: ClientProof, token: str) -> Introspected:
        """What the token is worth now. Of other tenants' tokens only an administrator (scope `admin`) or a
        service is told.

        Raises what `Proofs.client` raises; of the token it raises nothing.
        """
        proven = await self._proofs.client(client.client_id, client.secret, client.assertion)
        asked_by = await self._identity(proven)
        try:
            verified = await self._tokens.verify(token)
        except _INACTIVE:
            return Introspected(None, asked_by)
        may_know = asked_by is None or ADMIN in asked_by.scopes or verified.tenant_id == asked_by.tenant_id
        return Introspected(verified if may_know else None, asked_by)

    async def revoke(self, client: ClientProof, token: str) -> Identity | None:
        """Refuses the token from now on, and says who asked. One that is not accepted anyway is no error (RFC
        7009, section 2.2).

        Raises what `Proofs.client` raises; PolicyDenied where the token was issued to another client (section
        2.1), and RequestInvalid for an API key, which only an administrator revokes.
        """
        proven = await self._proofs.client(client.client_id, client.secret, client.assertion)
        asked_by = await self._identity(proven)
        if keys.is_api_key(token):
            raise RequestInvalid(
                "An API key is not revoked here.",
                hint="Ask your administrator to revoke it.",
                violations=[Violation("token", "must be an access token")],
            )
        try:
            verified = await self._tokens.verify(token)
        except _INACTIVE:
            return asked_by
        if verified.client_id != proven.client_id:
            raise PolicyDenied("The token was issued to another client.")
        now = self._clock.now()
        request = request_context.current()
        revocation = NewRevocation(
            RevocationKind.TOKEN,
            verified.token_id,
            revoked_at=now,
            # verifiers forgive clocks that differ, and accept it for so much longer
            expires_at=verified.expires_at + timedelta(seconds=2 * LEEWAY_S),
        )
        await self._store.commit(
            Batch(
                at=now,
                actor=_actor(proven),
                request_id="" if request is None else request.request_id,
                revocations=[revocation],
            )
        )
        return asked_by

    async def _identity(self, proven: Proven) -> Identity | None:
        """Who asks; with the scopes that count without condition, since no request of theirs is decided."""
        owned, key = proven.owned, proven.key
        if owned is None:
            return None
        scopes = (await self._exchange.reach(owned)).unconditional
        return Identity(
            tenant_id=owned.tenant.tenant_id,
            client_id=proven.client_id,
            key_id="" if key is None else key.key_id,
            scopes=scopes & key.scopes if key is not None and key.scopes else scopes,
            roles=owned.client.roles,
        )


def _actor(proven: Proven) -> str:
    if proven.client_id.startswith(SERVICE_PREFIX) or proven.owned is None:
        return proven.client_id
    return f"{proven.owned.tenant.tenant_id}/{proven.client_id}"
