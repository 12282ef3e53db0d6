"""The whole configuration at once: exported, applied, applied again."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.auth.administration.apply import Action
from services.auth.administration.resources import Given
from services.auth.credentials import keys
from services.auth.store import ApiKey, ClaimRule, Client, IdentityProvider, Kind, Resource, Tenant
from services.auth.stores import shapes
from services.mesh.errors import (
    Conflict,
    NotFound,
    PolicyDenied,
    RequestInvalid,
    ScopeMissing,
    StateConflict,
)
from services.mesh.policy import (
    AddressRule,
    Condition,
    Effect,
    LimitScope,
    LimitUnit,
    Plan,
    PlanLimit,
    Role,
    Rule,
    TimeWindow,
)
from services.mesh.policy_codec import network_of
from tests.framework.administration import ALL, Office

GENERATE = frozenset({"generate"})


def configuration(clients: int = 2) -> list[Resource]:
    """One of each kind, and so many clients with a key each."""
    window = TimeWindow((1, 2, 3), 8 * 60, 18 * 60, "Europe/Berlin")
    rule = Rule("small", Effect.ALLOW, GENERATE, Condition(models=("small-*",), times=(window,)))
    resources: list[Resource] = [
        Plan("big", limits=(PlanLimit(LimitUnit.REQUESTS_PER_MINUTE, LimitScope.TENANT, 9),)),
        Tenant("acme", plan_id="big"),
        Tenant("a-lab", parent_id="acme", display_name="Lab"),
        Role("small-models", "acme", rules=(rule,)),
        AddressRule("office", Effect.ALLOW, network_of("10.0.0.0/8", "cidr"), "a-lab"),
        IdentityProvider(
            "corp", "https://idp.example", "llmos", "acme", claim_rules=(ClaimRule("groups", "g", "user"),)
        ),
    ]
    for number in range(clients):
        client_id = f"client-{number}"
        digest = keys.digest(client_id)
        resources.append(
            Client(client_id, "a-lab", roles=frozenset({"small-models", "user"}), secret_digest=digest)
        )
        resources.append(ApiKey(f"key-{number}", client_id, f"{number:08}", digest, scopes=GENERATE))
    return resources


@pytest.fixture
async def office() -> Office:
    return await Office.open()


async def test_a_configuration_of_a_thousand_clients_applied_twice(office: Office) -> None:
    resources = configuration(1000)
    first = await office.apply(list(reversed(resources)))
    assert len(first) == len(resources)
    assert {one.action for one in first} == {Action.CREATED}
    version = await office.store.version()
    second = await office.apply(resources)
    assert {one.action for one in second} == {Action.UNCHANGED}
    assert await office.store.version() == version
    exported = [stored.resource for stored in await office.export(digests=True)]
    third = await office.apply(exported, prune=True)
    assert {one.action for one in third} == {Action.UNCHANGED}
    assert await office.store.version() == version


async def test_one_commit_for_all(office: Office) -> None:
    before = await office.store.version()
    await office.apply(configuration())
    assert await office.store.version() == before + 1


async def test_moves_to_another_deployment_with_digests(office: Office) -> None:
    await office.apply(configuration())
    exported = [stored.resource for stored in await office.export(digests=True)]
    other = await Office.open()
    await other.apply(exported)
    assert [stored.resource for stored in await other.export(digests=True)] == exported
    found = await other.store.find_api_key("00000001")
    assert found is not None
    assert found[0].digest == keys.digest("client-1")


async def test_an_export_without_digests_changes_none(office: Office) -> None:
    await office.apply(configuration())
    exported = [stored.resource for stored in await office.export()]
    without = [shapes.without_digests(resource) for resource in exported]
    applied = await office.apply(without)
    assert {one.action for one in applied} == {Action.UNCHANGED}
    assert await office.store.find_api_key("00000001") is not None


async def test_a_key_without_digest_is_not_made(office: Office) -> None:
    await office.put(Tenant("acme"), Client("app", "acme"))
    with pytest.raises(RequestInvalid, match="'k'") as caught:
        await office.apply([ApiKey("k", "app", "", b"")])
    assert [one.field for one in caught.value.violations] == ["resources[0].api_key.secret_sha256"]


async def test_all_of_it_or_nothing_and_the_error_names_the_resource(office: Office) -> None:
    version = await office.store.version()
    with pytest.raises(NotFound) as caught:
        await office.apply([*configuration(), Client("lost", "nobody")])
    assert "client 'lost'" in caught.value.message
    assert "tenant 'nobody'" in caught.value.message
    with pytest.raises(RequestInvalid) as invalid:
        await office.apply([Tenant("t"), Client("x", "t", scopes=frozenset({"fly"}))])
    assert "client 'x'" in invalid.value.message
    assert [one.field for one in invalid.value.violations] == ["resources[1].client.scopes"]
    with pytest.raises(RequestInvalid, match="given twice"):
        await office.apply([Tenant("t"), Tenant("t")])
    assert await office.store.version() == version


async def test_a_dry_run_says_what_would_be_done(office: Office) -> None:
    await office.apply(configuration())
    version = await office.store.version()
    changed = [
        replace(one, display_name="new") if isinstance(one, Tenant) else one for one in configuration()
    ]
    applied = await office.apply([*changed, Tenant("more")], dry_run=True)
    said = {one.key[1]: one.action for one in applied}
    assert (said["acme"], said["more"], said["office"]) == (
        Action.UPDATED,
        Action.CREATED,
        Action.UNCHANGED,
    )
    assert await office.store.version() == version
    with pytest.raises(NotFound):
        await office.apply([Client("x", "nobody")], dry_run=True)


async def test_prunes_what_is_not_named_of_the_kinds_that_are(office: Office) -> None:
    await office.apply(configuration(3))
    kept = [one for one in configuration(2) if not isinstance(one, AddressRule)]
    applied = await office.apply(kept, prune=True)
    deleted = [one.key for one in applied if one.action is Action.DELETED]
    assert deleted == [(Kind.API_KEY, "key-2"), (Kind.CLIENT, "client-2")]
    assert await office.store.get(Kind.ADDRESS_RULE, "office") is not None
    # whoever asks, and what it needs, stays
    assert await office.store.find_client("root") is not None
    assert [one.subject_id for one in await office.revoked()] == ["key-2", "client-2"]


async def test_prune_never_locks_out_whoever_asks(office: Office) -> None:
    await office.put(
        Plan("own"),
        Tenant("org"),
        Tenant("proj", parent_id="org", plan_id="own"),
        Role("boss", "org", scopes=frozenset({"admin"})),
        Client("asks", "proj", roles=frozenset({"boss"})),
    )
    applied = await office.apply(
        [Tenant("x"), Plan("y"), Role("z"), Client("app", "x")], by="asks", prune=True
    )
    assert {one.key for one in applied if one.action is Action.DELETED} == {
        (Kind.CLIENT, "root"),
        (Kind.TENANT, "default"),
    }
    with pytest.raises(StateConflict):
        await office.apply([Client("asks", "proj")], by="asks")


async def test_what_is_built_in_may_be_named_as_it_is(office: Office) -> None:
    applied = await office.apply(
        [Role("user", "", "Generates, and lists models.", GENERATE | {"models.read"})]
    )
    assert applied[0].action is Action.UNCHANGED
    with pytest.raises(StateConflict):
        await office.apply([Role("user", scopes=ALL)])


async def test_an_etag_of_another_state_is_a_conflict(office: Office) -> None:
    await office.apply(configuration())
    stored = await office.get(Kind.CLIENT, "client-0")
    await office.update(Kind.CLIENT, "client-0", display_name="theirs")
    by = await office.by()
    assert isinstance(stored.resource, Client)
    mine = Given(replace(stored.resource, display_name="mine"), stored.version)
    with pytest.raises(Conflict, match="client-0"):
        await office.configuration.apply(by, [mine])
    gone = Given(Client("never", "acme"), 3)
    with pytest.raises(Conflict, match="deleted"):
        await office.configuration.apply(by, [gone])


async def test_keys_and_clients_stay_whose_they_are(office: Office) -> None:
    await office.apply(configuration())
    for resource in (
        Client("client-0", "acme"),
        ApiKey("key-0", "client-1", "00000000", b""),
        ApiKey("key-0", "client-0", "11111111", b""),
    ):
        with pytest.raises(RequestInvalid):
            await office.apply([resource])


# -- the administrator of a tenant -----------------------------------------------------------------------


async def test_a_tenants_administrator_exports_and_applies_its_own(office: Office) -> None:
    await office.apply(configuration())
    await office.put(Client("boss", "acme", scopes=ALL - {"admin"}))
    exported = [stored.resource for stored in await office.export("boss")]
    assert {shapes.key_of(one)[0] for one in exported} == set(Kind) - {Kind.PLAN, Kind.IDENTITY_PROVIDER}
    assert {one.tenant_id for one in exported if isinstance(one, Tenant)} == {"acme", "a-lab"}
    without = [shapes.without_digests(one) for one in exported]
    applied = await office.apply(without, by="boss", prune=True)
    assert {one.action for one in applied} == {Action.UNCHANGED}
    await office.apply([Client("new", "a-lab", roles=frozenset({"user"}))], by="boss")
    with pytest.raises(NotFound):
        await office.export("boss", "default")
    for resource, error in (
        (Tenant("acme", plan_id="free"), ScopeMissing),
        (Client("root", "default"), NotFound),
        (Client("evil", "acme", scopes=frozenset({"admin"})), PolicyDenied),
        (Client("evil", "default"), NotFound),
    ):
        with pytest.raises(error):
            await office.apply([resource], by="boss")


async def test_an_export_of_a_tenant_is_it_and_its_projects(office: Office) -> None:
    await office.apply(configuration())
    ids = {shapes.key_of(stored.resource)[1] for stored in await office.export(tenant_id="a-lab")}
    assert ids == {"a-lab", "office", "client-0", "client-1", "key-0", "key-1"}
    assert [type(stored.resource) for stored in await office.export(tenant_id="acme")][:2] == [Tenant] * 2


# -- the property ----------------------------------------------------------------------------------------

resources = st.one_of(
    st.builds(
        lambda n, text: Tenant(f"t{n}", display_name=text), st.integers(0, 3), st.text("ab", max_size=4)
    ),
    st.builds(lambda n, scopes: Role(f"r{n}", scopes=scopes), st.integers(0, 3), st.just(GENERATE)),
    st.builds(
        lambda n, t, roles: Client(f"c{n}", f"t{t}", roles=roles),
        st.integers(0, 5),
        st.just(0),
        st.frozensets(st.sampled_from(["r0", "r1", "user"])),
    ),
    st.builds(lambda n, limit: Plan(f"p{n}", str(limit)), st.integers(0, 2), st.integers(0, 9)),
)
_NEEDED = {(Kind.TENANT, "t0"), (Kind.ROLE, "r0"), (Kind.ROLE, "r1")}
documents = st.lists(resources, max_size=12, unique_by=shapes.key_of).map(
    lambda found: [
        *(one for one in found if shapes.key_of(one) not in _NEEDED),
        *(Tenant("t0"), Role("r0"), Role("r1")),
    ]
)


@settings(max_examples=60, deadline=None)
@given(first=documents, second=documents, prune=st.booleans())
def test_applying_is_idempotent(first: list[Resource], second: list[Resource], prune: bool) -> None:
    async def story() -> None:
        office = await Office.open()
        await office.apply(first)
        applied = await office.apply(second, prune=prune)
        version = await office.store.version()
        again = await office.apply(second, prune=prune)
        assert {one.action for one in again} <= {Action.UNCHANGED}
        assert await office.store.version() == version
        assert {one.key for one in again} == {one.key for one in applied if one.action is not Action.DELETED}
        for resource in second:
            stored = await office.store.get(*shapes.key_of(resource))
            assert stored is not None
            assert stored.resource == resource

    asyncio.run(story())
