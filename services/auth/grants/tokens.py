"""Signing access tokens: JWTs of the RFC 9068 profile, as `services.mesh.access_token` describes them."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from joserfc import jws

from services.auth.signing.ring import KeyRing
from services.mesh.access_token import ALGORITHM, MAX_TOKEN_BYTES, TYPE, Audience
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import CredentialExpired, StateConflict
from services.mesh.policy import Network
from services.mesh.service_tokens import IssuedToken


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token is to say."""

    client_id: str
    audience: Audience
    scopes: frozenset[str]
    """The most that it allows."""
    tenant_id: str = ""
    """Empty for the platform's services."""
    key_id: str = ""
    """Empty where no API key was used."""
    not_after: datetime | None = None
    """The end of the credential: no token outlives it."""
    roles: frozenset[str] = frozenset()
    direct_scopes: frozenset[str] = frozenset()
    """What of `scopes` does not depend on the roles; said only where there are roles."""
    models: tuple[str, ...] = ()
    addresses: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class SignedToken(IssuedToken):
    """A token that was just signed, and what it says."""

    scopes: frozenset[str]
    identity: Identity | None
    """None for a service's own."""


class TokenIssuer:
    """Turns grants into tokens."""

    def __init__(self, ring: KeyRing, clock: Clock, *, issuer: str, ttl_s: int, service_ttl_s: int) -> None:
        """`ttl_s`: how long a caller's token lives, `service_ttl_s` a service's own."""
        self._ring = ring
        self._clock = clock
        self._issuer = issuer
        self._ttl_s = ttl_s
        self._service_ttl_s = service_ttl_s

    def issue(self, grant: Grant, asked_at: datetime | None = None) -> SignedToken:
        """The token says that it was issued at `asked_at`, where that is given: a moment before the
        credential was read. Were it the present, a token whose credential is revoked in between would look
        newer than the revocation, which would not refuse it.

        Raises CredentialExpired where the credential ends within the second, and StateConflict where
        its roles and limits are so many that no verifier would take the token."""
        issued = int((asked_at or self._clock.now()).timestamp())
        expires = issued + (self._ttl_s if grant.tenant_id else self._service_ttl_s)
        if grant.not_after is not None:
            expires = min(expires, int(grant.not_after.timestamp()))
        if expires <= issued:
            raise CredentialExpired("The credential has expired.")
        token_id = secrets.token_urlsafe(16)
        claims: dict[str, Any] = {
            "iss": self._issuer,
            "sub": grant.client_id,
            "aud": grant.audience.value,
            "exp": expires,
            "iat": issued,
            "jti": token_id,
            "client_id": grant.client_id,
            "scope": _joined(grant.scopes),
        }
        if grant.tenant_id:
            claims["tenant_id"] = grant.tenant_id
        if grant.key_id:
            claims["key_id"] = grant.key_id
        if grant.roles:
            claims["roles"] = sorted(grant.roles)
            claims["direct_scope"] = _joined(grant.direct_scopes)
        if grant.models:
            claims["models"] = sorted(set(grant.models))
        if grant.addresses:
            claims["addresses"] = sorted({str(network) for network in grant.addresses})
        token = self._signed(claims)
        identity = None
        if grant.tenant_id:
            identity = Identity(
                tenant_id=grant.tenant_id,
                client_id=grant.client_id,
                key_id=grant.key_id,
                scopes=grant.scopes,
                roles=grant.roles,
                direct_scopes=grant.direct_scopes if grant.roles else None,
                models=tuple(claims.get("models", ())),
                addresses=tuple(sorted(set(grant.addresses), key=str)),
                token_id=token_id,
                issued_at_s=issued,
            )
        return SignedToken(token, datetime.fromtimestamp(expires, UTC), grant.scopes, identity)

    def _signed(self, claims: dict[str, Any]) -> str:
        kid, key = self._ring.current()
        header = {"alg": ALGORITHM, "typ": TYPE, "kid": kid}
        payload = json.dumps(claims, separators=(",", ":"), ensure_ascii=False)
        token = jws.serialize_compact(header, payload, key, algorithms=[ALGORITHM])
        if len(token) > MAX_TOKEN_BYTES:
            raise StateConflict(
                "The roles and limits of this credential do not fit into a token.",
                hint="Give the client fewer roles, or the API key fewer models and addresses.",
            )
        return token


def _joined(scopes: frozenset[str]) -> str:
    return " ".join(sorted(scopes))
