"""Administration: what may be made, and that secrets are kept as digests only (R24)."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from services.mesh.errors import AlreadyExists, NotFound, RequestInvalid, ScopeMissing

if TYPE_CHECKING:
    from conftest import Auth


async def test_a_tenant_a_client_and_its_key(auth: Auth) -> None:
    await auth.administration.create_tenant("acme")
    await auth.administration.create_client("acme", "app", ["generate", "models.read"])
    key, key_id = await auth.administration.create_api_key("app", [], None)
    _, identity = await auth.exchange.by_api_key(key)
    assert identity.key_id == key_id
    assert identity.scopes == {"generate", "models.read"}


async def test_ids_are_taken_once(auth: Auth) -> None:
    await auth.administration.create_tenant("acme")
    with pytest.raises(AlreadyExists):
        await auth.administration.create_tenant("acme")
    await auth.administration.create_client("acme", "app", [])
    with pytest.raises(AlreadyExists):
        await auth.administration.create_client("acme", "app", [])


async def test_owners_must_exist(auth: Auth) -> None:
    with pytest.raises(NotFound):
        await auth.administration.create_client("nobody", "app", [])
    with pytest.raises(NotFound):
        await auth.administration.create_api_key("nobody", [], None)


async def test_scopes_must_exist_and_be_held(auth: Auth) -> None:
    await auth.administration.create_tenant("acme")
    with pytest.raises(RequestInvalid):
        await auth.administration.create_client("acme", "app", ["fly"])
    await auth.administration.create_client("acme", "app", ["generate"])
    with pytest.raises(ScopeMissing):
        await auth.administration.create_api_key("app", ["admin"], None)
    with pytest.raises(RequestInvalid):
        await auth.administration.create_api_key("app", ["fly"], None)


async def test_a_key_must_end_in_the_future(auth: Auth) -> None:
    await auth.administration.create_tenant("acme")
    await auth.administration.create_client("acme", "app", ["generate"])
    with pytest.raises(RequestInvalid):
        await auth.administration.create_api_key("app", [], auth.clock.now())
    await auth.administration.create_api_key("app", [], auth.clock.now() + timedelta(days=1))


async def test_r24_no_secret_is_kept(auth: Auth) -> None:
    await auth.administration.create_tenant("acme")
    secret = await auth.administration.create_client("acme", "app", ["generate"])
    key, _ = await auth.administration.create_api_key("app", [], None)
    found = await auth.store.find_api_key(key[6:14])
    assert found is not None
    kept = [repr(found), str(found[0].digest), str(found[1].secret_digest)]
    for text in kept:
        assert secret not in text
        assert key[14:] not in text
