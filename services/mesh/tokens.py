"""Credentials between the parts: verifying access tokens, having one's own, and telling who calls.

`Verifier` turns a token into what it says, or refuses it. `ServiceAuthenticator` is the authenticator of
services that only other services call. The form of a token is in `access_token`, the keys come from `jwks`,
this service's own tokens from `service_tokens`, and `auth_client` speaks to the auth service for all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from google.protobuf.message import DecodeError
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from services.mesh.access_token import (
    ALGORITHM,
    MAX_LIFETIME_S,
    MAX_ROLES,
    MAX_SCOPES,
    MAX_TOKEN_BYTES,
    SERVICE_PREFIX,
    Audience,
    Claims,
    parse_claims,
    parse_kid,
    refuse,
)
from services.mesh.channel import IDENTITY_KEY, unpack_identity
from services.mesh.clock import Clock
from services.mesh.context import Caller, Identity
from services.mesh.errors import (
    CredentialExpired,
    CredentialInvalid,
    CredentialMissing,
    PolicyDenied,
)
from services.mesh.jwks import JwksCache, KeySource
from services.mesh.policy import Network
from services.mesh.service_tokens import IssuedToken, ServiceTokens, TokenPort

__all__ = [
    "Audience",
    "IssuedToken",
    "JwksCache",
    "RevocationCheck",
    "ServiceAuthenticator",
    "ServiceTokens",
    "TokenPort",
    "VerifiedToken",
    "Verifier",
    "asserted_identity",
    "bearer",
]

LEEWAY_S = 5.0
"""How far the clocks of two machines may differ."""
MAX_TOKEN_ID_CHARS = 256
GATEWAY = f"{SERVICE_PREFIX}gateway"


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """What a token says whose signature, issuer, audience and times have been checked."""

    subject: str
    client_id: str
    tenant_id: str
    """Empty for the platform's services."""
    key_id: str
    """Empty where no API key was used."""
    scopes: frozenset[str]
    audience: str
    issued_at_s: int
    """In seconds since the epoch."""
    expires_at: datetime
    token_id: str
    kid: str
    """Of the key that signed it."""
    roles: frozenset[str] = frozenset()
    direct_scopes: frozenset[str] | None = None
    """As in `Identity`, like the next two."""
    models: tuple[str, ...] = ()
    addresses: tuple[Network, ...] = ()

    @property
    def is_service(self) -> bool:
        return self.subject.startswith(SERVICE_PREFIX)

    def identity(self) -> Identity:
        """The caller that the token names. Raises PolicyDenied for a service: it is nobody's caller."""
        if self.is_service:
            raise PolicyDenied("A service's own token cannot stand for a caller.")
        return Identity(
            tenant_id=self.tenant_id,
            client_id=self.client_id,
            key_id=self.key_id,
            scopes=self.scopes,
            roles=self.roles,
            direct_scopes=self.direct_scopes,
            models=self.models,
            addresses=self.addresses,
            token_id=self.token_id,
            issued_at_s=self.issued_at_s,
        )


class RevocationCheck(Protocol):
    """Whether something was revoked that a token depends on; from memory, since every call asks it."""

    def __call__(
        self, *, token_id: str, key_id: str, client_id: str, tenant_id: str, issued_at_s: int
    ) -> None:
        """Raises CredentialRevoked. `issued_at_s` is in seconds since the epoch."""


