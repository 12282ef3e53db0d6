"""A token whose credential is revoked while the token is made is refused by that revocation."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from services.auth.administration.revoking import revocation
from services.auth.store import ApiKey, Batch, Owned
from services.mesh.errors import CredentialRevoked
from services.mesh.policy import RevocationKind
from services.mesh.revocation import Revocation, RevocationList
from services.mesh.tokens import Audience

if TYPE_CHECKING:
    from conftest import Auth


@pytest.mark.parametrize("by_key", [False, True])
async def test_r23_a_revocation_that_comes_between_proof_and_token_counts(
    auth: Auth, by_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await auth.tenant()
    secret = await auth.client()
    key = await auth.key()
    find_client, find_api_key = auth.store.find_client, auth.store.find_api_key
    revoked = RevocationList(auth.clock)

    async def revoke() -> None:
        """The next second begins, the client is revoked in it, and the token is made in the one after."""
        await auth.clock.advance(1)
        news = revocation(RevocationKind.CLIENT, "app", auth.clock.now(), cut_streams=False)
        version = await auth.store.commit(Batch(auth.clock.now(), "acme/root", revocations=[news]))
        kept = Revocation(version, news.kind, news.subject_id, news.revoked_at, news.expires_at)
        revoked.apply(True, version, [kept])
        await auth.clock.advance(1)

    async def find_client_then(client_id: str) -> Owned | None:
        found = await find_client(client_id)
        await revoke()
        return found

    async def find_api_key_then(prefix: str) -> tuple[ApiKey, Owned] | None:
        found = await find_api_key(prefix)
        await revoke()
        return found

    monkeypatch.setattr(auth.store, "find_client", find_client_then)
    monkeypatch.setattr(auth.store, "find_api_key", find_api_key_then)
    begun: datetime = auth.clock.now()
    if by_key:
        signed = await auth.exchange.by_api_key(key)
    else:
        signed = await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])
    assert signed.expires_at == begun + timedelta(seconds=300)
    assert signed.identity is not None
    with pytest.raises(CredentialRevoked):
        revoked.check_identity(signed.identity)
