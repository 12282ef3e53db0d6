"""The hub: whoever watches hears of every revocation once and in order, and of the policy in force."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import pytest

from services.auth.store import Batch, NewRevocation, Put, Revocation, Tenant
from services.auth.stores.memory import MemoryStore
from services.auth.watching import (
    FORGET_INTERVAL_S,
    MAX_IN_ANSWER,
    NOTHING_NEW_INTERVAL_S,
    POLL_INTERVAL_S,
    PRUNE_INTERVAL_S,
    Hub,
    Pruning,
)
from services.mesh.clock import ManualClock
from services.mesh.errors import CredentialRevoked, DependencyUnavailable
from services.mesh.policy import RevocationKind
from services.mesh.revocation import RevocationList
from services.mesh.watching import SILENCE_S, RevocationsAnswer

START = datetime(2030, 1, 1, tzinfo=UTC)
T = TypeVar("T")


class FragileStore(MemoryStore):
    """Can be away."""

    away = False
    reads = 0

    async def version(self) -> int:
        if self.away:
            raise DependencyUnavailable("away")
        return await super().version()

    async def revocations(self, *, after_version: int, now: datetime) -> Sequence[Revocation]:
        self.reads += 1
        return await super().revocations(after_version=after_version, now=now)


class World:
    def __init__(self) -> None:
        self.clock = ManualClock(START)
        self.store = FragileStore()
        self.hub = Hub(self.store, self.clock)

    async def revoke(self, *token_ids: str, life_s: float = 300) -> None:
        now = self.clock.now()
        await self.store.commit(
            Batch(
                now,
                "service:auth",
                revocations=[
                    NewRevocation(RevocationKind.TOKEN, each, now, now + timedelta(seconds=life_s))
                    for each in token_ids
                ],
            )
        )

    async def poll(self) -> None:
        await self.clock.advance(POLL_INTERVAL_S)
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.hub.start()
    yield world
    await world.hub.stop()


async def now(stream: AsyncGenerator[T, None]) -> T:
    """The next answer, which must be there."""
    async with asyncio.timeout(5):
        return await anext(stream)


def ids(answer: RevocationsAnswer) -> list[str]:
    return [each.subject_id for each in answer.revocations]


async def test_r23_first_all_of_them_then_each_as_it_comes(world: World) -> None:
    await world.revoke("a", "b")
    await world.poll()
    watch = world.hub.revocations()
    first = await now(watch)
    assert (first.snapshot, ids(first)) == (True, ["a", "b"])
    await world.revoke("c")
    await world.poll()
    second = await now(watch)
    assert (second.snapshot, ids(second)) == (False, ["c"])
    for _ in range(int(NOTHING_NEW_INTERVAL_S / POLL_INTERVAL_S)):
        await world.poll()
    assert ids(await now(watch)) == []


async def test_r23_what_is_committed_here_is_told_without_waiting(world: World) -> None:
    watch = world.hub.revocations()
    await now(watch)
    await world.revoke("a")
    world.hub.wake()
    assert ids(await now(watch)) == ["a"]
    with pytest.raises(CredentialRevoked):
        world.hub.revoked.check(token_id="a", key_id="", client_id="", tenant_id="", issued_at_s=0)


async def test_an_answer_comes_now_and_then_and_the_store_is_read_only_when_it_changed(
    world: World,
) -> None:
    watch = world.hub.revocations()
    reads = world.store.reads
    for _ in range(5):
        await now(watch)
        for _ in range(int(NOTHING_NEW_INTERVAL_S / POLL_INTERVAL_S)):
            await world.poll()
    assert world.store.reads == reads
    assert NOTHING_NEW_INTERVAL_S + POLL_INTERVAL_S < SILENCE_S / 2


async def test_r23_while_the_store_is_away_nothing_is_said(world: World) -> None:
    watch = world.hub.revocations()
    await now(watch)
    world.store.away = True
    await world.revoke("a")
    waiting = asyncio.ensure_future(anext(watch))
    for _ in range(10):
        await world.poll()
    assert not waiting.done()
    world.store.away = False
    await world.poll()
    assert ids(await waiting) == ["a"]


async def test_a_slow_watcher_misses_nothing_and_holds_up_nobody(world: World) -> None:
    slow, fast = world.hub.revocations(), world.hub.revocations()
    await now(slow)
    heard = ids(await now(fast))
    for n in range(50):
        await world.revoke(f"t{n}")
        await world.poll()
        heard += ids(await now(fast))
    assert heard == [f"t{n}" for n in range(50)]
    assert ids(await now(slow)) == heard


async def test_many_come_in_parts_that_make_one_list(world: World) -> None:
    many = [f"t{n}" for n in range(2 * MAX_IN_ANSWER + 1)]
    for start in range(0, len(many), 1000):
        await world.revoke(*many[start : start + 1000])
    await world.poll()
    watch = world.hub.revocations()
    list_ = RevocationList(world.clock)
    parts = [await now(watch) for _ in range(3)]
    whole = [list_.apply(part.snapshot, part.version, part.revocations) for part in parts]
    assert whole == [False, False, True]
    assert [part.snapshot for part in parts] == [True, False, False]
    assert len(list_) == len(many)


async def test_a_snapshot_is_whole_where_the_latest_revocation_has_expired(world: World) -> None:
    await world.revoke("long")
    await world.revoke("short", life_s=1)
    await world.poll()
    await world.clock.advance(2)
    watch = world.hub.revocations()
    list_ = RevocationList(world.clock)
    for _ in range(2):
        answer = await now(watch)
        list_.apply(answer.snapshot, answer.version, answer.revocations)
    assert list_.complete
    assert len(list_) == 1


async def test_what_has_expired_is_forgotten(world: World) -> None:
    await world.revoke("a", life_s=1)
    await world.poll()
    assert len(world.hub.revoked) == 1
    for _ in range(int(FORGET_INTERVAL_S / POLL_INTERVAL_S) + 1):
        await world.poll()
    assert len(world.hub.revoked) == 0
    watch = world.hub.revocations()
    assert ids(await now(watch)) == []


async def test_two_processes_on_one_store_tell_the_same() -> None:
    world = World()
    other = Hub(world.store, world.clock)
    await world.hub.start()
    await other.start()
    watch = other.revocations()
    await now(watch)
    await world.revoke("a")
    world.hub.wake()
    await world.poll()
    assert ids(await now(watch)) == ["a"]
    await world.hub.stop()
    await other.stop()


async def test_a_process_that_starts_knows_what_was_revoked_before() -> None:
    world = World()
    await world.revoke("a")
    await world.hub.start()
    with pytest.raises(CredentialRevoked):
        world.hub.revoked.check(token_id="a", key_id="", client_id="", tenant_id="", issued_at_s=0)
    await world.hub.stop()


async def test_the_policy_is_told_when_it_changed(world: World) -> None:
    watch = world.hub.policy()
    first = await now(watch)
    assert first.document is not None
    assert first.document.roles
    await world.revoke("a")
    await world.poll()
    assert (await now(watch)).document is None
    version = await world.store.commit(
        Batch(world.clock.now(), "service:auth", writes=[Put(Tenant("acme"), create=True)])
    )
    await world.poll()
    changed = await now(watch)
    assert changed.version == version
    assert changed.document is not None
    assert [tenant.tenant_id for tenant in changed.document.tenants] == ["acme"]


async def test_what_has_expired_is_pruned_every_hour() -> None:
    world = World()
    pruning = Pruning(world.store, world.clock)
    await pruning.start()
    await world.clock.advance(1)
    await world.revoke("a", life_s=10)
    early = START - timedelta(days=1)
    assert await world.store.revocations(after_version=0, now=early)
    await world.clock.advance(PRUNE_INTERVAL_S)
    assert not await world.store.revocations(after_version=0, now=early)
    await pruning.stop()
