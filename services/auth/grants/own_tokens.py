"""Our own tokens, as they are worth at this moment: what introspection says, and what can be exchanged.

Other services know of a revocation within seconds; here the store is asked, so that the answer is exact.
"""

from __future__ import annotations

from services.auth.store import ApiKey, Kind, Store
from services.mesh.access_token import Audience
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import CredentialRevoked
from services.mesh.jwks import KeySource
from services.mesh.revocation import Revocation, RevocationList
from services.mesh.tokens import VerifiedToken, Verifier

CACHE_MAX_ENTRIES = 1000


class OwnTokens:
    """Verifies tokens for any audience."""

    def __init__(self, store: Store, keys: KeySource, clock: Clock, *, issuer: str) -> None:
        self._store = store
        self._clock = clock
        self._verifier = Verifier(
            keys,
            issuer=issuer,
            audience=tuple(Audience),
            clock=clock,
            cache_max_entries=CACHE_MAX_ENTRIES,
        )
        self._revoked = RevocationList(clock)

    async def verify(self, token: str) -> VerifiedToken:
        """What a token says that is accepted now.

        Raises CredentialInvalid, CredentialExpired, and CredentialRevoked, also where the client, its tenant
        or its API key was disabled or deleted since.
        """
        verified = await self._verifier.verify(token)
        await self._catch_up()
        self._revoked.check(
            token_id=verified.token_id,
            key_id=verified.key_id,
            client_id=verified.client_id,
            tenant_id=verified.tenant_id,
            issued_at_s=verified.issued_at_s,
        )
        if not verified.is_service:
            await self._check_owner(verified)
        return verified

    async def check_not_revoked(self, identity: Identity, *, with_key: bool = True) -> None:
        """Raises CredentialRevoked where the identity's token, or what was issued up to then for its client
        or tenant, was revoked; `with_key`: or for its API key. Revocations are forgotten some minutes after
        the last token that they refuse has ended."""
        await self._catch_up()
        self._revoked.check(
            token_id=identity.token_id,
            key_id=identity.key_id if with_key else "",
            client_id=identity.client_id,
            tenant_id=identity.tenant_id,
            issued_at_s=identity.issued_at_s,
        )

    async def _check_owner(self, verified: VerifiedToken) -> None:
        owned = await self._store.find_client(verified.client_id)
        if owned is None or owned.disabled or owned.client.tenant_id != verified.tenant_id:
            raise CredentialRevoked("The client's credentials were revoked.")
        if verified.key_id:
            stored = await self._store.get(Kind.API_KEY, verified.key_id)
            key = None if stored is None else stored.resource
            if not isinstance(key, ApiKey) or key.disabled:
                raise CredentialRevoked("The API key was revoked.")

    async def _catch_up(self) -> None:
        found = await self._store.revocations(after_version=self._revoked.version, now=self._clock.now())
        if found:
            news = [
                Revocation(
                    kept.version,
                    kept.revoked.kind,
                    kept.revoked.subject_id,
                    kept.revoked.revoked_at,
                    kept.revoked.expires_at,
                )
                for kept in found
            ]
            self._revoked.apply(False, news[-1].version, news)
