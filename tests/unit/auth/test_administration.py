"""Administration over the store in memory: what is made, changed, refused and recorded."""

from __future__ import annotations

import json
import warnings
from datetime import timedelta
from typing import Any

import pytest
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, OKPKey, RSAKey

from services.auth.administration.resources import Given
from services.auth.administration.service import Wanted
from services.auth.credentials import keys
from services.auth.store import ApiKey, Client, IdentityProvider, Kind, Resource, Tenant
from services.mesh.errors import (
    AlreadyExists,
    Conflict,
    LlmosError,
    NotFound,
    RequestInvalid,
    ScopeMissing,
    StateConflict,
)
from services.mesh.policy import Effect, Plan, Role, Rule
from tests.framework.administration import Office

GENERATE = frozenset({"generate"})


@pytest.fixture
async def office() -> Office:
    office = await Office.open()
    await office.put(Tenant("acme"), Client("app", "acme", scopes=GENERATE))
    return office


def key_of(client_id: str = "app", key_id: str = "", **fields: Any) -> ApiKey:
    return ApiKey(key_id, client_id, "", b"", **fields)


# -- making ----------------------------------------------------------------------------------------------


async def test_r24_secrets_are_given_once_and_kept_as_digests(office: Office) -> None:
    client = await office.create(Client("other", "acme", scopes=GENERATE))
    key = await office.create(key_of("other"))
    assert client.secret.startswith("llmoscs_")
    assert key.secret.startswith("llmos_")
    kept = repr([await office.store.get(Kind.CLIENT, "other"), await office.store.changes(limit=9)])
    assert client.secret not in kept
    assert key.secret not in kept
    assert client.secret not in repr(client)
    found = await office.store.find_api_key(keys.parse_api_key(key.secret).prefix)
    assert found is not None
    assert found[0].digest == keys.digest(key.secret)


async def test_a_client_without_secret(office: Office) -> None:
    made = await office.create(Client("other", "acme"), without_secret=True)
    assert made.secret == ""
    assert made.stored.resource == Client("other", "acme")


async def test_a_key_may_have_an_id_of_its_own(office: Office) -> None:
    made = await office.create(key_of(key_id="ci"))
    assert (await office.get(Kind.API_KEY, "ci")).resource == made.stored.resource
    with pytest.raises(AlreadyExists):
        await office.create(key_of(key_id="ci"))


@pytest.mark.parametrize(
    "resource",
    [
        Client("x", "nobody"),
        Client("x", "acme", roles=frozenset({"no-role"})),
        Tenant("x", plan_id="no-plan"),
        Tenant("x", parent_id="nobody"),
        Role("x", tenant_id="nobody"),
        ApiKey("x", "nobody", "", b""),
        IdentityProvider("x", "https://idp.example", "llmos", "acme", frozenset({"no-role"})),
    ],
    ids=lambda resource: type(resource).__name__,
)
async def test_what_is_referred_to_must_exist(office: Office, resource: Resource) -> None:
    with pytest.raises(NotFound):
        await office.create(resource)


def jwks(*given: dict[str, Any]) -> str:
    return json.dumps({"keys": list(given)})


ED = OKPKey.generate_key("Ed25519").as_dict(private=False)
with warnings.catch_warnings(category=SecurityWarning, action="ignore"):
    RSA = RSAKey.generate_key(1024).as_dict(private=False)


