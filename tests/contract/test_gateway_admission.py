"""What admission refuses looks the same on both edges, each in its own words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc

from services.gateway.admission.permits import AdmissionLimits
from services.mesh import errors, status
from services.mesh.errors import LlmosError
from services.mesh.events import Outcome
from tests.framework import gateway_grpc, gateway_http
from tests.framework.gateway_fakes import MODEL, Bench, FakeReplica, Gate, answer
from tests.framework.waiting import eventually

Generate = Callable[[float | None], Awaitable[LlmosError | None]]
"""One request, with the seconds that the caller allows; how it was refused."""
both = pytest.mark.parametrize("kind", ["grpc", "http"])


@asynccontextmanager
async def opened(gate: Gate) -> AsyncIterator[None]:
    """A gate that is open in the end, also where the test fails: no drain waits for it."""
    try:
        yield
    finally:
        gate.open.set()


@asynccontextmanager
async def caller(kind: str, bench: Bench, folder: Path) -> AsyncIterator[Generate]:
    if kind == "grpc":
        async with gateway_grpc.serving(bench, folder) as channel:
            stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
            spec = generation_pb2.GenerationSpec(model="echo-1", prompt={"text": "hi"})
            request = generation_service_pb2.GenerateRequest(spec=spec)

            async def over_grpc(timeout_s: float | None = None) -> LlmosError | None:
                try:
                    await stub.Generate(request, metadata=gateway_grpc.AUTH, timeout=timeout_s)
                except grpc.aio.AioRpcError as error:
                    return status.from_rpc_error(error)
                return None

            yield over_grpc
    else:
        async with gateway_http.serving(bench) as http, httpx.AsyncClient(timeout=10) as client:
            body = {"model": "echo-1", "messages": [{"role": "user", "content": "hi"}]}

            async def over_http(timeout_s: float | None = None) -> LlmosError | None:
                own = {} if timeout_s is None else {"x-request-timeout-ms": f"{timeout_s * 1000:g}"}
                response = await client.post(
                    f"{http.url}/v1/chat/completions",
                    json=body,
                    headers={"authorization": f"Bearer {gateway_http.KEY}", **own},
                )
                if response.status_code == 200:
                    return None
                error = response.json()["error"]
                found = errors.BY_REASON[error["code"].upper()](error["message"])
                expected = {"OVERLOADED": 429, "REQUEST_INVALID": 400, "DEADLINE_EXCEEDED": 504}
                assert response.status_code == expected[found.reason]
                after = response.headers.get("retry-after")
                found.retry_after_s = None if after is None else float(after)
                return found

            yield over_http


@both
async def test_r12_a_full_queue_refuses_within_50_ms_and_says_when_to_retry(
    kind: str, tmp_path: Path
) -> None:
    gate = Gate()
    bench = Bench(
        [FakeReplica([gate, *answer("a")], places=1)],
        admission_limits=AdmissionLimits(max_queued=1),
    )
    async with caller(kind, bench, tmp_path) as generate, opened(gate):
        await bench.router.choose(MODEL.id)  # from now on it is known how many places there are
        taking = [asyncio.ensure_future(generate(None)) for _ in range(2)]
        await eventually(lambda: (bench.admission.running, bench.admission.waiting) == (1, 1))
        taken_s = []
        for _ in range(20):
            begun_s = time.monotonic()
            refused = await generate(None)
            taken_s.append(time.monotonic() - begun_s)
            assert isinstance(refused, errors.Overloaded)
            assert refused.retry_after_s == 1
        # The machine may be busy with other tests: the best of them shows what it costs.
        assert min(taken_s) < 0.05
        gate.open.set()
        await asyncio.gather(*taking)
    assert len(bench.replicas[0].requests) == 2
    assert [event.outcome for event in bench.audit.ended].count(Outcome.REJECTED) == 20
    assert bench.admission.running == bench.admission.waiting == 0


@both
async def test_r12_who_cannot_be_served_in_time_is_not_begun(kind: str, tmp_path: Path) -> None:
    gate = Gate()
    bench = Bench([FakeReplica([gate, *answer("a")], places=1)])
    async with caller(kind, bench, tmp_path) as generate, opened(gate):
        taking = asyncio.ensure_future(generate(None))
        await asyncio.wait_for(gate.reached.wait(), 5)
        refused = await generate(0.3)
        assert isinstance(refused, errors.Overloaded | errors.DeadlineExceeded)
        gate.open.set()
        await taking
    assert len(bench.replicas[0].requests) == 1
    assert bench.admission.running == bench.admission.waiting == 0


@both
async def test_r01_a_deadline_may_be_required(kind: str, tmp_path: Path) -> None:
    bench = Bench([FakeReplica()], require_deadline=True)
    async with caller(kind, bench, tmp_path) as generate:
        refused = await generate(None)
        assert isinstance(refused, errors.RequestInvalid)
        assert "deadline" in refused.message
        assert await generate(5.5) is None
    assert [event.outcome for event in bench.audit.ended] == [Outcome.REJECTED, Outcome.SUCCEEDED]


async def test_r01_the_callers_deadline_holds_on_http_too(tmp_path: Path) -> None:
    bench = Bench([FakeReplica([Gate()])])
    async with caller("http", bench, tmp_path) as generate:
        begun_s = time.monotonic()
        assert isinstance(await generate(0.3), errors.DeadlineExceeded)
        assert time.monotonic() - begun_s < 5
        for malformed in (float("inf"), -1.0, 1e300):
            assert isinstance(await generate(malformed), errors.RequestInvalid)
    assert bench.replicas[0].closed == 1


@both
async def test_who_leaves_the_queue_is_recorded_and_forgotten(kind: str, tmp_path: Path) -> None:
    gate = Gate()
    bench = Bench([FakeReplica([gate, *answer("a")], places=1)])
    async with caller(kind, bench, tmp_path) as generate, opened(gate):
        taking = asyncio.ensure_future(generate(None))
        await asyncio.wait_for(gate.reached.wait(), 5)
        leaving = asyncio.ensure_future(generate(None))
        await eventually(lambda: bench.admission.waiting == 1)
        leaving.cancel()
        await eventually(lambda: bench.admission.waiting == 0, timeout_s=2)
        gate.open.set()
        await taking
    await bench.trail.stop()
    assert [event.outcome for event in bench.audit.ended] == [Outcome.CANCELLED, Outcome.SUCCEEDED]
    assert len(bench.replicas[0].requests) == 1
