"""What the administrator of a tenant may do: a property over random worlds, and ways out that were tried."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.auth.administration.authority import reach, unconditional
from services.auth.administration.resources import Given
from services.auth.store import ApiKey, Client, Filter, IdentityProvider, Kind, Resource, Tenant
from services.auth.stores import shapes
from services.mesh.errors import LlmosError, NotFound, PolicyDenied, ScopeMissing, StateConflict
from services.mesh.policy import SCOPES, AddressRule, Condition, Effect, Plan, Role, Rule
from services.mesh.policy_codec import network_of
from tests.framework.administration import OF_TENANT, Office

GENERATE = frozenset({"generate"})
NETWORK = network_of("10.0.0.0/8", "cidr")


@pytest.fixture
async def office() -> Office:
    """acme with a project, each with its things, and a tenant `other` with the same kinds of things."""
    office = await Office.open()
    await office.tenant_with_admin("acme")
    await office.tenant_with_admin("other")
    await office.put(Tenant("acme-lab", parent_id="acme"))
    for tenant_id in ("acme", "acme-lab", "other"):
        await office.put(
            Client(f"{tenant_id}-app", tenant_id, scopes=GENERATE),
            Role(f"{tenant_id}-role", tenant_id, scopes=GENERATE),
            AddressRule(f"{tenant_id}-rule", Effect.ALLOW, NETWORK, tenant_id),
            ApiKey(f"{tenant_id}-key", f"{tenant_id}-app", f"{tenant_id}-pre"[-8:], bytes(32)),
        )
    await office.put(
        Role("everybody", scopes=GENERATE),
        AddressRule("deployment", Effect.DENY, network_of("192.0.2.0/24", "cidr")),
        IdentityProvider("corp", "https://idp.example", "llmos", "acme", frozenset({"user"})),
        Plan("big"),
    )
    return office


OTHERS = [
    (Kind.TENANT, "other"),
    (Kind.TENANT, "default"),
    (Kind.CLIENT, "other-app"),
    (Kind.API_KEY, "other-key"),
    (Kind.ROLE, "other-role"),
    (Kind.ADDRESS_RULE, "other-rule"),
    (Kind.ADDRESS_RULE, "deployment"),
    (Kind.IDENTITY_PROVIDER, "corp"),
]


@pytest.mark.parametrize("key", OTHERS, ids=str)
async def test_r26_what_is_anothers_does_not_exist(office: Office, key: shapes.Key) -> None:
    """To the letter: what is said of it is what is said of what was never there."""
    by = await office.by("acme-admin")
    never = (key[0], "never-there")
    stored = await office.store.get(*key)
    assert stored is not None

    async def told(key: shapes.Key, resource: Resource | None) -> list[str]:
        calls: list[Any] = [
            office.administration.get(by, key),
            office.administration.delete(by, key),
            office.explanation.explain(by, key, "/x", None),  # type: ignore[arg-type]
        ]
        if key[0] in (Kind.CLIENT, Kind.API_KEY):
            calls.append(office.administration.rotate(by, key, 0))
        if key[0] in (Kind.CLIENT, Kind.API_KEY, Kind.TENANT):
            calls.append(office.administration.revoke(by, key, cut_streams=True))
        if resource is not None:
            calls.append(office.administration.update(by, Given(resource)))
        found = []
        for call in calls:
            with pytest.raises(LlmosError) as caught:
                await call
            found.append(f"{type(caught.value).__name__}: {caught.value}".replace(repr(key[1]), "ID"))
        return found

    there, nowhere = await told(key, stored.resource), await told(never, None)
    assert there[: len(nowhere)] == nowhere
    assert there[0].startswith("NotFound")
    assert key[1] not in await office.ids(key[0], by="acme-admin")
    changes, _ = await office.administration.changes(by, key, page_size=100)
    assert changes == []


async def test_makes_nothing_in_anothers_tenant(office: Office) -> None:
    for resource in (
        Client("x", "other"),
        Role("x", "other"),
        AddressRule("x", Effect.ALLOW, NETWORK, "other"),
        ApiKey("", "other-app", "", b""),
    ):
        with pytest.raises(NotFound):
            await office.create(resource, by="acme-admin")
    with pytest.raises(NotFound):
        await office.create(Client("x", "acme", roles=frozenset({"other-role"})), by="acme-admin")


async def test_sees_and_manages_its_own_and_its_projects(office: Office) -> None:
    by = "acme-admin"
    assert await office.ids(Kind.TENANT, by) == ["acme", "acme-lab"]
    assert await office.ids(Kind.CLIENT, by) == ["acme-admin", "acme-app", "acme-lab-app"]
    assert await office.ids(Kind.API_KEY, by) == ["acme-key", "acme-lab-key"]
    assert await office.ids(Kind.ADDRESS_RULE, by) == ["acme-lab-rule", "acme-rule"]
    assert await office.ids(Kind.IDENTITY_PROVIDER, by) == []
    assert await office.ids(Kind.PLAN, by) == ["big", "free", "unlimited"]
    built_in = ["admin", "auditor", "tenant-admin", "user"]
    assert await office.ids(Kind.ROLE, by) == sorted(["acme-lab-role", "acme-role", "everybody", *built_in])
    assert await office.ids(Kind.CLIENT, by, tenant_id="other") == []
    await office.create(Client("new", "acme-lab", roles=frozenset({"user"})), by=by)
    await office.create(ApiKey("", "new", "", b""), by=by)
    await office.update(Kind.ROLE, "acme-lab-role", by=by, scopes=frozenset({"models.read"}))
    await office.delete(Kind.ADDRESS_RULE, "acme-rule", by=by)


async def test_a_project_does_not_manage_its_organisation(office: Office) -> None:
    await office.put(Client("lab-admin", "acme-lab", scopes=OF_TENANT))
    assert await office.ids(Kind.CLIENT, "lab-admin") == ["acme-lab-app", "lab-admin"]
    with pytest.raises(NotFound):
        await office.update(Kind.CLIENT, "acme-app", by="lab-admin", disabled=True)


async def test_leaves_tenants_plans_and_what_is_the_deployments(office: Office) -> None:
    by = await office.by("acme-admin")
    for resource in (
        Tenant("acme", plan_id="big"),
        Plan("big", "mine"),
        Role("everybody", scopes=frozenset()),
    ):
        with pytest.raises(ScopeMissing):
            await office.administration.update(by, Given(resource))
        with pytest.raises(ScopeMissing):
            await office.administration.delete(by, Given(resource).key)
    more: list[Resource] = [
        Tenant("acme-new", parent_id="acme"),
        Plan("x"),
        Role("x"),
        AddressRule("x", Effect.ALLOW, NETWORK),
    ]
    for new in more:
        with pytest.raises(ScopeMissing):
            await office.create(new, by="acme-admin")
    with pytest.raises(ScopeMissing):
        await office.administration.revoke_token(by, "jti", cut_streams=True)
    with pytest.raises(ScopeMissing):
        await office.export("acme-admin", digests=True)


async def test_lays_no_hands_on_an_administrator_of_the_deployment(office: Office) -> None:
    await office.put(
        Client("near", "default", scopes=OF_TENANT),
        Role("root-role", "default", scopes=frozenset({"admin"})),
    )
    by = await office.by("near")
    for call in (
        office.create(ApiKey("", "root", "", b""), by="near"),
        office.administration.rotate(by, (Kind.CLIENT, "root"), 0),
        office.update(Kind.CLIENT, "root", by="near", jwks_json=""),
        office.update(Kind.CLIENT, "root", by="near", disabled=True),
        office.delete(Kind.CLIENT, "root", by="near"),
        office.delete(Kind.ROLE, "root-role", by="near"),
        office.create(Client("x", "default", scopes=frozenset({"admin"})), by="near"),
        office.create(Client("x", "default", roles=frozenset({"root-role"})), by="near"),
        office.create(Client("x", "default", roles=frozenset({"admin"})), by="near"),
    ):
        with pytest.raises((PolicyDenied, StateConflict)):
            await call


async def test_gives_only_what_it_holds_without_condition(office: Office) -> None:
    small = Rule("small", Effect.ALLOW, GENERATE, Condition(models=("small-*",)))
    night = Rule("night", Effect.DENY, frozenset({"models.read"}), Condition(models=("big-*",)))
    await office.put(
        Role("limits", "acme", rules=(small, night)),
        Client(
            "limited",
            "acme",
            scopes=frozenset({"tenant.admin", "models.read"}),
            roles=frozenset({"limits"}),
        ),
    )
    for client in (
        Client("x", "acme", scopes=GENERATE),
        Client("x", "acme", scopes=frozenset({"models.read"})),
        Client("x", "acme", roles=frozenset({"user"})),
    ):
        with pytest.raises(PolicyDenied):
            await office.create(client, by="limited")
    with pytest.raises(PolicyDenied):
        await office.create(ApiKey("", "acme-app", "", b""), by="limited")
    with pytest.raises(PolicyDenied):
        await office.administration.rotate(await office.by("limited"), (Kind.CLIENT, "acme-app"), 0)
    # its own bonds stay: neither by the role, nor by the client
    with pytest.raises(PolicyDenied):
        await office.update(Kind.ROLE, "limits", by="limited", rules=(small,))
    with pytest.raises(PolicyDenied):
        await office.update(Kind.CLIENT, "limited", by="limited", roles=frozenset())
    await office.create(Client("y", "acme", scopes=frozenset({"tenant.admin"})), by="limited")


# -- the property ----------------------------------------------------------------------------------------

_ALL = Filter()
TENANTS = ("acme", "acme-lab", "other")
scopes = st.frozensets(st.sampled_from(sorted(SCOPES)))
rules = st.builds(
    lambda effect, scopes: Rule("r", effect, scopes or GENERATE),
    st.sampled_from(Effect),
    scopes,
)
ROLES = ("acme", "", "acme-lab", "other", "acme", "other")
CLIENTS = ("acme", "acme", "acme-lab", "other", "acme-lab", "other")
"""Whose they are, by the number in their ids. The first four of each exist from the beginning."""
roles = st.builds(
    lambda place, scopes, rules: Role(f"role{place}", ROLES[place], "", scopes, tuple(rules)),
    st.integers(0, 5),
    scopes,
    st.lists(rules, max_size=1),
)
clients = st.builds(
    lambda place, scopes, roles, disabled: Client(
        f"client{place}", CLIENTS[place], scopes=scopes, roles=roles, disabled=disabled
    ),
    st.integers(0, 5),
    scopes,
    st.frozensets(st.sampled_from(["role0", "role1", "role2", "user", "admin"]), max_size=2),
    st.booleans(),
)
api_keys = st.builds(
    lambda place, scopes: ApiKey(f"key{place}", f"client{place}", "", b"", scopes=scopes),
    st.integers(0, 5),
    scopes,
)
resources = st.one_of(roles, clients, api_keys)
actions = st.tuples(st.sampled_from(["create", "update", "delete", "rotate", "apply"]), resources)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    own=scopes,
    own_roles=st.frozensets(st.sampled_from(["role0", "role1", "user", "tenant-admin"]), max_size=2),
    seeded=st.lists(resources, max_size=8, unique_by=shapes.key_of),
    asked=st.lists(actions, min_size=1, max_size=12),
)
def test_r26_a_tenants_administrator_stays_in_its_tenant_and_gains_nothing(
    own: frozenset[str],
    own_roles: frozenset[str],
    seeded: list[Resource],
    asked: list[tuple[str, Resource]],
) -> None:
    async def story() -> None:
        office = await Office.open()
        await office.put(Tenant("acme"), Tenant("acme-lab", parent_id="acme"), Tenant("other"))
        drawn = {shapes.key_of(one): one for one in seeded}
        first: list[Resource] = []
        for place in range(4):
            first += [
                Role(f"role{place}", ROLES[place], scopes=GENERATE),
                Client(f"client{place}", CLIENTS[place], scopes=GENERATE),
                ApiKey(f"key{place}", f"client{place}", f"prefix{place}", bytes(32)),
            ]
        kinds = (Role, Client, ApiKey)
        for one in sorted(first, key=lambda one: kinds.index(type(one))):  # type: ignore[arg-type]
            given = drawn.get(shapes.key_of(one), one)
            await office.put(one if isinstance(one, ApiKey) else given)
        await office.put(Client("me", "acme", scopes=own - {"admin"} | {"tenant.admin"}, roles=own_roles))
        before = await capabilities(office)
        if "admin" in before["me"]:
            return
        free = await mine(office)
        foreign = await things(office, "other")
        for action, resource in asked:
            with contextless():
                await ask(office, action, resource)
        assert await things(office, "other") == foreign
        after = await capabilities(office)
        assert after["me"] <= before["me"]
        for client_id, reached in after.items():
            gained = reached - before.get(client_id, frozenset())
            assert gained <= free, (client_id, gained)

    asyncio.run(story())


class contextless:  # noqa: N801
    """Around what may be refused."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, LlmosError)


