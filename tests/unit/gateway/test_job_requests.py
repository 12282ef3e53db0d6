"""A caller's request run as a job: for whom, through what, and what its errors mean."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import pytest
from llmos.jobs.v1 import payload_pb2
from msgspec import structs

from services.gateway.jobs.ports import Failed, JobClaim, Postponed, Report, ScheduledJob, Succeeded
from services.gateway.jobs.seals import NoSeals
from services.gateway.jobs.working.outcomes import report_of
from services.gateway.jobs.working.ports import Attempt
from services.gateway.jobs.working.requests import RequestRunner
from services.mesh import errors
from services.mesh.clock import ManualClock
from services.mesh.events import Edge, Outcome
from services.mesh.jobs import JobRequested, JobState
from services.mesh.policy import BudgetPeriod, LimitScope, LimitUnit, Plan, PlanLimit, RevocationKind
from services.mesh.revocation import Revocation
from tests.framework.gateway_fakes import ALICE, Bench, FakeReplica, Gate, answer, fixed_policy
from tests.framework.gateway_http import chain_of
from tests.framework.job_workers import REVOKED, JobBench, sealed_job
from tests.framework.schedules import ScheduleInMemory


def attempt(job: JobRequested) -> Attempt:
    scheduled = ScheduledJob(job, JobState.RUNNING, attempts=1)
    return Attempt(JobClaim(scheduled, 1, job.create_time + timedelta(seconds=15)), "req_of_attempt")


def job_bench(*replicas: FakeReplica, **fields: Any) -> JobBench:
    clock = ManualClock()
    bench = Bench(list(replicas) or [FakeReplica()], clock=clock, **fields)
    return JobBench(bench, ScheduleInMemory(clock))


async def run(bench: JobBench, job: JobRequested) -> Report:
    return await bench.requests.run(attempt(job))


async def test_it_is_one_authenticated_request_on_the_edge_of_jobs() -> None:
    bench = job_bench(FakeReplica(answer("Good", " day")))
    job = sealed_job(bench.seals, bench.bench.clock, labels={"team": "a"}, spec_labels={"run": "7"})
    begun = attempt(job)
    report = await bench.requests.run(begun)
    assert isinstance(report, Succeeded)
    message = bench.result(job, report.result).generate
    assert (message.request_id, message.choices[0].text) == ("req_of_attempt", "Good day")
    assert begun.progress_tokens == 2
    (started,), (end,) = bench.bench.audit.started, bench.bench.audit.ended
    assert started.facts == end.facts
    facts = end.facts
    assert (facts.edge, facts.method, facts.request_id) == (Edge.JOB, job.method, "req_of_attempt")
    assert facts.labels == {"team": "a", "run": "7"}
    assert end.outcome is Outcome.SUCCEEDED
    (request,) = bench.bench.replicas[0].requests
    assert request.priority.name == "BATCH"


async def test_it_acts_with_what_auth_says_today() -> None:
    """The scopes of the renewed token, not those that were stored."""
    bench = job_bench()
    job = sealed_job(bench.seals, bench.bench.clock)
    bench.renewals.renew = narrowed(bench)  # type: ignore[method-assign]
    report = await run(bench, job)
    assert isinstance(report, Failed)
    assert (report.error_reason, report.retryable) == ("SCOPE_MISSING", False)
    assert bench.bench.replicas[0].requests == []
    assert bench.bench.audit.ended[0].facts.identity == structs.replace(
        ALICE, scopes=frozenset({"models.read"})
    )


def narrowed(bench: JobBench) -> Callable[[Any], Awaitable[str]]:
    async def renew(identity: Any) -> str:
        bench.auth.keys["k"] = structs.replace(identity, scopes=frozenset({"models.read"}))
        return await bench.auth.exchange("k")

    return renew


@pytest.mark.parametrize("error", [REVOKED, errors.CredentialExpired("The API key has expired.")])
async def test_a_credential_that_acts_no_more_ends_the_job_and_nothing_is_sent(
    error: errors.LlmosError,
) -> None:
    bench = job_bench()
    bench.renewals.refused["alice"] = error
    report = await run(bench, sealed_job(bench.seals, bench.bench.clock))
    assert report == Failed(error.reason, 16, error.message, retryable=False)
    assert bench.bench.replicas[0].requests == []
    (end,) = bench.bench.audit.ended
    assert (end.outcome, end.error_reason, end.facts.identity) == (Outcome.REJECTED, error.reason, ALICE)


async def test_while_auth_is_away_a_job_waits_and_leaves_no_record() -> None:
    bench = job_bench()
    bench.renewals.error = errors.DependencyUnavailable("away")
    assert isinstance(await run(bench, sealed_job(bench.seals, bench.bench.clock)), Postponed)
    assert bench.bench.audit.ended == []


async def test_auth_is_asked_once_for_many_jobs_of_one_credential_until_it_is_revoked() -> None:
    bench = job_bench()
    clock = bench.bench.clock
    assert isinstance(clock, ManualClock)
    job = sealed_job(bench.seals, clock)
    await asyncio.gather(*(run(bench, job) for _ in range(5)))
    assert len(bench.renewals.asked) == 1
    await clock.advance(31)
    assert isinstance(await run(bench, job), Succeeded)
    assert len(bench.renewals.asked) == 2
    bench.renewals.refused["alice"] = REVOKED
    bench.bench.revoked.apply(
        False,
        1,
        [Revocation(1, RevocationKind.API_KEY, "key_1", clock.now(), clock.now() + timedelta(hours=1))],
    )
    assert report_reason(await run(bench, job)) == "CREDENTIAL_REVOKED"


def report_reason(report: Report) -> str:
    assert isinstance(report, Failed), report
    return report.error_reason


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": "job_2"},
        {"method": "/llmos.gateway.v1.GenerationService/StreamGenerate"},
        {"identity": structs.replace(ALICE, client_id="mallory")},
        {"identity": structs.replace(ALICE, tenant_id="other")},
    ],
)
async def test_r22_what_was_not_sealed_for_this_job_and_identity_is_sent_nowhere(
    change: dict[str, Any],
) -> None:
    """Whoever can write to Kafka runs nothing in another's name."""
    bench = job_bench()
    job = replace(sealed_job(bench.seals, bench.bench.clock), **change)
    report = await run(bench, job)
    assert isinstance(report, Failed)
    assert (report.error_reason, report.retryable) == ("DATA_CORRUPT", False)
    assert bench.bench.replicas[0].requests == []
    assert bench.renewals.asked == []


