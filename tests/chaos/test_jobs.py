"""Jobs on real processes, whatever is killed: each ends once, none runs too often or too early.

`LLMOS_JOBS` says how many jobs there are: 200 in every run of the tests, 10,000 in `make jobs`. Of the
replica's answers 30 % fail; two gateways, logging and the broker are killed at random. What is judged is what
the schedule and the audit log say afterwards. Beside the jobs somebody streams: what that one waits for its
first token is measured before and meanwhile, with no kill going on.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest
from llmos.common.v1 import error_reason_pb2
from llmos.gateway.v1 import job_service_pb2 as pb

from deploy.dev.broker import Broker
from tests.conftest import MeshFactory
from tests.framework.calls import Caller, spec
from tests.framework.mesh import MeshHarness
from tests.framework.real_jobs import JobCaller
from tests.framework.waiting import eventually

JOBS = int(os.environ.get("LLMOS_JOBS", "200"))
IS_LONG = JOBS > 1000
PAUSES_S = (3.0, 8.0) if IS_LONG else (0.2, 1.0)
"""Between kills."""
MAX_ATTEMPTS = 4
WORK = "[[fail_percent=30]][[tokens=10]][[delay_ms=20]] job"
INTERACTIVE = "[[first_ms=100]][[tokens=2]][[delay_ms=1]] hello"
"""A prefill of 100 ms."""
SETTLED_S = 1.0 if IS_LONG else 0.0
"""After a kill, connections are made anew."""
SAMPLES = 300 if IS_LONG else 30
MOST_TIMES = 1.3
"""What the 99th percentile may be of its unloaded value."""
CLOCKS_S = 0.05
"""What times of two processes of this machine may differ by."""


class Crowd:
    """The mesh and who uses it."""

    def __init__(self, mesh: MeshHarness, broker: Broker, chance: random.Random) -> None:
        self.mesh = mesh
        self.broker = broker
        self.chance = chance
        self.calm = asyncio.Event()
        """Nothing is being killed or comes back."""
        self.kills: Counter[str] = Counter()
        self.callers = {name: JobCaller(mesh, gateway=name) for name in ("gateway", "gateway-1")}
        self.batch_id = ""

    async def counts(self) -> pb.CountJobsResponse:
        """By whichever gateway answers."""

        async def ask() -> pb.CountJobsResponse | None:
            for caller in self.callers.values():
                try:
                    counted: pb.CountJobsResponse = await caller.stub.CountJobs(
                        pb.CountJobsRequest(batch_id=self.batch_id),
                        metadata=self.mesh.bearer(),
                        timeout=10,
                    )
                except grpc.aio.AioRpcError:
                    continue
                return counted
            return None

        found = await eventually(ask, timeout_s=120, what="somebody counts")
        assert found is not None
        return found

    async def kill_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(*PAUSES_S))
            await self.kill_something()

    async def kill_something(self) -> None:
        victim = self.chance.choice(["gateway", "gateway-1", "logging", "broker"])
        self.kills[victim] += 1
        self.calm.clear()
        if victim == "broker":
            self.broker.kill()
            self.broker.start()
            await self.broker.wait_ready()
        else:
            self.mesh.kill(victim)
            await self.mesh.start(victim)
        await asyncio.sleep(SETTLED_S)
        self.calm.set()


async def submitted(crowd: Crowd) -> dict[str, float]:
    """The jobs' ids, with the earliest time of each, in seconds since the epoch."""
    now_s = time.time()
    earliest = [now_s + 5 if number % 10 == 0 else now_s for number in range(JOBS)]

    async def stream() -> AsyncIterator[pb.SubmitJobsRequest]:
        for number, at_s in enumerate(earliest):
            request = pb.SubmitJobsRequest()
            request.job.work.generate.CopyFrom(spec(f"{WORK} {number}"))
            request.job.max_attempts = MAX_ATTEMPTS
            if at_s > now_s:
                request.job.not_before_time.FromNanoseconds(int(at_s * 1e9))
            yield request

    caller = crowd.callers["gateway"]
    taken = await caller.stub.SubmitJobs(stream(), metadata=crowd.mesh.bearer(), timeout=300)
    assert not taken.refusals
    crowd.batch_id = taken.batch_id
    return dict(zip(taken.job_ids, earliest, strict=True))


async def first_token_s(crowd: Crowd) -> float | None:
    """Of one stream; None where it was broken by a kill."""
    caller = Caller(crowd.mesh, gateway="gateway")
    begun_s = time.monotonic()
    call = caller.begin(INTERACTIVE, timeout_s=20)
    took_s = None
    try:
        async for event in call:
            if took_s is None and event.HasField("delta"):
                took_s = time.monotonic() - begun_s
    except grpc.aio.AioRpcError:
        return None
    return took_s


