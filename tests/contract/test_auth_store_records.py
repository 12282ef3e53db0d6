"""What every store of auth remembers besides resources: changes, revocations, used ids, signing keys."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

from services.auth.store import Batch, Change, Delete, Kind, Put, Revocation, SigningKey
from services.auth.stores.shapes import key_of, without_digests
from services.mesh.policy import Plan, RevocationKind, Role
from tests.framework.auth_stores import (
    NOW,
    UNSTORABLE,
    StartedStore,
    api_key,
    batch,
    client,
    creates,
    delete,
    everything,
    revocation,
    tenant,
    update,
)


class TestChanges:
    async def test_before_and_after_without_digests(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant(), client()))
        rotated = replace(client(), secret_digest=b"other")
        await auth_store.commit(
            Batch(NOW, "acme/alice", "r-2", [Put(rotated, create=False, note="secret rotated")])
        )
        await auth_store.commit(delete(Kind.CLIENT, "app"))
        shown = without_digests(client())
        assert shown == replace(client(), secret_digest=b"")
        made = Change(1, 1, NOW, "acme/admin", "request-1", Kind.CLIENT, "app", "acme", None, shown)
        assert await auth_store.changes(kind=Kind.CLIENT, resource_id="app", limit=10) == [
            replace(made, version=3, index=0, before=shown, after=None),
            Change(
                2, 0, NOW, "acme/alice", "r-2", Kind.CLIENT, "app", "acme", shown, shown, "secret rotated"
            ),
            made,
        ]

    async def test_of_every_kind(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(*everything()))
        found = await auth_store.changes(limit=100)
        assert [change.after for change in reversed(found)] == list(map(without_digests, everything()))
        assert [change.index for change in reversed(found)] == list(range(len(everything())))
        tenants = ["", "x", "x-2", "x", "", "x", "", "x-2", "x-2", "x-2"]
        assert [change.tenant_id for change in reversed(found)] == tenants

    async def test_filters(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant(), tenant("b"), client(), client("x", "b"), Plan("x")))

        async def ids(**filters: object) -> list[str]:
            found = await auth_store.changes(limit=10, **filters)  # type: ignore[arg-type]
            return [change.resource_id for change in found]

        assert await ids(kind=Kind.TENANT) == ["b", "acme"]
        assert await ids(resource_id="x") == ["x", "x"]
        assert await ids(kind=Kind.PLAN, resource_id="x") == ["x"]
        assert await ids(tenant_ids=frozenset({"b"})) == ["x", "b"]
        assert await ids(tenant_ids=frozenset({"b", ""})) == ["x", "x", "b"]
        assert await ids(tenant_ids=frozenset()) == []

    async def test_pages(self, auth_store: StartedStore) -> None:
        for start in range(0, 12, 4):
            await auth_store.commit(creates(*(tenant(f"t{start + n}") for n in range(4))))
        seen: list[Change] = []
        while page := await auth_store.changes(
            limit=5, before=(seen[-1].version, seen[-1].index) if seen else None
        ):
            assert len(page) <= 5
            seen += page
        assert [change.resource_id for change in seen] == [f"t{n}" for n in reversed(range(12))]


class TestRevocations:
    async def test_in_their_order_from_a_version(self, auth_store: StartedStore) -> None:
        kinds = list(RevocationKind)
        for kind in kinds:
            await auth_store.commit(batch(revocations=[revocation(f"{kind}", kind), revocation("b", kind)]))
        expected = [
            Revocation(version, revocation(subject, kind))
            for version, kind in enumerate(kinds, start=1)
            for subject in (f"{kind}", "b")
        ]
        for after in range(6):
            wanted = [one for one in expected if one.version > after]
            assert await auth_store.revocations(after_version=after, now=NOW) == wanted
        assert await auth_store.version() == 4
        assert (await auth_store.policy())[0] == 0

    async def test_with_what_they_are_about(self, auth_store: StartedStore) -> None:
        await auth_store.commit(creates(tenant(), client()))
        gone = batch(Delete(Kind.CLIENT, "app"), revocations=[revocation("app", RevocationKind.CLIENT)])
        assert await auth_store.commit(gone) == 2
        (one,) = await auth_store.revocations(after_version=1, now=NOW)
        assert one == Revocation(2, revocation("app", RevocationKind.CLIENT))

    async def test_r23_one_that_has_expired_is_forgotten(self, auth_store: StartedStore) -> None:
        soon = revocation("soon", expires_at=NOW + timedelta(seconds=1))
        await auth_store.commit(batch(revocations=[soon, revocation("late")]))
        later = NOW + timedelta(seconds=1)
        for _ in range(2):
            found = await auth_store.revocations(after_version=0, now=later)
            assert [one.revoked.subject_id for one in found] == ["late"]
            await auth_store.prune(later)
        assert len(await auth_store.revocations(after_version=0, now=NOW)) == 1
        assert await auth_store.version() == 1


class TestUsedIds:
    async def test_once(self, auth_store: StartedStore) -> None:
        until = NOW + timedelta(minutes=1)
        assert await auth_store.use_once("id", until=until, now=NOW)
        assert not await auth_store.use_once("id", until=until, now=NOW)
        assert await auth_store.use_once("other", until=until, now=NOW)
        await auth_store.prune(NOW)
        assert not await auth_store.use_once("id", until=until, now=until - timedelta(microseconds=1))
        await auth_store.prune(until)
        assert await auth_store.use_once("id", until=until + timedelta(1), now=until)
        assert not await auth_store.use_once("id", until=until, now=until)

    async def test_a_long_one(self, auth_store: StartedStore) -> None:
        text = random.Random(1).randbytes(50_000).hex()
        assert await auth_store.use_once(text, until=NOW + timedelta(1), now=NOW)
        assert not await auth_store.use_once(text, until=NOW + timedelta(1), now=NOW)

    async def test_r24_one_that_cannot_be_kept_is_not_new(self, auth_store: StartedStore) -> None:
        for text in UNSTORABLE:
            assert not await auth_store.use_once(text, until=NOW + timedelta(1), now=NOW)


class TestSigningKeys:
    async def test_each_after_the_last_one(self, auth_store: StartedStore) -> None:
        keys = [SigningKey(f"kid-{n}", bytes([n]) * 32, n == 1, NOW + timedelta(days=n)) for n in range(3)]
        assert not await auth_store.add_signing_key(keys[0], after_kid="kid-0")
        assert await auth_store.add_signing_key(keys[0], after_kid="")
        assert not await auth_store.add_signing_key(keys[1], after_kid="")
        for before, key in pairwise(keys):
            assert await auth_store.add_signing_key(key, after_kid=before.kid)
        assert list(await auth_store.signing_keys()) == keys
        assert not await auth_store.add_signing_key(SigningKey("new", b"", False, NOW), after_kid="kid-1")
        await auth_store.delete_signing_key("kid-1")
        await auth_store.delete_signing_key("never was")
        sealed = SigningKey("kid-0", b"sealed\xff\x00", True, NOW + timedelta(hours=1))
        await auth_store.replace_signing_key(sealed)
        await auth_store.replace_signing_key(SigningKey("never was", b"", True, NOW))
        assert list(await auth_store.signing_keys()) == [sealed, keys[2]]
        await auth_store.delete_signing_key("kid-2")
        assert await auth_store.add_signing_key(keys[2], after_kid="kid-0")
        assert await auth_store.version() == 0


async def test_a_thousand_clients_in_one_batch_and_again(auth_store: StartedStore) -> None:
    clients = [
        replace(client(f"app-{n}", f"t{n % 10}", "generate"), roles=frozenset({"user", "ours"}))
        for n in range(1000)
    ]
    keys = [api_key(f"key-{n}", f"app-{n}", f"prefix-{n}") for n in range(1000)]
    resources = [Role("ours"), *(tenant(f"t{n}") for n in range(10)), *clients, *keys]
    assert await auth_store.commit(creates(*resources)) == 1
    again = batch(*(Put(resource, create=False) for resource in resources))
    assert await auth_store.commit(again) == 1
    assert len(await auth_store.changes(limit=5000)) == len(resources)
    changed = replace(clients[500], display_name="one")
    now = [changed if resource is clients[500] else resource for resource in resources]
    one = batch(*(Put(resource, create=False) for resource in now))
    assert await auth_store.commit(one) == 2
    (change,) = await auth_store.changes(limit=1)
    assert (change.version, change.resource_id) == (2, "app-500")
    without_keys = [Delete(*key_of(made)) for made in reversed(resources[:1011])]
    assert await auth_store.commit(batch(*without_keys)) == 3
    assert await auth_store.is_empty()


async def test_update_of_nothing_but_digests_is_recorded(auth_store: StartedStore) -> None:
    await auth_store.commit(creates(tenant(), client(), api_key()))
    assert await auth_store.commit(update(replace(api_key(), digest=b"new"))) == 2
    (change, *_) = await auth_store.changes(limit=1)
    assert change.before == change.after
    assert b"new" not in repr(change).encode()