class Verifier:
    """Verifies tokens for one audience, or for several, remembering what it has verified.

    The memory is keyed by a SHA-256 of the whole token, bounded by `cache_max_entries`, and ends with the
    token or with the publication of its key. What was remembered first goes first: it is about to expire
    anyway, and a use then changes nothing in the memory, which is dear where thousands take turns.
    """

    def __init__(
        self,
        jwks: KeySource,
        *,
        issuer: str,
        audience: str | Collection[str],
        clock: Clock,
        cache_max_entries: int = 10_000,
        leeway_s: float = LEEWAY_S,
        revoked: RevocationCheck | None = None,
    ) -> None:
        """`revoked` is asked for every token, remembered or not; None: none is ever revoked."""
        self._jwks = jwks
        self._issuer = issuer
        self._audiences = frozenset({audience} if isinstance(audience, str) else audience)
        self._clock = clock
        self._cache: OrderedDict[bytes, VerifiedToken] = OrderedDict()
        self._cache_max_entries = cache_max_entries
        self._leeway_s = leeway_s
        self._leeway = timedelta(seconds=leeway_s)
        self._revoked = revoked

    async def verify(self, token: str) -> VerifiedToken:
        """What the token says. Raises CredentialInvalid, CredentialExpired or CredentialRevoked; where auth
        never answered since the start, so that nothing can be verified, DependencyUnavailable."""
        if len(token) > MAX_TOKEN_BYTES or not token.isascii():
            refuse("it is too long, or not ASCII")
        digest = hashlib.sha256(token.encode("ascii")).digest()
        found = self._cache.get(digest)
        verified = await self._fresh(token, digest) if found is None else self._remembered(digest, found)
        if self._revoked is not None:
            self._revoked(
                token_id=verified.token_id,
                key_id=verified.key_id,
                client_id=verified.client_id,
                tenant_id=verified.tenant_id,
                issued_at_s=verified.issued_at_s,
            )
        return verified

    async def _fresh(self, token: str, digest: bytes) -> VerifiedToken:
        kid = parse_kid(token)
        key = await self._jwks.key(kid)
        if key is None:
            refuse("its key is not known")
        claims = parse_claims(_verified_payload(token, key))
        self._check(claims)
        verified = VerifiedToken(
            subject=claims.subject,
            client_id=claims.client_id,
            tenant_id=claims.tenant_id,
            key_id=claims.key_id,
            scopes=claims.scopes,
            audience=claims.audience,
            issued_at_s=claims.issued_at,
            expires_at=datetime.fromtimestamp(claims.expires_at, UTC),
            token_id=claims.token_id,
            kid=sys.intern(kid),  # one text for all tokens that are remembered
            roles=claims.roles,
            direct_scopes=claims.direct_scopes,
            models=claims.models,
            addresses=claims.addresses,
        )
        self._cache[digest] = verified
        while len(self._cache) > self._cache_max_entries:
            self._cache.popitem(last=False)
        return verified

    def _remembered(self, digest: bytes, found: VerifiedToken) -> VerifiedToken:
        if self._clock.now() - self._leeway >= found.expires_at:
            del self._cache[digest]
            raise _expired()
        if not self._jwks.knows(found.kid):
            del self._cache[digest]
            refuse("its key was withdrawn")
        return found

    def _check(self, claims: Claims) -> None:
        now_s = self._clock.now().timestamp()
        if claims.issuer != self._issuer:
            refuse("it is from another issuer")
        if claims.audience not in self._audiences:
            refuse("it is for another audience")
        if not 0 < claims.expires_at - claims.issued_at <= MAX_LIFETIME_S:
            refuse("its lifetime is not allowed")
        if max(claims.issued_at, claims.not_before) > now_s + self._leeway_s:
            refuse("it is not valid yet")
        if claims.expires_at + self._leeway_s <= now_s:
            raise _expired()


def _expired() -> CredentialExpired:
    return CredentialExpired("The access token has expired.")


def _verified_payload(token: str, key: OKPKey) -> bytes:
    payload: bytes | None = None
    # refused outside of the handler, so that no part of the token hangs on the error as its context
    with contextlib.suppress(JoseError, ValueError, TypeError, RecursionError):
        payload = jws.deserialize_compact(token, key, algorithms=[ALGORITHM]).payload
    if payload is None:
        refuse("its signature does not verify")
    return payload


def bearer(metadata: Mapping[str, str | bytes]) -> str:
    """The credential in the metadata entry `authorization` (RFC 6750, section 2.1).

    Raises CredentialMissing where there is none, CredentialInvalid where it is not a bearer credential.
    """
    value = metadata.get("authorization")
    if not value:
        raise CredentialMissing("No credential was sent.")
    if not isinstance(value, str):
        raise CredentialInvalid("The metadata entry `authorization` must be text.")
    scheme, _, credential = value.partition(" ")
    if scheme.lower() != "bearer" or not credential.strip():
        raise CredentialInvalid("The metadata entry `authorization` must be `Bearer` and a credential.")
    return credential.strip()


def asserted_identity(metadata: Mapping[str, str | bytes], verified: VerifiedToken) -> Identity | None:
    """The caller that the gateway asserts, or None. From any other peer the entry means nothing."""
    value = metadata.get(IDENTITY_KEY)
    if value is None or verified.subject != GATEWAY:
        return None
    if not isinstance(value, bytes):
        raise CredentialInvalid("The asserted identity is malformed.")
    try:
        identity = unpack_identity(value)
    except DecodeError:
        raise CredentialInvalid("The asserted identity is malformed.") from None
    # the rules of identity.proto, by hand: this is on the path of every call
    names = (identity.tenant_id, identity.client_id)
    if (
        not all(0 < len(name) <= 64 for name in names)
        or len(identity.scopes) > MAX_SCOPES
        or len(identity.roles) > MAX_ROLES
        or len(identity.token_id) > MAX_TOKEN_ID_CHARS
    ):
        raise CredentialInvalid("The asserted identity is malformed.")
    return identity


class ServiceAuthenticator:
    """The authenticator of a service that only services call."""

    def __init__(self, verifier: Verifier, revoked: Callable[[Identity], None] | None = None) -> None:
        """`revoked` is asked for each asserted identity, and raises CredentialRevoked; None: none ever is."""
        self._verifier = verifier
        self._revoked = revoked

    async def __call__(self, method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        """Who calls. Raises what `bearer` and `Verifier.verify` raise, CredentialRevoked where the caller's
        credential was revoked, and PolicyDenied for non-services."""
        verified = await self._verifier.verify(bearer(metadata))
        if not verified.is_service:
            raise PolicyDenied("This service answers other services only; call the gateway.")
        identity = asserted_identity(metadata, verified)
        if identity is not None and self._revoked is not None:
            self._revoked(identity)
        return Caller(identity, verified.subject)
