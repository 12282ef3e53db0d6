"""Handing in jobs through the gateway's edge, over a schedule and a spool in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.gateway.v1 import job_service_pb2 as pb
from llmos.jobs.v1 import payload_pb2

from services.gateway.jobs.ports import Succeeded
from services.gateway.jobs.seals import NoSeals
from services.gateway.jobs.submission import WINDOW
from services.mesh import errors
from services.mesh.clock import ManualClock
from services.mesh.context import Identity
from services.mesh.events import Outcome
from services.mesh.jobs import JobRequested, JobState
from tests.framework.gateway_fakes import ALICE, Bench, FakeReplica
from tests.framework.gateway_grpc import AUTH
from tests.framework.gateway_job_calls import (
    CALLERS,
    CANARY,
    WEBHOOK_SECRET,
    auth_of,
    jobs_served,
    refused,
    submission,
)
from tests.framework.schedules import report_one
from tests.framework.waiting import eventually

NOW = ManualClock().now()


def at(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


async def test_a_job_is_sealed_kept_and_found(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        job = await served.submit(
            labels={"team": "a"},
            priority=pb.JOB_PRIORITY_HIGH,
            max_attempts=3,
            webhook=pb.Webhook(url="https://example.com/hook", secret=WEBHOOK_SECRET),
        )
        found = await served.get(job.id)
        listed = await served.stub.ListJobs(pb.ListJobsRequest(labels={"team": "a"}), metadata=AUTH)
        counts = await served.stub.CountJobs(pb.CountJobsRequest(), metadata=AUTH)
    (event,) = served.jobs.spool.events
    assert isinstance(event, JobRequested)
    assert job.id == event.job_id == found.job.id == listed.jobs[0].id
    assert found.job == job
    assert job.id.startswith("job_")
    assert len(job.id) == 36
    assert (job.state, job.model, job.attempts, job.max_attempts) == (pb.JOB_STATE_WAITING, "echo-1", 0, 3)
    assert job.method == "/llmos.gateway.v1.GenerationService/Generate"
    assert job.give_up_time.seconds - job.create_time.seconds == 86_400
    assert (dict(job.labels), job.priority) == ({"team": "a"}, pb.JOB_PRIORITY_HIGH)
    assert (counts.waiting, counts.running) == (1, 0)
    assert event.identity == ALICE
    assert event.has_webhook
    payload = payload_pb2.RequestPayload.FromString(served.jobs.seals.open(event.request, event, "request"))
    assert payload.work.generate.prompt.text == CANARY
    assert payload.webhook.secret == WEBHOOK_SECRET
    assert payload.source_address == "127.0.0.1"
    assert CANARY not in repr(event)
    assert CANARY.encode() not in event.request.ciphertext
    ended = served.bench.audit.ended
    assert [each.outcome for each in ended] == [Outcome.SUCCEEDED] * 4
    assert ended[0].facts.method == "/llmos.gateway.v1.JobService/SubmitJob"
    assert (ended[0].facts.model, dict(ended[0].facts.labels)) == ("echo-1", {"team": "a"})
    assert len(served.bench.audit.started) == 4


async def test_its_result_is_opened_for_its_tenant_alone(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        job = await served.submit()
        (claim,) = await served.jobs.claim()
        result = pb.JobResult()
        result.generate.choices.add(text="an answer")
        sealed = served.jobs.seals.seal(result.SerializeToString(), claim.scheduled.job, "result")
        assert await report_one(served.jobs.schedule, job.id, claim.fence, "req_9", Succeeded(sealed))
        found = await served.get(job.id)
        root = await served.get(job.id, "root-key")
        watched = [each async for each in served.stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=AUTH)]
        other = auth_of("other-key")
        for call in (
            served.stub.GetJob(pb.GetJobRequest(id=job.id), metadata=other),
            served.stub.CancelJob(pb.CancelJobRequest(id=job.id), metadata=other),
            served.stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=other).read(),
        ):
            assert isinstance(await refused(call), errors.NotFound)
        theirs = await served.stub.ListJobs(pb.ListJobsRequest(with_results=True), metadata=other)
        unfinished = await served.submit()
        ours = await served.stub.ListJobs(pb.ListJobsRequest(with_results=True), metadata=AUTH)
        plain = await served.stub.ListJobs(pb.ListJobsRequest(), metadata=AUTH)
    assert found.result == root.result == result
    listed = {each.id: given for each, given in zip(ours.jobs, ours.results, strict=True)}
    assert listed == {job.id: result, unfinished.id: pb.JobResult()}
    assert not plain.results
    assert (found.job.state, found.job.last_request_id) == (pb.JOB_STATE_SUCCEEDED, "req_9")
    assert [each.result for each in watched] == [result]
    assert not theirs.jobs


REFUSED: list[tuple[dict[str, Any], type[errors.LlmosError], str]] = [
    ({"max_attempts": 21}, errors.RequestInvalid, "max_attempts"),
    ({"not_before_time": at(datetime(2999, 1, 1, tzinfo=UTC))}, errors.RequestInvalid, "not_before_time"),
    *(
        ({"webhook": pb.Webhook(url=url, secret=WEBHOOK_SECRET)}, errors.RequestInvalid, "webhook.url")
        for url in (
            "http://example.com/",
            "ftp://example.com/",
            "https:///nowhere",
            "https://user:pw@example.com/",
            "https://example.com/#here",
            "https://example.com:99999/",
            "https://example.com/a b",
            "https://[::1/",
            "example.com",
        )
    ),
    *(
        (
            {"webhook": pb.Webhook(url="https://example.com/", secret=secret)},
            errors.RequestInvalid,
            "webhook.secret",
        )
        for secret in ("whsec_", "QUFB" * 8, "whsec_QUFB", "whsec_" + "QUFB" * 22, "whsec_" + "?" * 40)
    ),
]


@pytest.mark.parametrize(("fields", "kind", "named"), REFUSED)
async def test_what_is_wrong_with_a_submission_is_named(
    fields: dict[str, Any], kind: type[errors.LlmosError], named: str, tmp_path: Path
) -> None:
    async with jobs_served(tmp_path) as served:
        error = await refused(served.stub.SubmitJob(submission(**fields), metadata=AUTH))
    assert isinstance(error, kind)
    assert [each.field for each in error.violations] == [named]
    assert "pw@" not in str(error)
    assert not served.jobs.spool.events
    assert [each.outcome for each in served.bench.audit.ended] == [Outcome.REJECTED]


async def test_the_request_inside_is_checked_as_a_direct_one(tmp_path: Path) -> None:
    embed = pb.SubmitJobRequest()
    embed.work.embed.model = "echo-1"
    embed.work.embed.inputs.add(text="x")
    tools, hot, long, empty = submission(), submission(), submission(), pb.SubmitJobRequest()
    tools.work.generate.tools.add(name="f")
    hot.work.generate.sampling.temperature = 9
    long.work.generate.max_tokens = 100_000
    large = submission("x" * (896 * 1024))
    found = {}
    async with jobs_served(tmp_path) as served:
        for name, request in {
            "embed": embed, "tools": tools, "hot": hot, "long": long, "empty": empty, "large": large,
        }.items():  # fmt: skip
            found[name] = await refused(served.stub.SubmitJob(request, metadata=AUTH))
    kinds = {name: type(error) for name, error in found.items()}
    assert kinds == {
        "embed": errors.NotImplementedYet,
        "tools": errors.NotImplementedYet,
        "hot": errors.RequestInvalid,
        "long": errors.RequestInvalid,
        "empty": errors.RequestInvalid,
        "large": errors.MessageTooLarge,
    }
    fields = {name: [each.field for each in error.violations] for name, error in found.items()}
    assert fields["embed"] == ["work.embed"]
    assert fields["tools"] == ["work.generate.tools"]
    assert "`work.generate.tools`" in found["tools"].message
    assert fields["hot"] == ["work.generate.sampling.temperature"]
    assert fields["long"] == ["work.generate.max_tokens"]
    assert not served.jobs.spool.events


async def test_policy_is_that_of_the_request_inside(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        missing = await refused(served.stub.SubmitJob(submission(), metadata=auth_of("nobody-key")))
    assert isinstance(missing, errors.ScopeMissing)
    identity = Identity("acme", "small", "key_4", frozenset({"generate"}), models=("other-*",))
    bench = Bench([FakeReplica()], callers={**CALLERS, "small-key": identity})
    async with jobs_served(tmp_path, bench) as served:
        denied = await refused(served.stub.SubmitJob(submission(), metadata=auth_of("small-key")))
    assert isinstance(denied, errors.PolicyDenied)
    assert not served.jobs.spool.events
    assert served.bench.audit.ended[-1].outcome is Outcome.REJECTED


async def test_no_job_is_answered_that_is_not_on_the_disk(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        served.jobs.spool.error = errors.AuditUnavailable("full")
        error = await refused(served.stub.SubmitJob(submission(), metadata=AUTH))
    assert isinstance(error, errors.AuditUnavailable)
    assert served.bench.audit.ended[-1].outcome is Outcome.FAILED


async def test_a_tenant_has_so_many_jobs_at_once(tmp_path: Path) -> None:
    clock = ManualClock()
    bench = Bench([FakeReplica()], callers=dict(CALLERS), clock=clock)
    async with jobs_served(tmp_path, bench, max_jobs_per_tenant=3) as served:
        jobs = [await served.submit(text=str(index)) for index in range(3)]
        full = await refused(served.stub.SubmitJob(submission(), metadata=AUTH))
        await served.submit("other-key")
        counted = served.jobs.schedule.counted
        await served.stub.CancelJob(pb.CancelJobRequest(id=jobs[0].id), metadata=AUTH)
        await clock.advance(1.5)
        await served.submit()
    assert isinstance(full, errors.ConcurrencyLimit)
    assert full.retry_after_s == 5
    assert full.quota[0].subject == "tenant:acme"
    assert counted == 2, "counted once for each tenant in that second"


async def test_times_are_as_asked_for(tmp_path: Path) -> None:
    bench = Bench([FakeReplica()], callers=dict(CALLERS), clock=ManualClock())
    async with jobs_served(tmp_path, bench) as served:
        job = await served.submit(
            not_before_time=at(NOW + timedelta(hours=2)),
            give_up_after=Duration(seconds=60),
            result_ttl=Duration(seconds=7),
        )
        past = await served.submit(not_before_time=at(NOW - timedelta(hours=2)))
    assert job.next_attempt_time.ToDatetime(UTC) == NOW + timedelta(hours=2)
    assert job.give_up_time.ToDatetime(UTC) == NOW + timedelta(hours=2, seconds=60)
    assert past.next_attempt_time.ToDatetime(UTC) == NOW
    assert served.jobs.spool.events[0].result_ttl_s == 7  # type: ignore[union-attr]


async def test_jobs_that_begin_alike_are_of_a_group_of_the_tenants(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        for key, text in (
            ("alice-key", "x" * 512 + "a"),
            ("alice-key", "x" * 512 + "b"),
            ("alice-key", "y" * 512 + "b"),
            ("other-key", "x" * 512 + "a"),
        ):
            await served.submit(key, text)
    one, same, else_, theirs = (each.prefix_group for each in served.jobs.spool.events)  # type: ignore[union-attr]
    assert one == same
    assert len({one, else_, theirs}) == 3


async def many(*requests: pb.SubmitJobRequest) -> AsyncIterator[pb.SubmitJobsRequest]:
    for request in requests:
        yield pb.SubmitJobsRequest(job=request)


async def test_many_at_once_are_taken_or_refused_each(tmp_path: Path) -> None:
    requests = [submission(str(index)) for index in range(300)]
    requests[7] = submission(max_attempts=99)
    requests[8] = pb.SubmitJobRequest()
    requests[9] = submission("9", idempotency_key="k")
    requests[10] = submission("9", idempotency_key="k")
    requests[11] = submission("11", idempotency_key="k")
    async with jobs_served(tmp_path) as served:
        answer = await served.stub.SubmitJobs(many(*requests), metadata=AUTH)
        listed = await served.stub.ListJobs(
            pb.ListJobsRequest(batch_id=answer.batch_id, page_size=1000), metadata=AUTH
        )
    reasons = {each.index: each.error.reason for each in answer.refusals}
    assert sorted(reasons) == [7, 8, 11]
    assert all(each.error.message and each.error.status_code for each in answer.refusals)
    assert len(answer.job_ids) == 297
    assert len(set(answer.job_ids)) == 296, "a key and its repeat are one job"
    assert {job.id for job in listed.jobs} == set(answer.job_ids)
    texts = []
    for event in served.jobs.spool.events:
        assert isinstance(event, JobRequested)
        opened = served.jobs.seals.open(event.request, event, "request")
        texts.append(payload_pb2.RequestPayload.FromString(opened).work.generate.prompt.text)
    assert {text for text in texts if text not in ("9", "11")} == {
        str(index) for index in range(300) if index not in (7, 8, 9, 10, 11)
    }
    (ended,) = [each for each in served.bench.audit.ended if each.facts.method.endswith("SubmitJobs")]
    assert ended.outcome is Outcome.SUCCEEDED


async def test_few_are_in_memory_at_once(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        spool = served.jobs.spool
        spool.disk.clear()
        call = asyncio.ensure_future(
            served.stub.SubmitJobs(many(*[submission()] * 3 * WINDOW), metadata=AUTH)
        )
        await eventually(lambda: spool.waiting == WINDOW)
        spool.disk.set()
        answer = await call
    assert len(answer.job_ids) == 3 * WINDOW
    assert spool.most_waiting == WINDOW


async def test_more_than_may_be_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.jobs.submission.MAX_JOBS_AT_ONCE", 5)
    async with jobs_served(tmp_path) as served:
        answer = await served.stub.SubmitJobs(many(*[submission()] * 50), metadata=AUTH)
    assert len(answer.job_ids) == 5
    assert [each.index for each in answer.refusals] == [5]


async def test_nothing_at_all_is_taken_too(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        answer = await served.stub.SubmitJobs(many(), metadata=AUTH)
    assert (list(answer.job_ids), list(answer.refusals)) == ([], [])


async def test_a_stream_without_a_credential_or_a_scope_is_refused(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        missing = await refused(served.stub.SubmitJobs(many(submission())))
        denied = await refused(served.stub.SubmitJobs(many(submission()), metadata=auth_of("nobody-key")))
    assert isinstance(missing, errors.CredentialMissing)
    assert isinstance(denied, errors.ScopeMissing)
    assert not served.jobs.spool.events


async def test_broken_bytes_in_a_stream_end_the_call(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield pb.SubmitJobsRequest(job=submission()).SerializeToString()
        yield b"\xff\xff\xff"

    async with jobs_served(tmp_path) as served:
        call = served.channel.stream_unary("/llmos.gateway.v1.JobService/SubmitJobs")
        error = await refused(call(broken(), metadata=AUTH))
        job = await served.submit()
    assert isinstance(error, errors.RequestInvalid)
    assert job.id
    assert served.bench.audit.ended[0].outcome is not Outcome.SUCCEEDED


async def test_a_deployment_without_a_key_says_so(tmp_path: Path) -> None:
    async with jobs_served(tmp_path, seals=NoSeals()) as served:
        for call in (
            served.stub.SubmitJob(submission(), metadata=AUTH),
            served.stub.SubmitJobs(many(submission()), metadata=AUTH),
        ):
            error = await refused(call)
            assert isinstance(error, errors.StateConflict)
            assert "LLMOS_GATEWAY_PAYLOAD_KEY_FILE" in error.hint
    assert [each.outcome for each in served.bench.audit.ended] == [Outcome.REJECTED] * 2


async def test_cancelling_ends_a_job(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        job = await served.submit()
        cancelled = await served.stub.CancelJob(pb.CancelJobRequest(id=job.id), metadata=AUTH)
        again = await served.stub.CancelJob(pb.CancelJobRequest(id=job.id), metadata=AUTH)
        assert not await served.jobs.claim()
    assert cancelled.job.state == again.job.state == JobState.CANCELLED
