"""Row 27 on real processes: whatever is killed, each request has exactly one outcome, and each job one end.

`LLMOS_CHAOS_KILLS` says how many kills there are: 12 in every run of the tests, 200 in `make chaos`.
"""

from __future__ import annotations

import asyncio
import os
import random

import grpc
import pytest
from llmos.gateway.v1 import job_service_pb2, job_service_pb2_grpc

from deploy.dev.broker import Broker
from tests.conftest import MeshFactory
from tests.framework.calls import OUTCOME, Caller, Streamed, spec
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

KILLS = int(os.environ.get("LLMOS_CHAOS_KILLS", "12"))


class Submitter:
    """Hands jobs in, and repeats one under the same key until it is told that the job is taken."""

    def __init__(self, mesh: MeshHarness, number: int) -> None:
        self._jobs = job_service_pb2_grpc.JobServiceStub(mesh.channel())
        self._metadata = mesh.bearer()
        self._number = number
        self.taken: list[str] = []

    async def submit(self, tokens: int, gateway_up: asyncio.Event) -> None:
        key = f"{self._number}-{len(self.taken)}"
        request = job_service_pb2.SubmitJobRequest(
            work={"generate": spec(f"[[tokens={tokens}]][[delay_ms=25]] job {key}")},
            idempotency_key=key,
            max_attempts=20,
        )
        while True:
            await gateway_up.wait()
            try:
                response = await self._jobs.SubmitJob(request, metadata=self._metadata, timeout=20)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                await asyncio.sleep(0.05)  # a polite client waits before it comes again
            else:
                self.taken.append(response.job.id)
                return

    async def ended(self, taken: set[str]) -> dict[str, job_service_pb2.Job]:
        """All jobs of the tenant by id, once these are known and all have ended."""

        async def all_ended() -> dict[str, job_service_pb2.Job]:
            found: dict[str, job_service_pb2.Job] = {}
            token = ""
            while True:
                request = job_service_pb2.ListJobsRequest(page_size=1000, page_token=token)
                try:
                    page = await self._jobs.ListJobs(request, metadata=self._metadata, timeout=20)
                except grpc.aio.AioRpcError as error:
                    raise AssertionError(f"jobs cannot be listed: {error.details()}") from error
                found |= {job.id: job for job in page.jobs}
                token = page.next_page_token
                if not token:
                    break
            missing = taken - found.keys()
            assert not missing, f"{len(missing)} jobs are not known, {sorted(missing)[:3]} for example"
            running = [job.id for job in found.values() if job.state < job_service_pb2.JOB_STATE_SUCCEEDED]
            assert not running, f"{len(running)} jobs have not ended, {running[:3]} for example"
            return found

        return await eventually(all_ended, timeout_s=180)


@pytest.mark.slow
async def test_r27_random_kills_of_gateway_logging_and_broker_lose_and_double_no_outcome(
    make_mesh: MeshFactory, own_broker: Broker
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    mesh = make_mesh(own_broker)
    mesh.configure("inference", max_running=16)
    mesh.configure("gateway", job_lease_s=5)
    mesh.configure("logging", lease_grace_s=5)
    await mesh.start()
    history: list[Streamed] = []
    stop, gateway_up = asyncio.Event(), asyncio.Event()
    gateway_up.set()

    async def client(number: int) -> None:
        caller = Caller(mesh)
        while not stop.is_set():
            # A polite client: it waits while the gateway is away. The pace leaves room for the restarts.
            await gateway_up.wait()
            tokens = chance.randrange(1, 20)
            stream = await caller.stream(f"[[tokens={tokens}]][[delay_ms=25]] client {number}", timeout_s=20)
            history.append(stream)

    async def hand_in(submitter: Submitter) -> None:
        while not stop.is_set():
            await submitter.submit(chance.randrange(20, 60), gateway_up)

    clients = [asyncio.create_task(client(number)) for number in range(6)]
    submitters = [Submitter(mesh, number) for number in range(2)]
    clients += [asyncio.create_task(hand_in(submitter)) for submitter in submitters]
    for kill in range(KILLS):
        victim = chance.choice(["gateway", "logging", "broker"])
        enough = len(history) + chance.randrange(1, 12)
        await eventually(lambda enough=enough: len(history) >= enough, timeout_s=60, what="load goes on")
        print(f"kill {kill}: {victim}")
        if victim == "broker":
            own_broker.kill()
            own_broker.start()
            await own_broker.wait_ready()
        else:
            if victim == "gateway":
                gateway_up.clear()
            mesh.kill(victim)
            await mesh.start(victim)
            gateway_up.set()
    stop.set()
    await asyncio.gather(*clients)

    ids = {stream.request_id for stream in history if stream.request_id}
    assert len(ids) == len([stream for stream in history if stream.request_id])
    assert all(stream.unbroken for stream in history)
    taken = [job_id for submitter in submitters for job_id in submitter.taken]
    assert len(taken) == len(set(taken))
    jobs = await submitters[0].ended(set(taken))
    assert jobs.keys() == set(taken), "each is there once, whatever was repeated"
    assert {job.state for job in jobs.values()} == {job_service_pb2.JOB_STATE_SUCCEEDED}
    again = sum(job.attempts > 1 for job in jobs.values())
    print(f"{len(jobs)} jobs, {again} of them in more than one attempt")

    caller = Caller(mesh)
    attempts = {job.last_request_id for job in jobs.values()}
    assert len(attempts) == len(jobs)
    outcomes = await caller.outcomes(ids | attempts, timeout_s=90)
    assert ids | attempts <= outcomes.keys()
    for attempt in attempts:
        assert outcomes[attempt] in {OUTCOME.OUTCOME_SUCCEEDED, OUTCOME.OUTCOME_ABORTED}
    for stream in history:
        if stream.finished:
            # A gateway may die after its last byte and before its outcome.
            assert outcomes[stream.request_id] in {OUTCOME.OUTCOME_SUCCEEDED, OUTCOME.OUTCOME_ABORTED}
    finished = [stream for stream in history if stream.finished]
    lost = [s for s in finished if outcomes[s.request_id] == OUTCOME.OUTCOME_ABORTED]
    print(f"{len(history)} requests, {len(finished)} finished, {len(lost)} of them called aborted")
    assert len(finished) > 20
