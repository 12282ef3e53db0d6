"""The worker: what it claims, keeps, stops, reports and leaves, over a schedule in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from services.gateway.jobs.ports import AttemptEnd, Report
from services.mesh import context as request_context
from services.mesh.context import Caller, RequestContext
from services.mesh.errors import DependencyUnavailable, EngineFault, NoReplica
from services.mesh.events import Outcome
from services.mesh.jobs import JobKind, JobState
from tests.framework.gateway_fakes import ALICE, FakeReplica, Gate, answer
from tests.framework.job_workers import sealed_job, standing
from tests.framework.job_worlds import FrozenWorker, World


async def test_a_job_runs_and_its_result_opens() -> None:
    world = World()
    async with world.gateway(FakeReplica(answer("Good", " day"))) as gateway:
        job = sealed_job(gateway.seals, world.clock)
        await world.schedule.accept(job)
        found = await world.end_of()
        assert (found.state, found.attempts, found.history) == (JobState.SUCCEEDED, 1, ())
        _, result = await standing(world.schedule)
        answered = gateway.result(job, result).generate
        assert answered.choices[0].text == "Good day"
        assert answered.request_id == found.last_request_id == gateway.bench.audit.ended[0].facts.request_id
        assert gateway.worker.running == 0


async def test_a_failure_that_passes_is_tried_again_in_a_request_of_its_own() -> None:
    world = World()
    replica = FakeReplica([EngineFault("fault")], [EngineFault("fault")], answer("at last"))
    async with world.gateway(replica) as gateway:
        await world.schedule.accept(sealed_job(gateway.seals, world.clock))
        found = await world.end_of()
    assert (found.state, found.attempts) == (JobState.SUCCEEDED, 3)
    assert [each.error_reason for each in found.history] == ["ENGINE_FAULT"] * 2
    ids = [end.facts.request_id for end in gateway.bench.audit.ended]
    assert ids == [*(each.request_id for each in found.history), found.last_request_id]
    assert len(set(ids)) == 3


async def test_a_tenant_ends_its_job_while_it_runs() -> None:
    world, gate = World(), Gate()
    async with world.gateway(FakeReplica([*answer("")[:1], gate])) as gateway:
        await world.schedule.accept(sealed_job(gateway.seals, world.clock))
        await world.until(gate.reached.is_set)
        with_alice = request_context.enter(RequestContext("r", "/test", caller=Caller(ALICE)))
        await world.schedule.cancel("job_1")
        request_context.leave(with_alice)
        found = await world.end_of(within_s=10)
        assert found.state is JobState.CANCELLED
        assert gateway.bench.replicas[0].closed == 1
        assert gateway.bench.audit.ended[0].outcome is Outcome.CANCELLED


async def test_who_watches_sees_what_there_is_so_far() -> None:
    world, gate = World(), Gate()
    replica = FakeReplica([*answer("so", " far")[:3], gate, answer("so", " far")[3]])
    async with world.gateway(replica) as gateway:
        job = sealed_job(gateway.seals, world.clock)
        await world.schedule.accept(job)
        await world.until(gate.reached.is_set)
        seen: list[tuple[int, bytes]] = []

        async def watch() -> None:
            request_context.enter(RequestContext("r", "/test", caller=Caller(ALICE)))
            async for found, partial, _ in world.schedule.watch("job_1"):
                text = b"" if partial is None else gateway.seals.open(partial, job, "partial")
                seen.append((found.progress_tokens, text))

        watching = asyncio.create_task(watch())
        await world.until(lambda: any(b"so far" in text for _, text in seen))
        assert any(tokens == 2 for tokens, _ in seen)
        gate.open.set()
        await world.end_of()
        await watching


async def test_a_lease_is_kept_for_as_long_as_the_job_runs() -> None:
    world, gate = World(lease_s=15), Gate()
    replica = FakeReplica([*answer("x")[:2], gate, answer("x")[2]])
    async with world.gateway(replica) as gateway:
        await world.schedule.accept(sealed_job(gateway.seals, world.clock))
        await world.until(gate.reached.is_set)
        await world.pass_s(120)
        gate.open.set()
        found = await world.end_of()
        assert (found.state, found.attempts) == (JobState.SUCCEEDED, 1)


async def test_a_stop_postpones_what_runs_and_counts_no_attempt() -> None:
    world, gate = World(), Gate()
    async with world.gateway(FakeReplica([*answer("")[:1], gate])) as first:
        await world.schedule.accept(sealed_job(first.seals, world.clock))
        await world.until(gate.reached.is_set)
    found, _ = await standing(world.schedule)
    assert (found.state, found.attempts, found.history) == (JobState.WAITING, 0, ())
    async with world.gateway():
        found = await world.end_of()
    assert (found.state, found.attempts) == (JobState.SUCCEEDED, 1)


async def test_a_gateway_that_is_not_ready_claims_nothing() -> None:
    world = World()
    async with world.gateway() as gateway:
        gateway.is_ready = False
        await world.pass_s(1)
        await world.schedule.accept(sealed_job(gateway.seals, world.clock))
        await world.pass_s(10)
        assert (await standing(world.schedule))[0].state is JobState.WAITING
        gateway.is_ready = True
        assert (await world.end_of()).state is JobState.SUCCEEDED


async def test_a_kind_that_this_version_does_not_know_is_left_to_others() -> None:
    world = World()
    async with world.gateway() as gateway:
        await world.schedule.accept(sealed_job(gateway.seals, world.clock, kind=JobKind.BATCH))
        await world.pass_s(20)
        found, _ = await standing(world.schedule)
        assert (found.state, found.attempts) == (JobState.WAITING, 0)


async def test_a_runner_that_breaks_is_a_fault_of_ours_and_counts() -> None:
    class Broken:
        async def run(self, attempt: object) -> Report:
            raise ValueError("insides")

    world = World()
    async with world.gateway(runners={JobKind.BATCH: Broken()}) as gateway:
        await world.schedule.accept(
            sealed_job(gateway.seals, world.clock, kind=JobKind.BATCH, max_attempts=2)
        )
        found = await world.end_of()
        assert (found.state, found.attempts, found.error_reason) == (JobState.FAILED, 2, "INTERNAL")
        assert "insides" not in found.history[0].message


async def test_the_schedule_may_be_away_for_a_while() -> None:
    """A result waits for it; so does the lease, which nobody else can take meanwhile."""
    world, gate = World(lease_s=60), Gate()
    replica = FakeReplica([*answer("x")[:2], gate, answer("x")[2]])
    frozen = FrozenWorker(world.schedule)
    async with world.gateway(replica, schedule=frozen) as gateway:
        await world.schedule.accept(sealed_job(gateway.seals, world.clock))
        await world.until(gate.reached.is_set)
        frozen.error = DependencyUnavailable("away")
        gate.open.set()
        await world.pass_s(20)
        assert gateway.worker.running == 1
        frozen.error = None
        found = await world.end_of()
        assert (found.state, found.attempts) == (JobState.SUCCEEDED, 1)


async def test_it_claims_no_more_than_has_room() -> None:
    """Of 8 places batch has 7, and one is left for whoever waits for an answer."""
    world, gate = World(), Gate()
    replica = FakeReplica([*answer("x")[:2], gate, answer("x")[2]], places=8)
    async with world.gateway(replica) as gateway:
        for number in range(20):
            await world.schedule.accept(sealed_job(gateway.seals, world.clock, job_id=f"job_{number}"))
        await world.pass_s(5)
        assert (gateway.worker.running, replica.running, gateway.bench.admission.waiting) == (7, 7, 0)
        async with asyncio.timeout(5), gateway.bench.permit() as permit:
            assert permit.waited_s == 0
        gate.open.set()
        for number in range(20):
            assert (await world.end_of(f"job_{number}")).attempts == 1


async def test_an_explicit_limit_holds() -> None:
    world, gate = World(), Gate()
    replica = FakeReplica([*answer("x")[:2], gate, answer("x")[2]])
    async with world.gateway(replica, most=3) as gateway:
        for number in range(5):
            await world.schedule.accept(sealed_job(gateway.seals, world.clock, job_id=f"job_{number}"))
        await world.pass_s(5)
        assert gateway.worker.running == 3


async def test_an_outage_of_all_replicas_costs_most_jobs_nothing() -> None:
    """A few are tried now and then; the others wait in the schedule, and have all their attempts after it."""
    world, replica = World(), FakeReplica()
    async with world.gateway(replica) as gateway:
        replica.healthy = False
        gateway.bench.router.lost(gateway.bench.router._replicas[0])
        for number in range(200):
            await world.schedule.accept(sealed_job(gateway.seals, world.clock, job_id=f"job_{number}"))
        await world.pass_s(20)
        states = [(await standing(world.schedule, f"job_{number}"))[0] for number in range(200)]
        assert sum(job.state is JobState.FAILED for job in states) <= 20
        assert sum(len(job.history) for job in states) <= 100
        assert all(each.error_reason == NoReplica.reason for job in states for each in job.history)


async def test_r38_a_stolen_lease_ends_the_job_once_and_fences_the_late_report_off() -> None:
    world, gate = World(lease_s=15), Gate()
    replica = FakeReplica([*answer("late")[:2], gate, answer("late")[2]])
    frozen = FrozenWorker(world.schedule)
    async with world.gateway(replica, schedule=frozen) as first:
        job = sealed_job(first.seals, world.clock)
        await world.schedule.accept(job)
        await world.until(gate.reached.is_set)
        frozen.awake.clear()
        # It has the whole answer, and cannot say so before its lease has ended.
        gate.open.set()
        await world.pass_s(16)
        async with world.gateway(FakeReplica(answer("in time"))) as second:
            found = await world.end_of()
            assert (found.state, found.attempts) == (JobState.SUCCEEDED, 2)
            assert [each.error_reason for each in found.history] == ["WORKER_LOST"]
            frozen.awake.set()
            await world.until(lambda: first.worker.running == 0)
            assert frozen.refused == ["job_1"]
            after, result = await standing(world.schedule)
            assert after == found
            assert second.result(job, result).generate.choices[0].text == "in time"


@pytest.mark.parametrize("number", range(6))
async def test_r38_whatever_stalls_each_job_ends_once_and_attempts_are_counted(number: int) -> None:
    """Gateways that freeze for seconds, a replica that fails, and a schedule that is away at times."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed, "run", number)
    draw, world = random.Random(seed), World(lease_s=5)
    scripts = [
        [EngineFault("fault")] if draw.random() < 0.3 else answer(*"word " * draw.randint(1, 3))
        for _ in range(400)
    ]
    frozen = [FrozenWorker(world.schedule) for _ in range(3)]
    ends: dict[str, list[str]] = {}
    take = world.schedule.report

    async def recorded(given: Sequence[AttemptEnd]) -> Sequence[bool]:
        before = [(await standing(world.schedule, end.job_id))[0] for end in given]
        taken = await take(given)
        for old in before:
            new, _ = await standing(world.schedule, old.job.job_id)
            if new.state.is_final and not old.state.is_final:
                ends.setdefault(old.job.job_id, []).append(new.state.name)
        return taken

    world.schedule.report = recorded  # type: ignore[method-assign]
    async with (
        world.gateway(FakeReplica(*scripts, places=4), schedule=frozen[0]) as first,
        world.gateway(FakeReplica(*reversed(scripts), places=4), schedule=frozen[1]),
        world.gateway(FakeReplica(*scripts, places=4), schedule=frozen[2]),
    ):
        names = [f"job_{number}" for number in range(30)]
        for name in names:
            await world.schedule.accept(
                sealed_job(first.seals, world.clock, job_id=name, max_attempts=draw.randint(2, 6))
            )
        for _ in range(40):
            for each in frozen:
                if draw.random() < 0.3:
                    each.awake.clear()
                else:
                    each.awake.set()
                each.error = DependencyUnavailable("away") if draw.random() < 0.1 else None
            await world.pass_s(draw.choice([0.5, 1.0, 4.0]))
        for each in frozen:
            each.awake.set()
            each.error = None
        for name in names:
            found = await world.end_of(name, within_s=2000)
            assert found.attempts <= found.job.max_attempts
            assert len(ends.get(name, ["LEASE"])) == 1
            failures = found.attempts - (found.state is JobState.SUCCEEDED)
            assert len(found.history) == failures, (name, found)
            assert found.state in (JobState.SUCCEEDED, JobState.FAILED)
