"""The auth service without its process: real parts over the store in memory, on a clock that is moved."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from services.auth import keys
from services.auth.access import AccessControl
from services.auth.admin import Administration
from services.auth.exchange import Exchange
from services.auth.policy import SERVICES
from services.auth.signing import KeyRing
from services.auth.stores.memory import MemoryStore
from services.auth.tokens import TokenIssuer
from services.mesh.clock import ManualClock
from services.mesh.tokens import Audience, VerifiedToken, Verifier

ISSUER = "https://auth.example"
SERVICE_SECRETS = {f"service:{name}": f"secret-of-{name}-".ljust(40, "x") for name in SERVICES}


@dataclass
class Auth:
    """The parts, put together as in app.py."""

    clock: ManualClock
    store: MemoryStore
    ring: KeyRing
    exchange: Exchange
    administration: Administration
    access: AccessControl

    async def verify(self, token: str, audience: Audience = Audience.GATEWAY) -> VerifiedToken:
        """As the service of that audience would, with an empty memory."""
        return await Verifier(self.ring, issuer=ISSUER, audience=audience, clock=self.clock).verify(token)


@pytest.fixture
async def auth() -> AsyncIterator[Auth]:
    clock, store = ManualClock(), MemoryStore()
    ring = KeyRing(store, clock, rotation_s=86_400, publish_ahead_s=3600, token_ttl_s=300)
    await ring.start()
    issuer = TokenIssuer(ring, clock, issuer=ISSUER, ttl_s=300)
    digests = {name: keys.digest(secret) for name, secret in SERVICE_SECRETS.items()}
    verifier = Verifier(ring, issuer=ISSUER, audience=Audience.AUTH, clock=clock)
    yield Auth(
        clock,
        store,
        ring,
        Exchange(store, issuer, clock, digests),
        Administration(store, clock),
        AccessControl(verifier),
    )
    await ring.stop()
