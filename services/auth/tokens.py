"""Signing access tokens: JWTs of the RFC 9068 profile, as `services.mesh.access_token` describes them."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from joserfc import jws

from services.auth.signing import KeyRing
from services.mesh.access_token import ALGORITHM, TYPE, Audience
from services.mesh.clock import Clock
from services.mesh.errors import CredentialExpired
from services.mesh.tokens import IssuedToken


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token is to say."""

    client_id: str
    audience: Audience
    scopes: frozenset[str]
    tenant_id: str = ""
    """Empty for the platform's services."""
    key_id: str = ""
    """Empty where no API key was used."""
    not_after: datetime | None = None
    """The end of the credential: no token outlives it."""


class TokenIssuer:
    """Turns grants into tokens."""

    def __init__(self, ring: KeyRing, clock: Clock, *, issuer: str, ttl_s: int) -> None:
        self._ring = ring
        self._clock = clock
        self._issuer = issuer
        self._ttl_s = ttl_s

    def issue(self, grant: Grant) -> IssuedToken:
        """Raises CredentialExpired where the credential ends within the second."""
        issued = int(self._clock.now().timestamp())
        expires = issued + self._ttl_s
        if grant.not_after is not None:
            expires = min(expires, int(grant.not_after.timestamp()))
        if expires <= issued:
            raise CredentialExpired("The credential has expired.")
        claims: dict[str, str | int] = {
            "iss": self._issuer,
            "sub": grant.client_id,
            "aud": grant.audience.value,
            "exp": expires,
            "iat": issued,
            "jti": secrets.token_urlsafe(16),
            "client_id": grant.client_id,
            "scope": " ".join(sorted(grant.scopes)),
        }
        if grant.tenant_id:
            claims["tenant_id"] = grant.tenant_id
        if grant.key_id:
            claims["key_id"] = grant.key_id
        kid, key = self._ring.current()
        header = {"alg": ALGORITHM, "typ": TYPE, "kid": kid}
        token = jws.serialize_compact(
            header, json.dumps(claims, separators=(",", ":")), key, algorithms=[ALGORITHM]
        )
        return IssuedToken(token, datetime.fromtimestamp(expires, UTC))
