"""A signing key that was retired is refused, also for tokens that it could still sign."""

from __future__ import annotations

import contextlib
import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc.jwk import OKPKey

from services.auth.signing.ring import RETIRE_MARGIN_S, KeyRing
from services.auth.stores.memory import MemoryStore
from services.mesh.access_token import Audience
from services.mesh.clock import ManualClock
from services.mesh.errors import CredentialInvalid
from services.mesh.jwks import JwksCache
from services.mesh.tokens import Verifier
from tests.framework.access_tokens import ISSUER, honest_claims, signed

ROTATION_S, TTL_S, REFRESH_S = 5, 20, 1


async def test_r22_a_retired_key_is_refused_within_the_refresh_interval() -> None:
    """Whoever has stolen it signs with it again and again."""
    store, clock = MemoryStore(), ManualClock()
    ring = KeyRing(store, clock, rotation_s=ROTATION_S, publish_ahead_s=3, token_ttl_s=TTL_S)
    await ring.start()
    (stolen,) = await store.signing_keys()
    key = OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(stolen.private))

    class Port:
        async def fetch(self) -> str:
            return ring.jwks_json()

    jwks = JwksCache(Port(), clock, refresh_interval_s=REFRESH_S)
    verifier = Verifier(jwks, issuer=ISSUER, audience=Audience.GATEWAY, clock=clock)

    def forged() -> str:
        return signed(key, honest_claims(clock.now(), jti=secrets.token_hex(8)), kid=stolen.kid)

    remembered = forged()
    lived_s = 0.0
    while stolen.kid in ring.jwks_json():
        assert (await verifier.verify(forged())).subject == "app"
        remembered = forged()
        await verifier.verify(remembered)
        await clock.advance(0.5)
        lived_s += 0.5
    assert lived_s <= ROTATION_S + TTL_S + RETIRE_MARGIN_S + 6
    await clock.advance(REFRESH_S)
    # this one may still pass, and causes the keys to be fetched
    with contextlib.suppress(CredentialInvalid):
        await verifier.verify(forged())
    await clock.advance(REFRESH_S)
    for token in (remembered, forged()):
        with pytest.raises(CredentialInvalid):
            await verifier.verify(token)
    await ring.stop()