@pytest.mark.parametrize(
    ("resource", "field"),
    [
        (Client("x", "acme", scopes=frozenset({"fly"})), "resource.client.scopes"),
        (Client("service:gateway", "acme"), "resource.client.id"),
        (Client("user:abc", "acme"), "resource.client.id"),
        (Client("x", "acme", jwks_json="{"), "resource.client.jwks_json"),
        (Client("x", "acme", jwks_json=jwks()), "resource.client.jwks_json"),
        (Client("x", "acme", jwks_json=jwks(*[ED] * 9)), "resource.client.jwks_json"),
        (
            Client("x", "acme", jwks_json=jwks(OKPKey.generate_key("Ed25519").as_dict(private=True))),
            "resource.client.jwks_json",
        ),
        (
            Client("x", "acme", jwks_json=jwks({"kty": "oct", "k": "AAAA"})),
            "resource.client.jwks_json",
        ),
        (Client("x", "acme", jwks_json=jwks(RSA)), "resource.client.jwks_json"),
        (key_of(models=("a b",)), "resource.api_key.models[0]"),
        (Role("x", scopes=frozenset({"fly"})), "resource.role.scopes"),
        (
            Role("x", rules=(Rule("r", Effect.ALLOW, frozenset({"fly"})),)),
            "resource.role.rules[0].scopes",
        ),
        (IdentityProvider("x", "http://idp.example", "a", "acme"), "resource.identity_provider.issuer"),
        (IdentityProvider("x", "https://a@idp.example", "a", "acme"), "resource.identity_provider.issuer"),
    ],
)
@pytest.mark.filterwarnings("ignore:Key size")
async def test_refuses_what_no_proto_can_say(office: Office, resource: Resource, field: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        await office.create(resource)
    assert [violation.field for violation in caught.value.violations] == [field]


async def test_takes_public_keys(office: Office) -> None:
    text = jwks(ED, ECKey.generate_key("P-256").as_dict(private=False))
    made = await office.create(Client("x", "acme", jwks_json=text), without_secret=True)
    assert made.stored.resource == Client("x", "acme", jwks_json=text)


async def test_a_key_ends_in_the_future(office: Office) -> None:
    with pytest.raises(RequestInvalid):
        await office.create(key_of(expires_at=office.clock.now()))
    await office.create(key_of(key_id="k", expires_at=office.clock.now() + timedelta(days=1)))
    await office.clock.advance(2 * 86_400)
    # of an expired key other things may still change
    await office.update(Kind.API_KEY, "k", display_name="old")


async def test_a_key_has_some_of_its_clients_scopes(office: Office) -> None:
    with pytest.raises(ScopeMissing):
        await office.create(key_of(scopes=frozenset({"audit.read"})))
    await office.update(Kind.CLIENT, "app", roles=frozenset({"auditor"}))
    await office.create(key_of(scopes=frozenset({"audit.read"})))


async def test_what_only_apply_or_an_exchange_sets_is_refused(office: Office) -> None:
    for resource in (
        Client("x", "acme", secret_digest=bytes(32)),
        Client("user:x", "acme", external_subject="corp alice"),
        ApiKey("x", "app", "", bytes(32)),
    ):
        with pytest.raises(RequestInvalid):
            await office.create(resource)


# -- reading ---------------------------------------------------------------------------------------------


async def test_lists_by_pages_with_what_is_built_in(office: Office) -> None:
    await office.put(*(Role(name) for name in ("a", "u", "zz")))
    assert await office.ids(Kind.ROLE) == ["a", "admin", "auditor", "tenant-admin", "u", "user", "zz"]
    assert await office.ids(Kind.PLAN) == ["free", "unlimited"]
    assert await office.ids(Kind.CLIENT) == ["app", "root"]
    assert await office.ids(Kind.CLIENT, tenant_id="acme") == ["app"]
    assert await office.ids(Kind.CLIENT, tenant_id="nobody") == []


async def test_finds_a_leaked_key_by_its_prefix(office: Office) -> None:
    made = await office.create(key_of(key_id="leaked"))
    await office.create(key_of(key_id="other"))
    assert await office.ids(Kind.API_KEY, prefix=made.secret[6:14]) == ["leaked"]


@pytest.mark.parametrize("token", ["x", "YQ==", "w7w", "Li4v", "!"])
async def test_a_page_token_of_somebody_else(office: Office, token: str) -> None:
    by = await office.by()
    with pytest.raises(RequestInvalid):
        await office.administration.page(by, Wanted(Kind.CLIENT), page_token=token)
    with pytest.raises(RequestInvalid):
        await office.administration.changes(by, None, page_token=token)


# -- changing --------------------------------------------------------------------------------------------


async def test_a_mask_names_what_changes(office: Office) -> None:
    given = Given(Client("app", "acme", display_name="App", scopes=frozenset()))
    stored = await office.administration.update(await office.by(), given, ["display_name"])
    assert stored.resource == Client("app", "acme", display_name="App", scopes=GENERATE)


@pytest.mark.parametrize(
    "path", ["id", "tenant_id", "secret_sha256", "external_subject", "no_such", "scopes.x"]
)
async def test_a_mask_of_what_does_not_change(office: Office, path: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        await office.administration.update(
            await office.by(), Given(Client("app", "acme")), ["display_name", path]
        )
    assert [violation.field for violation in caught.value.violations] == ["update_mask.paths[1]"]
    assert path in caught.value.violations[0].description


async def test_a_client_stays_with_its_tenant(office: Office) -> None:
    with pytest.raises(RequestInvalid, match="tenant_id"):
        await office.administration.update(await office.by(), Given(Client("app", "default")))


async def test_two_administrators_edit_one_client(office: Office) -> None:
    await office.put(Client("second", "default", scopes=frozenset({"admin"})))
    read = (await office.get(Kind.CLIENT, "app")).version
    await office.update(Kind.CLIENT, "app", by="second", etag=read, display_name="theirs")
    with pytest.raises(Conflict) as caught:
        await office.update(Kind.CLIENT, "app", etag=read, display_name="mine")
    assert "default/second" in caught.value.message
    assert "Read it again" in caught.value.hint
    with pytest.raises(Conflict):
        await office.delete(Kind.CLIENT, "app", etag=read)
    stored = await office.get(Kind.CLIENT, "app")
    assert isinstance(stored.resource, Client)
    assert stored.resource.display_name == "theirs"


async def test_what_changes_nothing_is_not_recorded(office: Office) -> None:
    before = await office.store.version()
    stored = await office.update(Kind.CLIENT, "app")
    assert await office.store.version() == before
    assert stored == await office.store.get(Kind.CLIENT, "app")


async def test_built_in_roles_and_plans_stay(office: Office) -> None:
    by = await office.by()
    for resource in (Role("user"), Plan("free")):
        with pytest.raises(StateConflict):
            await office.administration.update(by, Given(resource))
        with pytest.raises(StateConflict):
            await office.administration.delete(by, Given(resource).key)
        with pytest.raises(LlmosError):
            await office.create(resource)


async def test_records_who_did_what_with_before_and_after(office: Office) -> None:
    await office.update(Kind.CLIENT, "app", display_name="App")
    await office.delete(Kind.CLIENT, "app")
    page, token = await office.administration.changes(await office.by(), (Kind.CLIENT, "app"), page_size=1)
    assert (page[0].actor, page[0].request_id) == ("default/root", "req-root")
    assert page[0].after is None
    [second, third], token = await office.administration.changes(
        await office.by(), (Kind.CLIENT, "app"), page_token=token
    )
    assert token == ""
    assert (second.before, second.after) == (
        Client("app", "acme", scopes=GENERATE),
        Client("app", "acme", scopes=GENERATE, display_name="App"),
    )
    assert third.before is None
