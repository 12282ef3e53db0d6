"""What administration takes away is gone, and there is always an administrator left."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from services.auth.administration.callers import administrator
from services.auth.administration.changeset import Changeset
from services.auth.credentials import keys
from services.auth.store import ApiKey, Client, Kind, Tenant
from services.mesh.errors import Conflict, CredentialRevoked, NotFound, ScopeMissing, StateConflict
from services.mesh.policy import Effect, RevocationKind, Role, Rule
from tests.framework.administration import Office

GENERATE = frozenset({"generate"})


@pytest.fixture
async def office() -> Office:
    office = await Office.open()
    await office.put(Tenant("acme"), Client("app", "acme", scopes=GENERATE))
    return office


def key_of(client_id: str = "app", key_id: str = "", **fields: Any) -> ApiKey:
    return ApiKey(key_id, client_id, "", b"", **fields)


# -- what is taken away is gone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "resource_id", "fields", "revoked"),
    [
        (Kind.TENANT, "acme", {"disabled": True}, [(RevocationKind.TENANT, "acme")]),
        (Kind.CLIENT, "app", {"disabled": True}, [(RevocationKind.CLIENT, "app")]),
        (Kind.CLIENT, "app", {"scopes": frozenset()}, [(RevocationKind.CLIENT, "app")]),
        (Kind.CLIENT, "app", {"scopes": GENERATE | {"models.read"}}, []),
        (Kind.CLIENT, "app", {"roles": frozenset({"user"})}, []),
        (Kind.CLIENT, "app", {"roles": frozenset({"denies"})}, [(RevocationKind.CLIENT, "app")]),
        (Kind.CLIENT, "app", {"display_name": "App"}, []),
        (Kind.API_KEY, "k", {"disabled": True}, [(RevocationKind.API_KEY, "k")]),
        (Kind.API_KEY, "k", {"models": ("small-*",)}, [(RevocationKind.API_KEY, "k")]),
        (Kind.API_KEY, "k", {"display_name": "K"}, []),
    ],
)
async def test_r23_what_takes_away_revokes(
    office: Office,
    kind: Kind,
    resource_id: str,
    fields: dict[str, Any],
    revoked: list[tuple[RevocationKind, str]],
) -> None:
    await office.put(Role("denies", rules=(Rule("r", Effect.DENY, GENERATE),)))
    await office.create(key_of(key_id="k"))
    await office.update(kind, resource_id, **fields)
    found = await office.revoked()
    assert [(one.kind, one.subject_id) for one in found] == revoked
    for one in found:
        assert one.revoked_at == office.clock.now()
        assert one.expires_at >= office.clock.now() + timedelta(seconds=3600)
        assert not one.cut_streams


async def test_r23_a_tenant_takes_its_projects_along(office: Office) -> None:
    await office.put(Tenant("acme-lab", parent_id="acme"))
    await office.administration.revoke(await office.by(), (Kind.TENANT, "acme"), cut_streams=True)
    assert {(one.subject_id, one.cut_streams) for one in await office.revoked()} == {
        ("acme", True),
        ("acme-lab", True),
    }
    stored = await office.get(Kind.TENANT, "acme")
    assert stored.resource == Tenant("acme", disabled=True)
    changes, _ = await office.administration.changes(await office.by(), None, page_size=1)
    assert changes[0].note == "revoked"


async def test_r23_deleting_revokes_and_enabling_does_not(office: Office) -> None:
    await office.create(key_of(key_id="k"))
    await office.delete(Kind.API_KEY, "k")
    await office.update(Kind.CLIENT, "app", disabled=True)
    await office.update(Kind.CLIENT, "app", disabled=False)
    await office.delete(Kind.CLIENT, "app")
    assert [one.subject_id for one in await office.revoked()] == ["k", "app", "app"]


async def test_r23_a_token_by_its_id(office: Office) -> None:
    await office.administration.revoke_token(await office.by(), "some-jti", cut_streams=False)
    [one] = await office.revoked()
    assert (one.kind, one.subject_id) == (RevocationKind.TOKEN, "some-jti")


async def test_rotates_a_clients_secret_with_overlap(office: Office) -> None:
    first = await office.create(Client("other", "acme"))
    made = await office.administration.rotate(await office.by(), (Kind.CLIENT, "other"), 3600)
    client = made.stored.resource
    assert isinstance(client, Client)
    assert client.secret_digest == keys.digest(made.secret)
    assert client.old_secret_digest == keys.digest(first.secret)
    assert client.old_secret_until == office.clock.now() + timedelta(hours=1)
    assert await office.revoked() == []
    made = await office.administration.rotate(await office.by(), (Kind.CLIENT, "other"), 0)
    assert isinstance(made.stored.resource, Client)
    assert made.stored.resource.old_secret_digest == b""
    assert [one.subject_id for one in await office.revoked()] == ["other"]


async def test_rotates_a_key_into_a_new_one(office: Office) -> None:
    now = office.clock.now()
    await office.create(key_of(key_id="k", models=("m*",), expires_at=now + timedelta(days=30)))
    await office.clock.advance(29 * 86_400)
    made = await office.administration.rotate(await office.by(), (Kind.API_KEY, "k"), 600)
    fresh = made.stored.resource
    assert isinstance(fresh, ApiKey)
    assert fresh.models == ("m*",)
    assert fresh.expires_at == office.clock.now() + timedelta(days=30)
    old = (await office.get(Kind.API_KEY, "k")).resource
    assert isinstance(old, ApiKey)
    assert old.expires_at == office.clock.now() + timedelta(seconds=600)
    assert await office.revoked() == []
    await office.administration.rotate(await office.by(), (Kind.API_KEY, fresh.key_id), 0)
    assert [one.subject_id for one in await office.revoked()] == [fresh.key_id]
    with pytest.raises(StateConflict):
        await office.administration.rotate(await office.by(), (Kind.API_KEY, fresh.key_id), 0)


# -- there is always an administrator left ---------------------------------------------------------------


@pytest.mark.parametrize("second", [False, True])
async def test_nobody_takes_admin_from_itself(office: Office, second: bool) -> None:
    if second:
        await office.put(Client("second", "default", scopes=frozenset({"admin"})))
    with pytest.raises(StateConflict):
        await office.update(Kind.CLIENT, "root", disabled=True)
    with pytest.raises(StateConflict):
        await office.update(Kind.CLIENT, "root", scopes=GENERATE)
    with pytest.raises(StateConflict):
        await office.update(Kind.TENANT, "default", disabled=True)
    with pytest.raises(StateConflict):
        await office.delete(Kind.CLIENT, "root")
    with pytest.raises(StateConflict):
        await office.administration.revoke(await office.by(), (Kind.CLIENT, "root"), cut_streams=False)
    if second:
        await office.delete(Kind.CLIENT, "root", by="second")


async def test_nobody_cuts_off_the_key_that_it_uses(office: Office) -> None:
    await office.create(key_of("root", key_id="mine"))
    by = await office.by("root", key_id="mine")
    with pytest.raises(StateConflict):
        await office.administration.delete(by, (Kind.API_KEY, "mine"))
    with pytest.raises(StateConflict):
        await office.administration.revoke(by, (Kind.API_KEY, "mine"), cut_streams=False)
    await office.administration.rotate(by, (Kind.API_KEY, "mine"), 0)


async def test_two_administrators_remove_each_other(office: Office) -> None:
    """Both read, then both commit: the second must fail, or nobody would be left."""
    await office.put(Client("second", "default", scopes=frozenset({"admin"})))
    batches = []
    for asks, other in (("root", "second"), ("second", "root")):
        by = await office.by(asks)
        asking = await administrator(office.store, by.identity, office.clock.now())
        changes = Changeset(office.store, asking, office.clock.now())
        changes.plan(await office.store.get(Kind.CLIENT, other), None)
        batches.append(await changes.batch("r", cut_streams=False))
    await office.store.commit(batches[0])
    with pytest.raises((NotFound, Conflict)):
        await office.store.commit(batches[1])
    assert await office.store.find_client("root") is not None


async def test_whoever_was_demoted_is_out_at_once(office: Office) -> None:
    await office.put(Client("second", "default", scopes=frozenset({"admin"})))
    by = await office.by("second")
    await office.update(Kind.CLIENT, "second", scopes=GENERATE)
    with pytest.raises(ScopeMissing):
        await office.administration.get(by, (Kind.CLIENT, "app"))
    await office.update(Kind.CLIENT, "second", disabled=True)
    with pytest.raises(CredentialRevoked):
        await office.administration.get(by, (Kind.CLIENT, "app"))


async def test_a_narrow_key_of_an_administrator_is_narrow(office: Office) -> None:
    await office.create(key_of("root", key_id="narrow", scopes=GENERATE))
    by = await office.by("root", key_id="narrow")
    with pytest.raises(ScopeMissing):
        await office.administration.get(by, (Kind.CLIENT, "app"))
