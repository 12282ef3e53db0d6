"""Limits as the use case and both edges show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from llmos.gateway.v1 import (
    generation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
)

from services.gateway.limits.headers import duration
from services.gateway.limits.limiter import Standing
from services.mesh import errors
from services.mesh.clock import ManualClock
from services.mesh.policy import BudgetPeriod, LimitScope, LimitUnit, ModelPrice, Plan, PlanLimit
from tests.framework import gateway_grpc, gateway_http
from tests.framework.gateway_fakes import ALICE, Bench, FakeReplica, Gate, answer, fixed_policy, generation

RPM, TPM, CONCURRENT = (
    LimitUnit.REQUESTS_PER_MINUTE,
    LimitUnit.TOKENS_PER_MINUTE,
    LimitUnit.CONCURRENT_REQUESTS,
)
KEY, CLIENT, TENANT = LimitScope.KEY, LimitScope.CLIENT, LimitScope.TENANT
PRICE = ModelPrice(prompt=1_000_000, cached_prompt=0, completion=2_000_000)
"""One millionth a token of the prompt, and two a token of the answer."""


def bench_of(*limits: PlanLimit, replica: FakeReplica | None = None) -> Bench:
    plan = Plan("plan", limits=limits, currency="EUR", prices=(PRICE,))
    return Bench([replica or FakeReplica()], policy=fixed_policy(plan=plan), clock=ManualClock())


async def generate(bench: Bench, **changes: Any) -> dict[str, str]:
    """Returns what the caller is told beside the answer."""
    async with bench.call() as record:
        await bench.completions.generate(record, generation(**changes))
        return record.response_metadata


async def standings(bench: Bench) -> list[Standing]:
    return [each.standing for each in await bench.limits.left(ALICE)]


async def test_what_was_used_is_settled() -> None:
    month = BudgetPeriod.MONTH
    bench = bench_of(
        PlanLimit(RPM, KEY, 60),
        PlanLimit(TPM, CLIENT, 6000),
        PlanLimit(CONCURRENT, TENANT, 3),
        PlanLimit(LimitUnit.BUDGET_TOKENS, TENANT, 10_000, period=month),
        PlanLimit(LimitUnit.BUDGET_MONEY, TENANT, 10_000, period=month),
    )
    told = await generate(bench, max_tokens=50)
    # the prompt is guessed to be one token, and the engine counts 7, of which 3 were kept; it says 2
    assert told == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5949",
        "x-ratelimit-reset-tokens": "510ms",
    }
    assert [stands.remaining for stands in await standings(bench)] == [59, 5991, 3, 9991, 10_000 - 4 - 2 * 2]
    assert all(stands.reserved == 0 for stands in await standings(bench))


async def test_the_engines_count_corrects_the_reservation() -> None:
    gate = Gate()
    started, *rest = answer("a", "b")
    bench = bench_of(PlanLimit(TPM, KEY, 6000), replica=FakeReplica([gate, started, gate, *rest]))
    async with bench.call() as record:
        events = bench.completions.stream(record, generation(max_tokens=50, n=1))
        gate.open.set()
        await anext(events)
        assert (await standings(bench))[0].reserved == 7 + 50
        await events.aclose()
        record.complete()
    assert (await standings(bench))[0] == Standing(5993, 0.07, 0)


async def test_a_request_that_no_engine_began_costs_nothing() -> None:
    lost = FakeReplica([errors.ReplicaLost("gone")])
    bench = bench_of(PlanLimit(RPM, KEY, 60), PlanLimit(TPM, KEY, 6000), replica=lost)
    with pytest.raises(errors.ReplicaLost):
        await generate(bench)
    assert [stands.remaining for stands in await standings(bench)] == [60, 6000]


async def test_a_limit_of_a_model_is_for_that_model() -> None:
    bench = bench_of(PlanLimit(RPM, KEY, 1, model="another"), PlanLimit(RPM, KEY, 2, model="echo-1"))
    for _ in range(2):
        await generate(bench)
    with pytest.raises(errors.RateLimit, match="for the model `echo-1`, use 2 requests a minute"):
        await generate(bench)
    assert [stands.remaining for stands in await standings(bench)] == [1, 0]


async def test_a_rate_says_when_there_is_more_and_keeps_its_word() -> None:
    bench = bench_of(PlanLimit(RPM, TENANT, 6))
    for _ in range(6):
        await generate(bench)
    with pytest.raises(errors.RateLimit) as caught:
        await generate(bench)
    assert caught.value.retry_after_s == pytest.approx(10)
    assert "This tenant may use 6 requests a minute; 0 requests left" in caught.value.message
    assert "in 10s" in caught.value.message
    assert caught.value.quota[0].subject == "tenant:acme"
    await bench.clock.advance(10)  # type: ignore[attr-defined]
    await generate(bench)


async def test_what_is_never_allowed_is_not_to_be_retried() -> None:
    bench = bench_of(PlanLimit(TPM, KEY, 100))
    with pytest.raises(errors.RateLimit) as caught:
        await generate(bench, max_tokens=500)
    assert (caught.value.retryable, caught.value.retry_after_s) == (False, None)
    assert "max_tokens" in caught.value.hint
    await generate(bench, max_tokens=50)


async def test_a_budget_of_money_is_renewed_with_its_period() -> None:
    bench = bench_of(PlanLimit(LimitUnit.BUDGET_MONEY, TENANT, 110, period=BudgetPeriod.DAY))
    await generate(bench, max_tokens=50)
    with pytest.raises(errors.BudgetExhausted) as caught:
        await generate(bench, max_tokens=52)
    assert not caught.value.retryable
    assert "may use 0.000110 EUR a day; 0.000102 EUR left" in caught.value.message
    assert "renewed in 24h0m0s" in caught.value.message
    await bench.clock.advance(86_400)  # type: ignore[attr-defined]
    await generate(bench, max_tokens=52)


async def test_a_plan_that_changes_forgets_nothing() -> None:
    bench = bench_of(PlanLimit(LimitUnit.BUDGET_TOKENS, TENANT, 2000, period=BudgetPeriod.DAY))
    await generate(bench)
    more = PlanLimit(LimitUnit.BUDGET_TOKENS, TENANT, 5000, period=BudgetPeriod.DAY)
    bench.policy.engine = fixed_policy(plan=Plan("plan", limits=(more,))).engine
    assert [stands.remaining for stands in await standings(bench)] == [4991]


@pytest.fixture
async def spent() -> Bench:
    """A bench whose caller has sent the one request of its minute."""
    plan = Plan("plan", limits=(PlanLimit(RPM, KEY, 1), PlanLimit(TPM, KEY, 9000)))
    bench = Bench([FakeReplica()], policy=fixed_policy(plan=plan))
    await generate(bench)
    return bench


async def test_a_refusal_over_http(spent: Bench) -> None:
    body = {"model": "echo-1", "messages": [{"role": "user", "content": "Hi"}]}
    async with gateway_http.serving(spent) as http, httpx.AsyncClient() as client:
        headers = {"authorization": f"Bearer {gateway_http.KEY}"}
        answer = await client.post(f"{http.url}/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert answer.headers["x-should-retry"] == "true"
    assert 55 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert answer.headers["x-ratelimit-remaining-tokens"].isdecimal()


async def test_a_refusal_over_grpc(spent: Bench, tmp_path: Path) -> None:
    spec = generation_pb2.GenerationSpec(model="echo-1")
    spec.prompt.text = "Hi"
    async with gateway_grpc.serving(spent, tmp_path) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(generation_service_pb2.GenerateRequest(spec=spec), metadata=gateway_grpc.AUTH)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailers = dict(caught.value.trailing_metadata() or ())
    assert trailers["x-ratelimit-remaining-requests"] == "0"
    status = rpc_status.from_call(caught.value)
    quota, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    assert any(detail.Unpack(quota) for detail in status.details)
    assert any(detail.Unpack(retry) for detail in status.details)
    assert quota.violations[0].subject == "key:acme/alice/key_1"
    assert quota.violations[0].description.startswith("REQUESTS_PER_MINUTE")
    assert 55 <= retry.retry_delay.seconds <= 60


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.00001, "0s"),
        (0.12, "120ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (90_061.5, "25h1m1.5s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
