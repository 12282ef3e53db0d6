"""On whose behalf a job runs: the stored identity, as far as auth lets it act today."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

from services.gateway.jobs.working.ports import RenewalPort
from services.gateway.ports import VerifierPort
from services.mesh.clock import Clock
from services.mesh.context import Caller, Identity
from services.mesh.errors import LlmosError, Status
from services.mesh.revocation import Revocation, RevocationList

MAX_ENTRIES = 10_000


@dataclass(slots=True)
class _Entry:
    identity: Identity
    """As stored."""
    token: str = ""
    until_s: float = 0.0
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class RenewedIdentities:
    """Asks auth, once for all jobs of one credential in `ttl_s`. What auth answers is a token, which is
    verified here each time as any caller's is; a revocation that names the stored identity ends it at
    once."""

    def __init__(
        self,
        auth: RenewalPort,
        verifier: VerifierPort,
        revoked: RevocationList,
        clock: Clock,
        *,
        ttl_s: float = 30.0,
    ) -> None:
        self._auth = auth
        self._verifier = verifier
        self._clock = clock
        self._ttl_s = ttl_s
        self._known: OrderedDict[Identity, _Entry] = OrderedDict()
        """Those least recently used first."""
        revoked.on_revoked(self._on_revoked)

    async def caller(self, identity: Identity) -> Caller:
        """Raises one of the UNAUTHENTICATED errors where it may act no more; DependencyUnavailable where
        auth has to be asked and does not answer."""
        entry = self._known.setdefault(identity, _Entry(identity))
        self._known.move_to_end(identity)
        while len(self._known) > MAX_ENTRIES:
            self._known.popitem(last=False)
        async with entry.asking:
            if entry.token and self._clock.monotonic() < entry.until_s:
                try:
                    return await self._verified(entry.token)
                except LlmosError as error:
                    if error.status is not Status.UNAUTHENTICATED:
                        raise
            entry.token = ""
            asked_s = self._clock.monotonic()
            token = await self._auth.renew(identity)
            caller = await self._verified(token)
            if self._known.get(identity) is entry:
                entry.token, entry.until_s = token, asked_s + self._ttl_s
            return caller

    async def _verified(self, token: str) -> Caller:
        verified = await self._verifier.verify(token)
        return Caller(verified.identity(), expires_at=verified.expires_at)

    def _on_revoked(self, revocation: Revocation) -> None:
        named = [
            identity
            for identity in self._known
            if revocation.refuses(
                token_id=identity.token_id,
                key_id=identity.key_id,
                client_id=identity.client_id,
                tenant_id=identity.tenant_id,
                issued_at_s=identity.issued_at_s,
            )
        ]
        for identity in named:
            del self._known[identity]
