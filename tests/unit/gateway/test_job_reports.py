"""How a worker's reports reach the schedule: several together, each until it is taken or refused."""

from __future__ import annotations

from services.mesh.jobs import JobState
from tests.framework.gateway_fakes import FakeReplica, answer
from tests.framework.job_workers import sealed_job, standing
from tests.framework.job_worlds import FrozenWorker, World


async def test_where_jobs_wait_for_a_place_their_reports_go_together() -> None:
    world = World()
    schedule = FrozenWorker(world.schedule)
    names = [f"job_{number}" for number in range(40)]
    async with world.gateway(FakeReplica(*[answer("Good")] * 40, places=4), schedule=schedule) as gateway:
        for name in names:
            await world.schedule.accept(sealed_job(gateway.seals, world.clock, job_id=name))
        for name in names:
            assert (await world.end_of(name)).state is JobState.SUCCEEDED
        await world.until(lambda: gateway.worker.running == 0)
    assert sum(schedule.messages) == 40
    assert len(schedule.messages) < 40


async def test_a_fault_of_ours_in_a_report_leaves_the_job_to_its_lease() -> None:
    world = World(lease_s=5)
    schedule = FrozenWorker(world.schedule)
    schedule.faults = 1
    async with world.gateway(FakeReplica(answer("lost"), answer("kept")), schedule=schedule) as gateway:
        job = sealed_job(gateway.seals, world.clock)
        await world.schedule.accept(job)
        found = await world.end_of()
        assert (found.state, [each.error_reason for each in found.history]) == (
            JobState.SUCCEEDED,
            ["WORKER_LOST"],
        )
        _, result = await standing(world.schedule)
        assert gateway.result(job, result).generate.choices[0].text == "kept"
