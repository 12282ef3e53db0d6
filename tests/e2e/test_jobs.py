"""Jobs on real processes with a real broker: from the submission to the result, and through outages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.common.v1 import error_reason_pb2
from llmos.gateway.v1 import generation_service_pb2, generation_service_pb2_grpc, job_service_pb2_grpc
from llmos.gateway.v1 import job_service_pb2 as pb

from deploy.dev.broker import Broker
from services.mesh import errors
from tests.conftest import MeshFactory
from tests.framework.gateway_job_calls import refused
from tests.framework.identities import Identities, bearer
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

MODEL = "echo"
CANARY = "the canary sings in the mine"
LONG_S = 60.0


def submission(text: str, **fields: Any) -> pb.SubmitJobRequest:
    request = pb.SubmitJobRequest(**fields)
    request.work.generate.model = MODEL
    request.work.generate.prompt.text = text
    return request


@dataclass
class Caller:
    """A tenant's client and its calls."""

    jobs: Any
    metadata: Any

    async def submit(self, text: str, **fields: Any) -> pb.Job:
        answer = await self.jobs.SubmitJob(submission(text, **fields), metadata=self.metadata)
        job: pb.Job = answer.job
        return job

    async def get(self, job_id: str) -> pb.GetJobResponse:
        found: pb.GetJobResponse = await self.jobs.GetJob(pb.GetJobRequest(id=job_id), metadata=self.metadata)
        return found

    async def ended(self, job_id: str) -> pb.GetJobResponse:
        async def final() -> pb.GetJobResponse | None:
            try:
                found = await self.get(job_id)
            except grpc.aio.AioRpcError:  # logging has only come back, or the job is on its way to it
                return None
            return found if found.job.state >= pb.JOB_STATE_SUCCEEDED else None

        found = await eventually(final, timeout_s=LONG_S, what=f"{job_id} ended")
        assert found is not None
        return found


async def caller(mesh: MeshHarness, identities: Identities, tenant_id: str) -> Caller:
    await identities.tenant(tenant_id)
    await identities.client(tenant_id, f"{tenant_id}-app")
    _, key = await identities.api_key(f"{tenant_id}-app")
    return Caller(job_service_pb2_grpc.JobServiceStub(mesh.channel()), bearer(key))


