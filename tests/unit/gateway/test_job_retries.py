"""A request whose caller asked for it goes on as a job where it fails for a passing reason, on both edges."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from llmos.gateway.v1 import generation_service_pb2, generation_service_pb2_grpc
from llmos.gateway.v1 import job_service_pb2 as pb
from llmos.jobs.v1 import payload_pb2

from services.gateway.jobs.seals import NoSeals
from services.mesh import errors
from services.mesh.events import Outcome
from services.mesh.jobs import RetryRequested
from tests.framework.gateway_fakes import KEY, Bench, FakeReplica, Gate, Step, answer
from tests.framework.gateway_grpc import AUTH
from tests.framework.gateway_http import serving as http_serving
from tests.framework.gateway_job_calls import CALLERS, CANARY, Served, jobs_served, refused
from tests.framework.gateway_jobs import JobBench
from tests.framework.waiting import eventually

HEADER = "x-llmos-retry-on-failure"
BODY = {"model": "echo-1", "messages": [{"role": "user", "content": CANARY}], "metadata": {"team": "a"}}
LOST: list[Step] = [errors.ReplicaLost("lost")]


def request() -> generation_service_pb2.GenerateRequest:
    found = generation_service_pb2.GenerateRequest()
    found.spec.model = "echo-1"
    found.spec.prompt.text = CANARY
    found.spec.labels["team"] = "a"
    found.retry_on_failure.max_attempts = 3
    found.retry_on_failure.give_up_after.CopyFrom(Duration(seconds=60))
    return found


def generate(served: Served, message: generation_service_pb2.GenerateRequest) -> Any:
    stub: Any = generation_service_pb2_grpc.GenerationServiceStub(served.channel)
    return stub.Generate(message, metadata=AUTH)


def bench_of(*scripts: list[Step]) -> Bench:
    return Bench([FakeReplica(*scripts)], callers=dict(CALLERS))


async def test_a_lost_replica_makes_a_job(tmp_path: Path) -> None:
    async with jobs_served(tmp_path, bench_of(LOST)) as served:
        error = await refused(generate(served, request()))
        job_id = error.metadata["job_id"]
        found = await eventually(lambda: served.get(job_id))
    assert isinstance(error, errors.ReplicaLost)
    assert job_id in error.hint
    (event,) = served.jobs.spool.events
    assert isinstance(event, RetryRequested)
    (ended, *_) = served.bench.audit.ended
    assert (event.job.job_id, event.attempts, event.error_reason) == (job_id, 1, "REPLICA_LOST")
    assert event.request_id == ended.facts.request_id
    assert ended.outcome is Outcome.FAILED
    assert (found.job.attempts, found.job.max_attempts) == (1, 3)
    assert dict(found.job.labels) == {"team": "a"}
    job = event.job
    opened = payload_pb2.RequestPayload.FromString(served.jobs.seals.open(job.request, job, "request"))
    assert opened.work.generate == request().spec
    assert (job.give_up_time - job.create_time).total_seconds() == 60


async def test_the_job_is_named_in_the_trailers(tmp_path: Path) -> None:
    async with jobs_served(tmp_path, bench_of(LOST)) as served:
        call = generate(served, request())
        error = await refused(call)
        trailers = dict(await call.trailing_metadata())
    assert trailers["x-llmos-job-id"] == error.metadata["job_id"]


@pytest.mark.parametrize(
    "failure",
    [
        errors.NoReplica("none"),
        errors.Overloaded("busy"),
        errors.RateLimit("slow"),
        errors.DependencyUnavailable("away"),
        errors.Draining("ends"),
    ],
)
async def test_what_passes_makes_a_job(failure: errors.LlmosError, tmp_path: Path) -> None:
    async with jobs_served(tmp_path, bench_of([failure])) as served:
        error = await refused(generate(served, request()))
    assert type(error) is type(failure)
    assert error.metadata["job_id"]


@pytest.mark.parametrize(
    "failure",
    [
        errors.ContextLengthExceeded("long"),
        errors.RequestInvalid("wrong"),
        errors.ModelNotFound("none"),
        errors.BudgetExhausted("spent"),
        errors.RateLimit("never fits", retryable=False),
        errors.EngineFault("fault"),
        errors.Internal("ours"),
    ],
)
async def test_what_does_not_pass_makes_none(failure: errors.LlmosError, tmp_path: Path) -> None:
    async with jobs_served(tmp_path, bench_of([failure])) as served:
        error = await refused(generate(served, request()))
    assert "job_id" not in error.metadata
    assert not served.jobs.spool.events


async def test_who_does_not_ask_gets_no_job(tmp_path: Path) -> None:
    message = request()
    message.ClearField("retry_on_failure")
    async with jobs_served(tmp_path, bench_of(LOST)) as served:
        error = await refused(generate(served, message))
        served.bench.replicas[0].scripts[:] = [answer("Hello")]
        answered = await generate(served, request())
    assert "job_id" not in error.metadata
    assert answered.choices[0].text == "Hello"
    assert not served.jobs.spool.events


async def test_a_caller_that_leaves_gets_no_job(tmp_path: Path) -> None:
    gate = Gate()
    async with jobs_served(tmp_path, bench_of([gate, *LOST])) as served:
        call = generate(served, request())
        await asyncio.wait_for(gate.reached.wait(), 10)
        call.cancel()
        await eventually(lambda: len(served.bench.audit.ended) == 1)
    assert served.bench.audit.ended[0].outcome is Outcome.CANCELLED
    assert not served.jobs.spool.events


async def test_a_job_that_cannot_be_kept_is_not_named(tmp_path: Path) -> None:
    async with jobs_served(tmp_path, bench_of(LOST)) as served:
        served.jobs.spool.error = errors.AuditUnavailable("full")
        error = await refused(generate(served, request()))
    assert isinstance(error, errors.ReplicaLost)
    assert "job_id" not in error.metadata


async def test_a_deployment_without_a_key_refuses_at_once(tmp_path: Path) -> None:
    async with jobs_served(tmp_path, bench_of(answer("Hello")), seals=NoSeals()) as served:
        error = await refused(generate(served, request()))
    assert isinstance(error, errors.StateConflict)
    assert not served.bench.replicas[0].requests


async def test_on_http_a_header_asks_for_it_and_one_names_the_job() -> None:
    bench = bench_of(LOST)
    jobs = JobBench(bench)
    async with http_serving(bench, jobs=jobs) as edge, httpx.AsyncClient(base_url=edge.url) as client:
        headers = {"authorization": f"Bearer {KEY}"}
        plain = await client.post("/v1/chat/completions", json=BODY, headers=headers)
        asked = await client.post(
            "/v1/chat/completions",
            json=BODY,
            headers=headers | {HEADER: "max_attempts=4, give_up_after_s=120"},
        )
    assert plain.status_code == asked.status_code == 503
    assert "x-llmos-job-id" not in plain.headers
    assert plain.headers["x-should-retry"] == "true"
    assert asked.headers["x-should-retry"] == "false", "who repeats it has it done twice"
    assert "retry-after" not in asked.headers
    (event,) = jobs.spool.events
    assert isinstance(event, RetryRequested)
    assert asked.headers["x-llmos-job-id"] == event.job.job_id
    assert event.job.job_id in asked.json()["error"]["message"]
    assert (event.job.max_attempts, event.attempts) == (4, 1)
    assert (event.job.give_up_time - event.job.create_time).total_seconds() == 120
    opened = payload_pb2.RequestPayload.FromString(jobs.seals.open(event.job.request, event.job, "request"))
    assert opened.work.generate.prompt.chat.messages[0].content[0].text == CANARY
    assert pb.JobWork(generate=opened.work.generate) == opened.work


@pytest.mark.parametrize(
    ("value", "stream"),
    [
        ("1", False),
        ("max_attempts=1", False),
        ("max_attempts=21", False),
        ("max_attempts=x", False),
        ("max_attempts=-3", False),
        ("max_attempts=99999999999", False),
        ("give_up_after_s=5", False),
        ("max_attempts=3,give_up_after_s=99999999", False),
        ("max_attempts=3,other=1", False),
        ("max_attempts=3", True),
    ],
)
async def test_a_wrong_header_is_refused(value: str, stream: bool) -> None:
    bench = bench_of(answer("Hello"))
    async with http_serving(bench) as edge, httpx.AsyncClient(base_url=edge.url) as client:
        found = await client.post(
            "/v1/chat/completions",
            json=BODY | {"stream": stream},
            headers={"authorization": f"Bearer {KEY}", HEADER: value},
        )
    assert found.status_code == 400
    assert found.json()["error"]["param"] == HEADER
    assert not bench.replicas[0].requests
