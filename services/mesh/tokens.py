"""Credentials between the parts: verifying access tokens, having one's own, and telling who calls.

`Verifier` turns a token into what it says, or refuses it. `ServiceAuthenticator` is the authenticator of
services that only other services call. `ServiceTokens` holds this service's own tokens, one for each
audience. The form of a token is in `access_token`, the keys come from `jwks`, and `auth_client` speaks to
the auth service for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from google.protobuf.message import DecodeError
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from services.mesh.access_token import (
    ALGORITHM,
    MAX_LIFETIME_S,
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
    DependencyUnavailable,
    LlmosError,
    PolicyDenied,
)
from services.mesh.jwks import JwksCache, KeySource

__all__ = [
    "Audience",
    "IssuedToken",
    "JwksCache",
    "ServiceAuthenticator",
    "ServiceTokens",
    "TokenPort",
    "VerifiedToken",
    "Verifier",
    "asserted_identity",
    "bearer",
]

log = logging.getLogger(__name__)

LEEWAY_S = 5.0
"""How far the clocks of two machines may differ."""
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
    issued_at: datetime
    expires_at: datetime

    @property
    def is_service(self) -> bool:
        return self.subject.startswith(SERVICE_PREFIX)

    def identity(self) -> Identity:
        """The caller that the token names. Raises PolicyDenied for a service: it is nobody's caller."""
        if self.is_service:
            raise PolicyDenied("A service's own token cannot stand for a caller.")
        return Identity(self.tenant_id, self.client_id, self.key_id, self.scopes)


@dataclass(frozen=True, slots=True)
class _Cached:
    token: VerifiedToken
    kid: str
    end_s: float


class Verifier:
    """Verifies tokens for one audience, remembering what it has verified.

    The memory is keyed by a SHA-256 of the whole token, bounded by `cache_max_entries` (least recently
    used go first), and ends with the token or with the publication of its key.
    """

    def __init__(
        self,
        jwks: KeySource,
        *,
        issuer: str,
        audience: str,
        clock: Clock,
        cache_max_entries: int = 10_000,
        leeway_s: float = LEEWAY_S,
    ) -> None:
        self._jwks = jwks
        self._issuer = issuer
        self._audience = audience
        self._clock = clock
        self._cache: OrderedDict[bytes, _Cached] = OrderedDict()
        self._cache_max_entries = cache_max_entries
        self._leeway_s = leeway_s

    async def verify(self, token: str) -> VerifiedToken:
        """What the token says. Raises CredentialInvalid or CredentialExpired; where auth never answered
        since the start, so that nothing can be verified, DependencyUnavailable."""
        if len(token) > MAX_TOKEN_BYTES or not token.isascii():
            refuse("it is too long, or not ASCII")
        digest = hashlib.sha256(token.encode("ascii")).digest()
        found = self._cache.get(digest)
        if found is not None:
            return self._remembered(digest, found)
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
            issued_at=datetime.fromtimestamp(claims.issued_at, UTC),
            expires_at=datetime.fromtimestamp(claims.expires_at, UTC),
        )
        self._cache[digest] = _Cached(verified, kid, claims.expires_at + self._leeway_s)
        while len(self._cache) > self._cache_max_entries:
            self._cache.popitem(last=False)
        return verified

    def _remembered(self, digest: bytes, found: _Cached) -> VerifiedToken:
        if self._clock.now().timestamp() >= found.end_s:
            del self._cache[digest]
            raise _expired()
        if not self._jwks.knows(found.kid):
            del self._cache[digest]
            refuse("its key was withdrawn")
        self._cache.move_to_end(digest)
        return found.token

    def _check(self, claims: Claims) -> None:
        now_s = self._clock.now().timestamp()
        if claims.issuer != self._issuer:
            refuse("it is from another issuer")
        if claims.audience != self._audience:
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
    if not all(0 < len(name) <= 64 for name in names) or len(identity.scopes) > MAX_SCOPES:
        raise CredentialInvalid("The asserted identity is malformed.")
    return identity


class ServiceAuthenticator:
    """The authenticator of a service that only services call."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    async def __call__(self, method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        """Who calls. Raises what `bearer` and `Verifier.verify` raise, and PolicyDenied for non-services."""
        verified = await self._verifier.verify(bearer(metadata))
        if not verified.is_service:
            raise PolicyDenied("This service answers other services only; call the gateway.")
        return Caller(asserted_identity(metadata, verified), verified.subject)


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A token that was just made."""

    token: str
    expires_at: datetime


class TokenPort(Protocol):
    """Where this service's own tokens come from."""

    async def issue(self, audience: Audience) -> IssuedToken:
        """A new token. Ends within a deadline of its own; raises an LlmosError."""


@dataclass(slots=True)
class _Own:
    """This service's token for one audience."""

    token: str = ""
    renew_s: float = float("-inf")
    end_s: float = float("-inf")
    attempted_s: float = float("-inf")
    renewal: asyncio.Task[None] | None = None
    error: LlmosError | None = None


class ServiceTokens:
    """This service's own tokens, renewed at two thirds of their life, behind the caller's back.

    While auth is down the valid one stays in use. At most one renewal runs for each audience, and not more
    than one begins every `min_interval_s`.
    """

    def __init__(self, port: TokenPort, clock: Clock, *, min_interval_s: float = 1.0) -> None:
        self._port = port
        self._clock = clock
        self._min_interval_s = min_interval_s
        self._own = {audience: _Own() for audience in Audience}

    async def token(self, audience: str) -> str:
        """A token for the audience, one of `Audience`. Raises DependencyUnavailable where there is none
        and auth gives none."""
        own = self._own[Audience(audience)]
        now_s = self._clock.monotonic()
        if now_s < own.renew_s:
            return own.token
        renewal = self._renew(Audience(audience), own, now_s)
        if now_s < own.end_s:
            return own.token
        if renewal is not None:
            await asyncio.shield(renewal)
        if self._clock.monotonic() < own.end_s:
            return own.token
        raise DependencyUnavailable(
            "This service could not get a token of its own from the auth service.",
            retry_after_s=self._min_interval_s,
        ) from own.error

    async def close(self) -> None:
        """Ends renewals that run."""
        running = [own.renewal for own in self._own.values() if own.renewal and not own.renewal.done()]
        for renewal in running:
            renewal.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _renew(self, audience: Audience, own: _Own, now_s: float) -> asyncio.Task[None] | None:
        if own.renewal is not None and not own.renewal.done():
            return own.renewal
        if now_s - own.attempted_s < self._min_interval_s:
            return None
        own.attempted_s = now_s
        # a context of its own: the renewal belongs to no request, and must not carry a caller's identity
        own.renewal = asyncio.create_task(
            self._run_renewal(audience, own), name=f"token-{audience}", context=Context()
        )
        return own.renewal

    async def _run_renewal(self, audience: Audience, own: _Own) -> None:
        try:
            issued = await self._port.issue(audience)
            life_s = (issued.expires_at - self._clock.now()).total_seconds()
            if life_s <= 0:
                raise DependencyUnavailable(
                    "auth's tokens are expired on arrival: the clocks differ too much"
                )
        except LlmosError as error:
            if own.error is None:
                log.warning("no new token for %s, the present one stays in use: %s", audience, error)
            own.error = error
            return
        now_s = self._clock.monotonic()
        own.token = issued.token
        own.renew_s = now_s + life_s * 2 / 3
        own.end_s = now_s + life_s
        own.error = None
