"""Who calls the gateway: the authenticator of its chain, for both edges, and the guard of what is open.

Whoever sends wrong credentials again and again is slowed down (`services.mesh.slowdown`), before a key is
looked up or a signature checked. A credential that was accepted here is remembered and never slowed, also
from an address that is, and also once what it stood for has to be asked for anew.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Mapping

from services.gateway.keys import PREFIX, KeyRing, is_api_key
from services.gateway.ports import AuditPort
from services.mesh.actions import GET_JWKS, OPEN_METHODS
from services.mesh.context import Caller
from services.mesh.errors import CredentialInvalid, LlmosError
from services.mesh.interceptors import Call, Rest
from services.mesh.slowdown import Slowdown
from services.mesh.tokens import Verifier, bearer

_LOOKUP_CHARS = 8
"""So many characters after `llmos_` name an API key."""
PROVING_METHODS = OPEN_METHODS - {GET_JWKS}
"""Their requests hold a credential."""


class GatewayAuthenticator:
    """Takes an API key or an access token. Refusals are counted by source, and leave no record."""

    def __init__(
        self,
        verifier: Verifier,
        keys: KeyRing,
        audit: AuditPort,
        slowdown: Slowdown,
        *,
        max_accepted: int = 20_000,
    ) -> None:
        """`max_accepted`: so many accepted credentials are remembered, the least recently used go first."""
        self._verifier = verifier
        self._keys = keys
        self._audit = audit
        self._slowdown = slowdown
        self._accepted: OrderedDict[bytes, None] = OrderedDict()
        """By SHA-256 of the whole credential."""
        self._max_accepted = max_accepted

    async def __call__(self, method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        """Raises one of the UNAUTHENTICATED errors, PolicyDenied for a service's own token, RateLimit where
        too many were wrong, or DependencyUnavailable where auth must be asked and does not answer."""
        try:
            return await self._caller(bearer(metadata), source_address)
        except LlmosError as error:
            self._audit.count_anonymous(source_address, error.reason)
            raise

    async def _caller(self, credential: str, source_address: str) -> Caller:
        digest = hashlib.sha256(credential.encode("utf-8", "surrogatepass")).digest()
        if digest in self._accepted:
            self._accepted.move_to_end(digest)
            try:
                return await self._verified(credential)
            except CredentialInvalid:
                del self._accepted[digest]
                raise
        name = credential[len(PREFIX) : len(PREFIX) + _LOOKUP_CHARS] if is_api_key(credential) else ""
        with self._slowdown.attempt(source_address, name):
            caller = await self._verified(credential)
        self._accepted[digest] = None
        while len(self._accepted) > self._max_accepted:
            self._accepted.popitem(last=False)
        return caller

    async def _verified(self, credential: str) -> Caller:
        if is_api_key(credential):
            # When the key itself expires, auth alone knows.
            return Caller(await self._keys.identity(credential))
        verified = await self._verifier.verify(credential)
        return Caller(verified.identity(), expires_at=verified.expires_at)


class OpenMethodGuard:
    """Slows those down whose requests to open methods hold wrong credentials, as a link of the chain."""

    def __init__(self, audit: AuditPort, slowdown: Slowdown) -> None:
        self._audit = audit
        self._slowdown = slowdown

    def link(self, call: Call, rest: Rest) -> Awaitable[None]:
        """Raises RateLimit where the caller's address has to wait. Here the address alone counts; by the
        client's id auth counts (`services.auth.guard`)."""
        return self._proving(call, rest) if call.context.method in PROVING_METHODS else rest(call)

    async def _proving(self, call: Call, rest: Rest) -> None:
        source_address = call.context.source_address
        try:
            with self._slowdown.attempt(source_address):
                await rest(call)
        except LlmosError as error:
            self._audit.count_anonymous(source_address, error.reason)
            raise