async def test_a_gateway_without_the_key_leaves_it_to_others() -> None:
    bench = job_bench()
    runner = RequestRunner(
        chain_of(bench.bench).links,
        bench.identities,
        bench.bench.completions,
        bench.payloads,
        NoSeals(),
        bench.bench.clock,
    )
    assert isinstance(await runner.run(attempt(sealed_job(bench.seals, bench.bench.clock))), Postponed)


async def test_what_this_version_does_not_serve_ends_it_on_record() -> None:
    bench = job_bench()
    job = sealed_job(bench.seals, bench.bench.clock)
    payload = payload_pb2.RequestPayload()
    payload.work.embed.model = "m"
    job = replace(job, request=bench.seals.seal(payload.SerializeToString(), job, "request"))
    assert report_reason(await run(bench, job)) == "NOT_IMPLEMENTED"
    assert bench.bench.audit.ended[0].error_reason == "NOT_IMPLEMENTED"


async def test_rules_about_addresses_hold_for_where_it_was_submitted() -> None:
    bench = job_bench()
    identity = structs.replace(ALICE, addresses=(ip_network("10.0.0.0/8"),))
    inside = sealed_job(bench.seals, bench.bench.clock, identity=identity, source_address="10.1.1.1")
    outside = sealed_job(bench.seals, bench.bench.clock, identity=identity, source_address="192.0.2.1")
    assert isinstance(await run(bench, inside), Succeeded)
    assert report_reason(await run(bench, outside)) == "POLICY_DENIED"


async def test_a_limit_of_the_tenant_holds_its_jobs_back() -> None:
    limit = PlanLimit(LimitUnit.REQUESTS_PER_MINUTE, LimitScope.TENANT, 1)
    bench = job_bench(policy=fixed_policy(plan=Plan("small", limits=(limit,))))
    job = sealed_job(bench.seals, bench.bench.clock)
    assert isinstance(await run(bench, job), Succeeded)
    report = await run(bench, job)
    assert isinstance(report, Postponed)
    assert 0 < report.retry_after_s == report.hold_tenant_s <= 60
    assert bench.bench.audit.ended[1].outcome is Outcome.REJECTED


async def test_a_budget_that_is_spent_is_looked_at_again_after_a_while() -> None:
    limit = PlanLimit(LimitUnit.BUDGET_TOKENS, LimitScope.KEY, 1, period=BudgetPeriod.DAY)
    bench = job_bench(policy=fixed_policy(plan=Plan("small", limits=(limit,))))
    report = await run(bench, sealed_job(bench.seals, bench.bench.clock))
    assert report == Postponed(900.0, 0.0)


async def test_the_give_up_time_is_its_deadline() -> None:
    gate = Gate()
    bench = job_bench(FakeReplica([gate]))
    job = sealed_job(bench.seals, bench.bench.clock)
    job = replace(job, give_up_time=bench.bench.clock.now() + timedelta(seconds=0.05))
    report = await run(bench, job)
    assert isinstance(report, Failed)
    assert (report.error_reason, report.retryable) == ("DEADLINE_EXCEEDED", True)
    assert bench.bench.replicas[0].closed == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.NoReplica("away"), "again"),
        (errors.ReplicaLost("lost"), "again"),
        (errors.EngineFault("fault"), "again"),
        (errors.DependencyUnavailable("away"), "again"),
        (errors.Internal("secret insides"), "again"),
        (errors.DeadlineExceeded("late"), "again"),
        (errors.DataCorrupt("a gap"), "again"),
        (errors.ModelNotFound("not yet"), "again"),
        (errors.RequestInvalid("wrong"), "end"),
        (errors.ContextLengthExceeded("long"), "end"),
        (errors.ScopeMissing("no"), "end"),
        (errors.PolicyDenied("no"), "end"),
        (errors.CredentialRevoked("no"), "end"),
        (errors.MessageTooLarge("large"), "end"),
        (errors.RateLimit("more than there ever is", retryable=False), "end"),
        (errors.RateLimit("wait", retry_after_s=500), "later"),
        (errors.ConcurrencyLimit("wait"), "later"),
        (errors.Overloaded("wait"), "later"),
        (errors.Draining("stops"), "later"),
        (errors.AuditUnavailable("full"), "later"),
        (errors.BudgetExhausted("spent"), "later"),
    ],
)
def test_what_an_error_means(error: errors.LlmosError, expected: str) -> None:
    report = report_of(error)
    if expected == "later":
        assert isinstance(report, Postponed)
        assert report.retry_after_s <= 900
    else:
        assert isinstance(report, Failed)
        assert report.retryable == (expected == "again")
        assert "insides" not in report.message
