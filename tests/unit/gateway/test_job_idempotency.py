"""An idempotency key stands for one job of its tenant for a day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
from llmos.gateway.v1 import job_service_pb2 as pb

from services.gateway.jobs.ports import Succeeded
from services.mesh import errors
from services.mesh.clock import ManualClock
from tests.framework.gateway_fakes import Bench, FakeReplica
from tests.framework.gateway_grpc import AUTH
from tests.framework.gateway_job_calls import CALLERS, jobs_served, refused, submission
from tests.framework.schedules import report_one


async def test_a_repeat_is_the_same_job(tmp_path: Path) -> None:
    clock = ManualClock()
    bench = Bench([FakeReplica()], callers=dict(CALLERS), clock=clock)
    async with jobs_served(tmp_path, bench) as served:
        first = await served.submit(idempotency_key="k")
        again = await served.submit(idempotency_key="k")
        keyless = await served.submit()
        theirs = await served.submit("other-key", idempotency_key="k")
        mismatch = await refused(
            served.stub.SubmitJob(submission("another", idempotency_key="k"), metadata=AUTH)
        )
        await clock.advance(23 * 3600)
        next_day = await served.submit(idempotency_key="k")
        await clock.advance(3601)
        later = await served.submit(idempotency_key="k")
    assert first.id == again.id == next_day.id
    assert len({first.id, keyless.id, theirs.id, later.id}) == 4
    assert isinstance(mismatch, errors.IdempotencyMismatch)
    assert mismatch.metadata["job_id"] == first.id
    assert len(served.jobs.spool.events) == 4


async def test_a_key_whose_job_is_gone_makes_another(tmp_path: Path) -> None:
    clock = ManualClock()
    bench = Bench([FakeReplica()], callers=dict(CALLERS), clock=clock)
    async with jobs_served(tmp_path, bench) as served:
        fields: dict[str, Any] = {"idempotency_key": "k", "result_ttl": Duration(seconds=60)}
        jobs = []
        for _ in range(3):
            jobs.append(await served.submit(**fields))
            assert (await served.submit(**fields)).id == jobs[-1].id
            (claim,) = await served.jobs.claim()
            sealed = served.jobs.seals.seal(b"", claim.scheduled.job, "result")
            await report_one(served.jobs.schedule, jobs[-1].id, claim.fence, "req_9", Succeeded(sealed))
            await clock.advance(61)
            await served.jobs.schedule.sweep()
        gone = await refused(served.stub.GetJob(pb.GetJobRequest(id=jobs[0].id), metadata=AUTH))
    assert isinstance(gone, errors.NotFound)
    assert len({job.id for job in jobs}) == 3
    assert len(served.jobs.spool.events) == 3


async def test_a_repeat_while_the_schedule_is_away_is_the_same_job(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        served.jobs.schedule.away = True
        served.jobs.spool.held = True
        first = await served.submit(idempotency_key="k")
        again = await served.submit(idempotency_key="k")
        assert first.state == pb.JOB_STATE_WAITING
        away = await refused(served.stub.GetJob(pb.GetJobRequest(id=first.id), metadata=AUTH))
        served.jobs.schedule.away = False
        await served.jobs.spool.release()
        counts = await served.stub.CountJobs(pb.CountJobsRequest(), metadata=AUTH)
    assert first.id == again.id
    assert isinstance(away, errors.DependencyUnavailable)
    assert counts.waiting == 1
