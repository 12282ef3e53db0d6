"""Routing: a healthy replica that has the model, with the fewest requests running."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.routing import Replica, Router
from services.mesh import errors
from services.mesh.clock import ManualClock
from tests.framework.gateway_fakes import MODEL, FakeReplica


def router_of(clock: ManualClock, *ports: FakeReplica) -> tuple[Router, list[Replica]]:
    replicas = [Replica(f"replica-{i}", port) for i, port in enumerate(ports)]
    return Router(replicas, clock, probe_interval_s=1), replicas


async def test_the_least_busy_healthy_replica_is_chosen() -> None:
    clock = ManualClock()
    router, replicas = router_of(clock, FakeReplica(), FakeReplica(), FakeReplica(healthy=False))
    first = await router.choose(MODEL.id)
    with first.lease():
        second = await router.choose(MODEL.id)
        assert second is not first
        with second.lease(), second.lease():
            assert await router.choose(MODEL.id) is first
    assert [replica.running for replica in replicas] == [0, 0, 0]


async def test_unknown_models_and_absent_replicas_are_told_apart() -> None:
    clock = ManualClock()
    port = FakeReplica(healthy=False)
    router, _ = router_of(clock, port)
    with pytest.raises(errors.NoReplica) as nobody:
        await router.choose(MODEL.id)
    assert nobody.value.retry_after_s
    port.healthy = True
    await clock.advance(1)
    assert (await router.choose(MODEL.id)).name == "replica-0"
    with pytest.raises(errors.ModelNotFound):
        await router.choose("other")
    router.lost(await router.choose(MODEL.id))
    port.healthy = False
    await clock.advance(1)
    with pytest.raises(errors.NoReplica):
        await router.choose(MODEL.id)
    with pytest.raises(errors.ModelNotFound):
        await router.choose("other")


async def test_the_watch_sees_replicas_go_and_come() -> None:
    clock = ManualClock()
    port = FakeReplica()
    router, (replica,) = router_of(clock, port)
    await router.start()
    await clock.advance(0)
    assert replica.healthy
    port.healthy = False
    await clock.advance(1)
    assert not replica.healthy
    port.healthy = True
    await clock.advance(1)
    assert replica.healthy
    await router.stop()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("watch-")]


async def test_models_are_merged_and_ready_only_where_served() -> None:
    clock = ManualClock()
    other = type(MODEL)("other", "rev-2", MODEL.capabilities, 1, None, True)
    gone = FakeReplica(models=[MODEL, other])
    router, replicas = router_of(clock, gone, FakeReplica())
    found = await router.models()
    assert [(model.id, model.ready) for model in found] == [("echo-1", True), ("other", True)]
    gone.healthy = False
    router.lost(replicas[0])
    found = await router.models()
    assert [(model.id, model.ready) for model in found] == [("echo-1", True), ("other", False)]
    with pytest.raises(errors.ModelNotFound):
        await router.model("nowhere")


async def test_many_requests_cause_one_round_of_questions() -> None:
    clock = ManualClock()
    asked = 0

    class Counting(FakeReplica):
        async def is_healthy(self) -> bool:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0)
            return False

    router, _ = router_of(clock, Counting())
    await asyncio.gather(*(router.choose(MODEL.id) for _ in range(50)), return_exceptions=True)
    await asyncio.gather(*(router.choose(MODEL.id) for _ in range(50)), return_exceptions=True)
    assert asked == 1
