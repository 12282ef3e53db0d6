"""What every store of auth must do with resources; run on memory, SQLite and PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_network

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.auth.store import (
    Batch,
    ClaimRule,
    Client,
    Delete,
    Filter,
    IdentityProvider,
    Kind,
    Owned,
    Put,
    Resource,
    Tenant,
)
from services.auth.stores.shapes import key_of, without_digests
from services.mesh.errors import AlreadyExists, Conflict, LlmosError, NotFound, RequestInvalid, StateConflict
from services.mesh.policy import BUILT_IN_PLANS, BUILT_IN_ROLES, AddressRule, Effect, Plan, Role, TenantPolicy
from tests.framework.auth_stores import (
    HOSTILE,
    NOW,
    UNSTORABLE,
    StartedStore,
    api_key,
    batch,
    client,
    creates,
    delete,
    everything,
    tenant,
    update,
)

LATER = NOW + timedelta(hours=1)


async def ids(store: StartedStore, kind: Kind, filter_: Filter | None = None) -> list[str]:
    found = await store.list(kind, filter_ or Filter(), limit=1000)
    return [key_of(stored.resource)[1] for stored in found]


async def refused(store: StartedStore, wrong: Batch, error: type[LlmosError]) -> None:
    """It is refused, and changes nothing."""
    before = await store.version(), await store.changes(limit=1000), await store.policy()
    with pytest.raises(error) as caught:
        await store.commit(wrong)
    assert type(caught.value) is error
    assert (await store.version(), await store.changes(limit=1000), await store.policy()) == before


class TestResources:
    async def test_begins_empty(self, auth_store: StartedStore) -> None:
        assert await auth_store.is_empty()
        assert await auth_store.version() == 0
        assert await auth_store.find_client("app") is None
        assert await auth_store.find_api_key("abcdefgh") is None
        assert await auth_store.find_provider("https://x") is None
        for kind in Kind:
            assert await ids(auth_store, kind) == []
        version, document = await auth_store.policy()
        assert (version, document.roles, document.plans) == (0, BUILT_IN_ROLES, BUILT_IN_PLANS)

    async def test_gives_back_what_was_put_in(self, auth_store: StartedStore) -> None:
        assert await auth_store.commit(creates(*everything())) == 1
        for resource in everything():
            stored = await auth_store.get(*key_of(resource))
            assert stored is not None
            assert stored.resource == resource
            assert (stored.version, stored.created_at, stored.updated_at) == (1, NOW, NOW)
        assert not await auth_store.is_empty()
        assert await auth_store.get(Kind.CLIENT, "X") is None
        assert await auth_store.get(Kind.PLAN, "y") is None

    async def test_an_update_keeps_when_it_was_made(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant()))
        assert await auth_store.commit(update(Tenant("acme", display_name="new"), 1, LATER)) == 2
        stored = await auth_store.get(Kind.TENANT, "acme")
        assert stored is not None
        assert stored.resource == Tenant("acme", display_name="new")
        assert (stored.version, stored.created_at, stored.updated_at) == (2, NOW, LATER)

    async def test_what_has_no_effect_is_no_commit(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(*everything()))
        again = batch(*(Put(resource, create=False) for resource in everything()))
        assert await auth_store.commit(replace(again, at=LATER)) == 1
        assert await auth_store.commit(batch()) == 1
        assert len(await auth_store.changes(limit=1000)) == len(everything())
        stored = await auth_store.get(Kind.TENANT, "x")
        assert stored is not None
        assert (stored.version, stored.updated_at) == (1, NOW)

    async def test_an_id_is_taken_once(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(*everything()))
        for resource in everything():
            await refused(auth_store, creates(resource), AlreadyExists)
        await refused(auth_store, creates(tenant("new"), tenant("new")), AlreadyExists)

    async def test_second_names_are_taken_once(self, auth_store: StartedStore) -> None:
        await auth_store.commit(
            creates(tenant(), client(), api_key("key_1"), api_key("key_2", prefix="22222222"))
        )
        await refused(auth_store, creates(api_key("key_3")), AlreadyExists)
        await refused(auth_store, update(api_key("key_2")), AlreadyExists)
        provider = IdentityProvider("one", "https://id", "us", "acme")
        await auth_store.commit(creates(provider))
        await refused(auth_store, creates(replace(provider, provider_id="two")), AlreadyExists)
        assert await auth_store.find_provider("https://id") == provider
        # given up in a batch, it can be taken in the same
        moved = (api_key("key_1", prefix="33333333"), api_key("key_2"))
        await auth_store.commit(batch(*(Put(key, create=False) for key in moved)))
        found = await auth_store.find_api_key("abcdefgh")
        assert found is not None
        assert found[0].key_id == "key_2"
        await auth_store.commit(batch(Delete(Kind.API_KEY, "key_2"), Put(api_key("key_9"), create=True)))
        found = await auth_store.find_api_key("abcdefgh")
        assert found is not None
        assert found[0].key_id == "key_9"

    async def test_only_what_exists_is_replaced_or_deleted(self, auth_store: StartedStore) -> None:
        for resource in everything():
            await refused(auth_store, batch(Delete(*key_of(resource))), NotFound)
        await refused(auth_store, update(tenant()), NotFound)
        await refused(auth_store, update(Plan("gold"), 1), NotFound)

    async def test_a_batch_is_all_or_nothing(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant()))
        await refused(auth_store, creates(client(), api_key(), client("b", "nowhere")), NotFound)
        assert await auth_store.find_client("app") is None
        assert await auth_store.find_api_key("abcdefgh") is None

    async def test_a_batch_sees_what_it_did(self, auth_store: StartedStore) -> None:
        writes = batch(
            Put(tenant(), create=True),
            Put(client(), create=True),
            Put(client("app", "acme", "generate"), create=False, expected_version=1),
            Put(api_key(), create=True),
            Delete(Kind.CLIENT, "app"),
            Put(client("app", "acme", "admin"), create=True),
        )
        assert await auth_store.commit(writes) == 1
        found = await auth_store.find_client("app")
        assert found is not None
        assert found.client.scopes == {"admin"}
        assert await ids(auth_store, Kind.API_KEY) == []

    async def test_only_if_empty(self, auth_store: StartedStore) -> None:
        first = replace(creates(tenant(), client()), only_if_empty=True)
        assert await auth_store.commit(first) == 1
        await refused(auth_store, replace(creates(tenant("b")), only_if_empty=True), AlreadyExists)


class TestConflicts:
    async def test_of_two_that_edit_the_same_one_is_told(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant()))
        await auth_store.commit(update(Tenant("acme", display_name="one"), 1))
        with pytest.raises(Conflict, match="somebody else"):
            await auth_store.commit(update(Tenant("acme", display_name="two"), 1))
        await refused(auth_store, delete(Kind.TENANT, "acme", 1), Conflict)
        await refused(auth_store, update(Tenant("acme", display_name="one"), 1), Conflict)
        assert await auth_store.commit(update(Tenant("acme", display_name="two"), 2)) == 3
        assert await auth_store.commit(delete(Kind.TENANT, "acme", 3)) == 4

    @pytest.mark.parametrize(
        "resource",
        [
            client("app", "nowhere"),
            replace(client(), roles=frozenset({"user", "nothing"})),
            api_key("key_1", "nobody"),
            tenant("b", "nowhere"),
            tenant("b", "b"),
            Tenant("b", plan_id="gold"),
            Role("r", "nowhere"),
            AddressRule("r", Effect.DENY, ip_network("::/0"), "nowhere"),
            IdentityProvider("p", "i", "a", "nowhere"),
            IdentityProvider("p", "i", "a", "acme", frozenset({"nothing"})),
        ],
        ids=range(10),
    )
    async def test_what_is_referred_to_exists(self, auth_store: StartedStore, resource: Resource) -> None:
        await auth_store.commit(creates(tenant()))
        await refused(auth_store, creates(resource), NotFound)

    async def test_what_is_referred_to_stays(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(*everything()))
        for kind, name in ((Kind.PLAN, "x"), (Kind.TENANT, "x"), (Kind.TENANT, "x-2"), (Kind.ROLE, "x")):
            await refused(auth_store, delete(kind, name), StateConflict)
        for resource in reversed(everything()):
            await auth_store.commit(batch(Delete(*key_of(resource))))
        assert await auth_store.is_empty()

    async def test_what_refers_can_go_in_the_same_batch(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(*everything()))
        everything_goes = [Delete(*key_of(resource)) for resource in reversed(everything())]
        del everything_goes[0]  # the key goes with its client
        await auth_store.commit(batch(*everything_goes))
        assert await auth_store.is_empty()
        for kind in Kind:
            assert await ids(auth_store, kind) == []

    async def test_a_reference_that_was_given_up_holds_nothing(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant(), Role("r"), replace(client(), roles=frozenset({"r"}))))
        await refused(auth_store, delete(Kind.ROLE, "r"), StateConflict)
        await auth_store.commit(update(client()))
        await auth_store.commit(delete(Kind.ROLE, "r"))

    async def test_many_refer_and_one_of_them_goes(self, auth_store: StartedStore) -> None:
        many = [client(f"app-{n}") for n in range(20)]
        await auth_store.commit(creates(tenant(), *many))
        some = [Delete(Kind.CLIENT, one.client_id) for one in many[:19]]
        await refused(auth_store, batch(*some, Delete(Kind.TENANT, "acme")), StateConflict)

    async def test_projects_have_no_projects(self, auth_store: StartedStore) -> None:
        clients = [client(f"app-{n}") for n in range(5)]
        await auth_store.commit(creates(tenant(), *clients, tenant("project", "acme"), tenant("other")))
        await refused(auth_store, creates(tenant("b", "project")), StateConflict)
        await refused(auth_store, update(tenant("acme", "other")), StateConflict)
        await refused(auth_store, update(tenant("other", "other")), StateConflict)
        await auth_store.commit(update(tenant("project", "other")))
        await auth_store.commit(update(tenant("acme", "other")))

    async def test_owners_stay(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant(), tenant("other"), client(), client("b"), api_key()))
        await refused(auth_store, update(client("app", "other")), StateConflict)
        await refused(auth_store, update(api_key("key_1", "b")), StateConflict)

    async def test_what_is_built_in_stays(self, auth_store: StartedStore) -> None:
        for resource in (*BUILT_IN_ROLES, *BUILT_IN_PLANS):
            await refused(auth_store, creates(resource), StateConflict)
            await refused(auth_store, update(resource), StateConflict)
            await refused(auth_store, batch(Delete(*key_of(resource))), StateConflict)


class TestFinding:
    async def test_a_key_with_its_client_tenant_and_organisation(self, auth_store: StartedStore) -> None:
        organisation, project = tenant("acme"), tenant("project", "acme")
        owner, key = client("app", "project", "generate"), api_key("key_1", "app", "abcdefgh", "generate")
        await auth_store.commit(creates(organisation, project, owner, key))
        owned = Owned(owner, project, organisation)
        assert await auth_store.find_client("app") == owned
        assert await auth_store.find_api_key("abcdefgh") == (key, owned)
        for other in ("ABCDEFGH", "abcdefg", "abcdefghi", "", "abcdefg_", "abcdefg%"):
            assert await auth_store.find_api_key(other) is None

    async def test_disabled_is_seen_at_once(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant(), tenant("project", "acme"), client("app", "project")))
        for changed in (tenant(), tenant("project", "acme"), client("app", "project")):
            await auth_store.commit(update(replace(changed, disabled=True)))
            found = await auth_store.find_client("app")
            assert found is not None
            assert found.disabled
            await auth_store.commit(update(changed))
            found = await auth_store.find_client("app")
            assert found is not None
            assert not found.disabled

    async def test_a_client_goes_with_its_keys(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant(), client(), api_key(), api_key("key_2", "app", "22222222")))
        await auth_store.commit(delete(Kind.CLIENT, "app"))
        assert await auth_store.find_client("app") is None
        assert await auth_store.find_api_key("abcdefgh") is None
        assert await ids(auth_store, Kind.API_KEY) == []
        gone = [
            (change.kind, change.resource_id, change.tenant_id)
            for change in await auth_store.changes(limit=3)
        ]
        assert set(gone) == {
            (Kind.CLIENT, "app", "acme"),
            (Kind.API_KEY, "key_1", "acme"),
            (Kind.API_KEY, "key_2", "acme"),
        }

    async def test_filters(self, auth_store: StartedStore) -> None:
        def of(*tenant_ids: str) -> Filter:
            return Filter(tenant_ids=frozenset(tenant_ids))

        role, other = Role("ours", "acme"), Role("everybody's")
        keys = (api_key("key_1"), api_key("key_2", "b", "22222222"))
        await auth_store.commit(
            creates(tenant(), tenant("b"), client(), client("b", "b"), *keys, role, other, Plan("gold"))
        )
        assert await ids(auth_store, Kind.TENANT, of("acme")) == ["acme"]
        assert await ids(auth_store, Kind.CLIENT, of("b")) == ["b"]
        assert await ids(auth_store, Kind.API_KEY, of("acme")) == ["key_1"]
        assert await ids(auth_store, Kind.API_KEY, of("acme", "b")) == ["key_1", "key_2"]
        assert await ids(auth_store, Kind.ROLE) == ["everybody's", "ours"]
        assert await ids(auth_store, Kind.ROLE, of("acme", "")) == ["ours"]
        assert await ids(auth_store, Kind.PLAN, of("acme")) == []
        assert await ids(auth_store, Kind.API_KEY, of()) == []
        assert await ids(auth_store, Kind.API_KEY, Filter(client_id="b")) == ["key_2"]
        assert await ids(auth_store, Kind.API_KEY, Filter(prefix="abcdefgh")) == ["key_1"]
        assert await ids(auth_store, Kind.API_KEY, Filter(of("b").tenant_ids, prefix="abcdefgh")) == []

    async def test_pages_are_sorted_by_code_points(self, auth_store: StartedStore) -> None:
        names = ["a", "B", "ä", "a-b", "ab", "a:b", "Z", "z", "名", "🔑", "\uffee", "10", "9"]
        await auth_store.commit(creates(*(tenant(name) for name in names)))
        seen: list[str] = []
        while page := await auth_store.list(
            Kind.TENANT, Filter(), limit=3, after_id=seen[-1] if seen else ""
        ):
            assert len(page) <= 3
            seen += [key_of(stored.resource)[1] for stored in page]
        assert seen == sorted(names)

    async def test_last_use(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant(), client(), api_key(), api_key("key_2", "app", "22222222")))
        await auth_store.used({"key_1": LATER, "nothing": LATER, "a\x00b": LATER, "app": LATER})
        await auth_store.used({"key_1": NOW})
        await auth_store.commit(update(replace(api_key(), display_name="new")))
        assert await auth_store.version() == 2
        page = await auth_store.list(Kind.API_KEY, Filter(), limit=10)
        assert [stored.last_used_at for stored in page] == [LATER, None]

    async def test_policy(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(*everything()))
        (plan, parent, *_), (role, free_role, rule, free_rule) = everything(), everything()[3:7]
        version, document = await auth_store.policy()
        assert (version, document.roles[4:]) == (1, (role, free_role))
        assert document.plans == (*BUILT_IN_PLANS, plan)
        assert (document.address_rules, document.tenants) == ((rule, free_rule), ())
        await auth_store.commit(update(replace(parent, disabled=False)))
        version, document = await auth_store.policy()
        assert (version, document.tenants) == (2, (TenantPolicy("x", "", "x"), TenantPolicy("x-2", "x", "x")))
        await auth_store.commit(creates(Client("b", "x-2")))
        assert await auth_store.policy() == (2, document)


class TestHostileText:
    """R24: metacharacters in every field are text and nothing else."""

    @pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
    async def test_r24_in_every_field(self, auth_store: StartedStore, text: str) -> None:
        await auth_store.commit(creates(tenant("honest"), client("honest", "honest", "generate")))
        made = everything(text)
        await auth_store.commit(replace(creates(*made), actor=text, request_id=text))
        for resource in made:
            stored = await auth_store.get(*key_of(resource))
            assert stored is not None
            assert stored.resource == resource
        owned = await auth_store.find_client(text)
        assert owned == Owned(made[8], made[2], made[1])  # type: ignore[arg-type]
        assert await auth_store.find_api_key(text) == (made[9], owned)
        assert await auth_store.find_provider(f"https://{text}") == made[7]
        assert await ids(auth_store, Kind.API_KEY, Filter(frozenset({f"{text}-2"}), text, text)) == [text]
        (change,) = await auth_store.changes(kind=Kind.CLIENT, resource_id=text, limit=10)
        assert (change.actor, change.request_id, change.after) == (text, text, without_digests(made[8]))
        for resource in reversed(made):
            await auth_store.commit(batch(Delete(*key_of(resource))))
        honest = await auth_store.find_client("honest")
        assert honest is not None
        assert honest.client == client("honest", "honest", "generate")

    @pytest.mark.parametrize("text", [*HOSTILE, *UNSTORABLE], ids=range(len(HOSTILE) + len(UNSTORABLE)))
    async def test_r24_finds_nothing_that_is_not_there(self, auth_store: StartedStore, text: str) -> None:
        await auth_store.commit(creates(tenant(), client(), api_key()))
        assert await auth_store.find_client(text) is None
        assert await auth_store.find_api_key(text) is None
        assert await auth_store.find_provider(text) is None
        assert await auth_store.get(Kind.CLIENT, text) is None
        assert await ids(auth_store, Kind.API_KEY, Filter(frozenset({text}), text, text)) == []
        assert await auth_store.changes(resource_id=text, tenant_ids=frozenset({text}), limit=9) == []

    @pytest.mark.parametrize("text", UNSTORABLE, ids=range(len(UNSTORABLE)))
    async def test_r24_what_cannot_be_stored_is_refused(self, auth_store: StartedStore, text: str) -> None:
        nested = IdentityProvider("p", "i", "a", "acme", claim_rules=(ClaimRule("c", text, "user"),))
        for wrong in (tenant(text), Tenant("a", display_name=text), nested):
            await refused(auth_store, creates(wrong), RequestInvalid)
        await refused(auth_store, delete(Kind.CLIENT, text), RequestInvalid)
        await refused(auth_store, replace(creates(tenant()), actor=text), RequestInvalid)

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=200))
    async def test_any_text_is_kept_as_it_is(self, auth_store: StartedStore, text: str) -> None:
        made = tenant(f"t{text}"), client(f"c{text}", f"t{text}", text)
        stored = await auth_store.get(*key_of(made[0]))
        if stored is None:
            await auth_store.commit(creates(*made))
        found = await auth_store.find_client(f"c{text}")
        assert found is not None
        assert (found.tenant, found.client) == made