async def sampled(crowd: Crowd, stop: asyncio.Event, most: int) -> list[float]:
    found: list[float] = []
    while len(found) < most and not stop.is_set():
        await crowd.calm.wait()
        took_s = await first_token_s(crowd)
        if took_s is not None and crowd.calm.is_set():
            found.append(took_s)
    return found


def p99(values: list[float]) -> float:
    return sorted(values)[min(int(len(values) * 0.99), len(values) - 1)]


async def jobs_of(crowd: Crowd) -> list[pb.Job]:
    found: list[pb.Job] = []
    token = ""
    while True:
        page = await crowd.callers["gateway"].stub.ListJobs(
            pb.ListJobsRequest(batch_id=crowd.batch_id, page_size=1000, page_token=token),
            metadata=crowd.mesh.bearer(),
            timeout=60,
        )
        found += page.jobs
        token = page.next_page_token
        if not token:
            return found


def judge(job: pb.Job, earliest_s: float) -> None:
    failures = job.failed_attempts
    assert job.attempts <= MAX_ATTEMPTS == job.max_attempts, job
    if job.state == pb.JOB_STATE_SUCCEEDED:
        assert len(failures) == job.attempts - 1, job
    else:
        assert job.state == pb.JOB_STATE_FAILED, job
        assert len(failures) == job.attempts == MAX_ATTEMPTS, job
        assert job.last_error.reason == failures[-1].error.reason != 0, job
    assert [each.number for each in failures] == list(range(1, len(failures) + 1)), job
    for number, each in enumerate(failures):
        begun_s = each.start_time.ToNanoseconds() / 1e9
        assert begun_s >= earliest_s - CLOCKS_S, job
        earliest_s = each.end_time.ToNanoseconds() / 1e9 + 0.5 * 2**number
    if job.state == pb.JOB_STATE_SUCCEEDED:
        assert job.end_time.ToNanoseconds() / 1e9 >= earliest_s - CLOCKS_S, job


@pytest.mark.slow
async def test_r38_every_job_ends_once_whatever_is_killed(make_mesh: MeshFactory, own_broker: Broker) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}, {JOBS} jobs")
    mesh = make_mesh(own_broker)
    mesh.configure("inference", max_running=16)
    mesh.configure("logging", lease_grace_s=5)
    for gateway in ("gateway", "gateway-1"):
        mesh.configure(gateway, job_lease_s=5, replicas=2)
    await mesh.start("auth", "logging", "inference", "gateway", "gateway-1")
    crowd = Crowd(mesh, own_broker, random.Random(seed))
    crowd.calm.set()
    unloaded = await sampled(crowd, asyncio.Event(), SAMPLES)

    earliest = await submitted(crowd)
    begun_s = time.monotonic()
    done = asyncio.Event()
    sampling = asyncio.create_task(sampled(crowd, done, 100_000))
    killing = asyncio.create_task(crowd.kill_for_ever())
    while True:
        counted = await crowd.counts()
        ended = counted.succeeded + counted.failed + counted.cancelled
        if ended == JOBS:
            break
        assert time.monotonic() - begun_s < 120 + JOBS * 0.5, counted
        assert not killing.done(), killing
        await asyncio.sleep(0.2)
    took_s = time.monotonic() - begun_s
    done.set()
    killing.cancel()
    await asyncio.gather(killing, return_exceptions=True)
    for name in {"logging", "gateway", "gateway-1"}:
        if not mesh.processes[name].running:
            await mesh.start(name)
        await mesh.wait_ready(name)
    await own_broker.wait_ready()
    crowd.calm.set()
    loaded = await sampling

    jobs = await jobs_of(crowd)
    assert {job.id for job in jobs} == earliest.keys()
    assert len(jobs) == JOBS
    for job in jobs:
        judge(job, earliest[job.id])
    dead = [job for job in jobs if job.state == pb.JOB_STATE_FAILED]
    assert (len(jobs) - len(dead), len(dead)) == (counted.succeeded, counted.failed)
    # What the audit log has of each attempt is one outcome.
    ids = {each.request_id for job in jobs for each in job.failed_attempts if each.request_id}
    ids |= {job.last_request_id for job in jobs if job.last_request_id}
    await Caller(mesh).outcomes(ids, timeout_s=120)

    reasons = Counter(
        error_reason_pb2.ErrorReason.Name(each.error.reason).removeprefix("ERROR_REASON_")
        for job in jobs
        for each in job.failed_attempts
    )
    print(f"{took_s:.0f} s, {JOBS / took_s:.0f} jobs/s, kills {dict(crowd.kills)}")
    print(f"{len(dead)} dead letters, {sum(job.attempts for job in jobs)} attempts, failures {dict(reasons)}")
    if unloaded and loaded:
        times = p99(loaded) / p99(unloaded)
        print(
            f"first token of who waits, p99: {p99(unloaded):.3f} s alone ({len(unloaded)}), "
            f"{p99(loaded):.3f} s beside ({len(loaded)}), {times:.2f} times"
        )
        if IS_LONG:
            assert times <= MOST_TIMES
