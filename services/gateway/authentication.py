"""Who calls the gateway: the authenticator of its chain, for both edges."""

from __future__ import annotations

from collections.abc import Mapping

from services.gateway.keys import KeyRing, is_api_key
from services.gateway.ports import AuditPort
from services.mesh.context import Caller, Identity
from services.mesh.errors import LlmosError
from services.mesh.tokens import Verifier, bearer


class GatewayAuthenticator:
    """Takes an API key or an access token. Refusals are counted by source, and leave no record."""

    def __init__(self, verifier: Verifier, keys: KeyRing, audit: AuditPort) -> None:
        self._verifier = verifier
        self._keys = keys
        self._audit = audit

    async def __call__(self, method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        """Raises one of the UNAUTHENTICATED errors, PolicyDenied for a service's own token, or
        DependencyUnavailable where auth must be asked and does not answer."""
        try:
            return Caller(await self._identity(metadata))
        except LlmosError as error:
            self._audit.count_anonymous(source_address, error.reason)
            raise

    async def _identity(self, metadata: Mapping[str, str | bytes]) -> Identity:
        credential = bearer(metadata)
        if is_api_key(credential):
            return await self._keys.identity(credential)
        return (await self._verifier.verify(credential)).identity()