async def ask(office: Office, action: str, resource: Resource) -> None:
    by, key = await office.by("me"), shapes.key_of(resource)
    match action:
        case "create":
            await office.administration.create(by, Given(resource))
        case "update":
            await office.administration.update(by, Given(resource))
        case "delete":
            await office.administration.delete(by, key)
        case "rotate":
            await office.administration.rotate(by, key, 0)
        case _:
            await office.configuration.apply(by, [Given(resource)])


async def capabilities(office: Office) -> dict[str, frozenset[str]]:
    """What each client can reach that exists, by its id."""
    _, document = await office.store.policy()
    by_id = {role.role_id: role for role in document.roles}
    found = {}
    for stored in await office.store.list(Kind.CLIENT, _ALL, limit=1000):
        owned = await office.store.find_client(Given(stored.resource).key[1])
        if owned is not None:
            found[owned.client.client_id] = reach(owned.client, owned.tenant, by_id)
    return found


async def mine(office: Office) -> frozenset[str]:
    owned = await office.store.find_client("me")
    assert owned is not None
    _, document = await office.store.policy()
    usable = [role for role in document.roles if role.tenant_id in ("", "acme")]
    held = [role for role in usable if role.role_id in owned.client.roles]
    return unconditional(owned.client.scopes, held)


async def things(office: Office, tenant_id: str) -> list[object]:
    filter_ = replace(_ALL, tenant_ids=frozenset({tenant_id}))
    return [stored for kind in Kind for stored in await office.store.list(kind, filter_, limit=1000)]