async def test_jobs_run_and_are_their_tenants_alone(mesh: MeshHarness, broker: Broker) -> None:
    await mesh.start()
    identities = Identities(mesh)
    acme, other = [await caller(mesh, identities, name) for name in ("acme", "umbrella")]

    # Handed in, watched, its result read; a repeat is the same job.
    job = await acme.submit(f"{CANARY} [[tokens=4]]", idempotency_key="k", labels={"team": "a"})
    watched = [
        each async for each in acme.jobs.WatchJob(pb.WatchJobRequest(id=job.id), metadata=acme.metadata)
    ]
    found = await acme.ended(job.id)
    again = await acme.submit(f"{CANARY} [[tokens=4]]", idempotency_key="k", labels={"team": "a"})
    assert watched[-1].job.state == found.job.state == pb.JOB_STATE_SUCCEEDED
    assert watched[-1].result == found.result
    assert found.result.generate.choices[0].text
    assert found.result.generate.usage.completion_tokens == 4
    assert found.job.attempts == 1
    assert found.result.generate.request_id == found.job.last_request_id
    assert again.id == job.id
    mismatch = await refused(
        acme.jobs.SubmitJob(submission("another", idempotency_key="k"), metadata=acme.metadata)
    )
    assert isinstance(mismatch, errors.IdempotencyMismatch)

    # Another tenant's are not there.
    for call in (
        other.jobs.GetJob(pb.GetJobRequest(id=job.id), metadata=other.metadata),
        other.jobs.CancelJob(pb.CancelJobRequest(id=job.id), metadata=other.metadata),
    ):
        assert isinstance(await refused(call), errors.NotFound)

    # Waiting ones are listed and cancelled.
    tomorrow = Timestamp()
    tomorrow.FromDatetime(datetime.now(UTC) + timedelta(days=1))
    later = await acme.submit("later", not_before_time=tomorrow, labels={"when": "later"})
    listed = await acme.jobs.ListJobs(pb.ListJobsRequest(labels={"when": "later"}), metadata=acme.metadata)
    cancelled = await acme.jobs.CancelJob(pb.CancelJobRequest(id=later.id), metadata=acme.metadata)
    assert [each.id for each in listed.jobs] == [later.id]
    assert cancelled.job.state == pb.JOB_STATE_CANCELLED

    # Many at once.
    async def many() -> AsyncIterator[pb.SubmitJobsRequest]:
        for index in range(40):
            yield pb.SubmitJobsRequest(job=submission(f"{index} [[tokens=2]]"))

    taken = await acme.jobs.SubmitJobs(many(), metadata=acme.metadata)
    assert len(taken.job_ids) == 40

    async def all_done() -> bool:
        request = pb.CountJobsRequest(batch_id=taken.batch_id)
        counts = await acme.jobs.CountJobs(request, metadata=acme.metadata)
        return bool(counts.succeeded == 40)

    await eventually(all_done, timeout_s=LONG_S)

    # One that is given up is a dead letter, and runs again as another.
    request = submission(f"{CANARY} [[tokens=2]]", max_attempts=1)
    request.work.generate.model = "no-such-model"
    dead = (await acme.jobs.SubmitJob(request, metadata=acme.metadata)).job
    assert (await acme.ended(dead.id)).job.state == pb.JOB_STATE_FAILED
    letters = await acme.jobs.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=acme.metadata)
    (letter,) = letters.dead_letters
    assert letter.error.reason == error_reason_pb2.ERROR_REASON_MODEL_NOT_FOUND
    replayed = [
        each
        async for each in acme.jobs.ReplayDeadLetters(
            pb.ReplayDeadLettersRequest(override=pb.ReplayOverride(model=MODEL)), metadata=acme.metadata
        )
    ]
    assert (await acme.ended(replayed[0].job.id)).job.state == pb.JOB_STATE_SUCCEEDED
    assert CANARY not in str([letters, listed])

    # Nobody but the gateway's memory ever had the prompt.
    await mesh.stop("gateway")
    await mesh.stop("logging")
    topics = list(broker.folder.rglob(f"{mesh.plan.topic_prefix}.*/*"))
    files = [file for file in (*mesh.state.root.rglob("*"), *topics) if file.is_file()]
    assert any("jobs.v1" in str(file) for file in files)
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]


async def test_what_is_handed_in_during_an_outage_arrives(make_mesh: MeshFactory, own_broker: Broker) -> None:
    mesh = make_mesh(own_broker)
    await mesh.start()
    acme = await caller(mesh, Identities(mesh), "acme")
    first = await acme.submit("first [[tokens=2]]")
    assert (await acme.ended(first.id)).job.state == pb.JOB_STATE_SUCCEEDED

    # Kafka and logging go; jobs are taken all the same, a repeat as the same one.
    own_broker.kill()
    await own_broker.process.wait_ended(10)
    mesh.kill("logging")
    await mesh.processes["logging"].wait_ended(10)
    job = await acme.submit("second [[tokens=2]]", idempotency_key="k")
    again = await acme.submit("second [[tokens=2]]", idempotency_key="k")
    away = await refused(acme.jobs.GetJob(pb.GetJobRequest(id=job.id), metadata=acme.metadata))
    assert again.id == job.id
    assert isinstance(away, errors.DependencyUnavailable)

    # With no replica either, a request that asked for it goes on as a job.
    mesh.kill("inference")
    await mesh.processes["inference"].wait_ended(10)
    request = generation_service_pb2.GenerateRequest(spec=submission("third [[tokens=2]]").work.generate)
    request.retry_on_failure.max_attempts = 20
    generation: Any = generation_service_pb2_grpc.GenerationServiceStub(mesh.channel())
    failed = await refused(generation.Generate(request, metadata=acme.metadata))
    third = failed.metadata["job_id"]

    own_broker.start()
    await own_broker.wait_ready()
    await mesh.start("logging", "inference")
    for job_id in (job.id, third):
        found = await acme.ended(job_id)
        assert found.job.state == pb.JOB_STATE_SUCCEEDED, found.job
    counts = await acme.jobs.CountJobs(pb.CountJobsRequest(), metadata=acme.metadata)
    assert (counts.succeeded, counts.waiting, counts.running, counts.failed) == (3, 0, 0, 0)
    assert found.job.attempts >= 2
