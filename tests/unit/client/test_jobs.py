"""Both clients hand in jobs, follow them and read what they give."""

from __future__ import annotations

from datetime import UTC, datetime

import grpc
import llmos_client as sdk
import pytest
from llmos.gateway.v1 import embedding_service_pb2
from llmos.gateway.v1 import job_service_pb2 as pb

from tests.framework import scripted_jobs as script
from tests.framework.both_clients import REVOKED, UNAVAILABLE, Both, wait
from tests.framework.scripted_gateway import Fail, Hang, ScriptedGateway, generated
from tests.framework.scripted_jobs import CANCELLED, FAILED, RUNNING, SUCCEEDED, WAITING

DRAINING = Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_a_job_with_all_that_can_be_said_of_it(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.submitted("job_7"))
    job = await both.call(
        "jobs.submit",
        "why?",
        system="be brief",
        max_tokens=9,
        labels={"team": "a"},
        not_before=datetime(2030, 1, 1, tzinfo=UTC),
        max_attempts=3,
        give_up_after_s=90.5,
        priority=sdk.JobPriority.LOW,
        webhook_url="https://example.com/hook",
        webhook_secret="whsec_x",
        idempotency_key="mine",
        result_ttl_s=60,
    )
    assert (job.id, job.state, job.priority, job.model) == (
        "job_7",
        sdk.JobState.WAITING,
        sdk.JobPriority.LOW,
        "echo",
    )
    assert job.create_time == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    request = gateway.calls[0].request
    spec = request.work.generate
    assert [m.content[0].text for m in spec.prompt.chat.messages] == ["be brief", "why?"]
    assert (spec.model, spec.max_tokens, dict(spec.labels)) == ("echo", 9, {})
    assert (request.idempotency_key, request.max_attempts, dict(request.labels)) == ("mine", 3, {"team": "a"})
    assert request.not_before_time.ToDatetime(UTC) == datetime(2030, 1, 1, tzinfo=UTC)
    assert request.give_up_after.ToMilliseconds() == 90_500
    assert (request.result_ttl.seconds, request.priority) == (60, pb.JOB_PRIORITY_LOW)
    assert (request.webhook.url, request.webhook.secret) == ("https://example.com/hook", "whsec_x")


async def test_other_work_than_a_prompt(gateway: ScriptedGateway, both: Both) -> None:
    embed = embedding_service_pb2.EmbedRequest()
    for work in (embed, pb.JobWork(embed=embed)):
        gateway.will(script.submitted())
        await both.call("jobs.submit", work, model="small")
        assert gateway.calls[-1].request.work.embed.model == "small"
        with pytest.raises(sdk.InvalidRequest, match="max_tokens"):
            await both.call("jobs.submit", work, max_tokens=4)


async def test_a_submission_is_tried_again_under_one_key(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(UNAVAILABLE)
    gateway.will(script.submitted())
    await both.call("jobs.submit", "q")
    keys = [call.request.idempotency_key for call in gateway.calls]
    assert keys[0] == keys[1] != ""
    gateway.will(script.submitted())
    await both.call("jobs.submit", "q")
    assert gateway.calls[2].request.idempotency_key != keys[0]


@pytest.mark.parametrize(
    "options",
    [
        {"webhook_url": "https://example.com"},
        {"give_up_after_s": 0},
        {"max_attempts": -1},
        {"not_before": datetime(2030, 1, 1)},  # noqa: DTZ001
    ],
)
async def test_what_cannot_be_sent_is_not(
    gateway: ScriptedGateway, both: Both, options: dict[str, object]
) -> None:
    with pytest.raises((sdk.InvalidRequest, ValueError)):
        await both.call("jobs.submit", "q", **options)
    assert not gateway.calls


async def test_many_are_streamed_and_refused_one_by_one(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(DRAINING)
    refusal = pb.SubmitJobsResponse.Refusal(index=1, error=script.error("CONTEXT_LENGTH_EXCEEDED"))
    gateway.will(pb.SubmitJobsResponse(batch_id="batch_1", job_ids=["job_1", "job_3"], refusals=[refusal]))
    seen: list[int] = []
    many = await both.call(
        "jobs.submit_many",
        (one for one in ("a", sdk.NewJob("b", max_tokens=3, priority=sdk.JobPriority.HIGH), "c")),
        max_tokens=5,
        labels={"run": "1"},
        sent=seen.append,
    )
    assert (many.batch_id, many.job_ids) == ("batch_1", ("job_1", "job_3"))
    assert [(one.index, one.error.reason) for one in many.refusals] == [(1, "CONTEXT_LENGTH_EXCEEDED")]
    first, second = (call.request for call in gateway.calls)
    assert first == second, "a repeat has the same keys"
    jobs = [one.job for one in second]
    assert len({job.idempotency_key for job in jobs}) == 3
    assert [job.work.generate.max_tokens for job in jobs] == [5, 3, 5]
    assert [job.priority for job in jobs] == [0, pb.JOB_PRIORITY_HIGH, 0]
    assert all(dict(job.labels) == {"run": "1"} for job in jobs)
    assert seen[-3:] == [1, 2, 3]


async def test_many_are_sent_again_where_the_status_was_lost(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(Fail(grpc.StatusCode.INTERNAL, message="Internal error from Core"))
    gateway.will(pb.SubmitJobsResponse(batch_id="batch_1"))
    assert (await both.call("jobs.submit_many", ["a"])).batch_id == "batch_1"
    assert len(gateway.calls) == 2


async def test_many_with_a_key_of_the_callers(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(pb.SubmitJobsResponse())
    await both.call(
        "jobs.submit_many", ["a", sdk.NewJob("b", idempotency_key="own")], idempotency_key="monday"
    )
    assert [one.job.idempotency_key for one in gateway.calls[0].request] == ["monday-0", "own"]


async def test_one_bad_job_among_many_is_named_and_nothing_is_sent(
    gateway: ScriptedGateway, both: Both
) -> None:
    with pytest.raises(sdk.InvalidRequest, match="Job 1 cannot be sent"):
        await both.call("jobs.submit_many", ["a", sdk.NewJob("b", max_tokens=-1)])
    with pytest.raises(sdk.InvalidRequest, match="10,000"):
        await both.call("jobs.submit_many", ("q" for _ in range(10_001)))
    assert not gateway.calls


async def test_get_list_count_and_cancel(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.got(text="yes"))
    job = await both.call("jobs.get", "job_1")
    assert (job.state, job.result.text, job.result.completion.usage.prompt_tokens) == ("succeeded", "yes", 3)

    gateway.will(script.listed("job_3", "job_2", token="more"))
    gateway.will(script.listed("job_1", "job_0"))
    wanted = {"states": [sdk.JobState.SUCCEEDED], "labels": {"team": "a"}, "batch_id": "batch_1"}
    found = [job.id async for job in both.each(both.client.jobs.list(**wanted, limit=3))]
    assert found == ["job_3", "job_2", "job_1"]
    first, second = (call.request for call in gateway.calls[1:])
    assert (list(first.states), dict(first.labels), first.batch_id) == ([SUCCEEDED], {"team": "a"}, "batch_1")
    assert (first.page_size, second.page_size, second.page_token) == (3, 1, "more")

    with_results = script.listed("job_1", "job_0")
    with_results.results.extend([script.got(text="one").result, pb.JobResult()])
    gateway.will(with_results)
    texts = [
        job.result.text if job.result else None
        async for job in both.each(both.client.jobs.list(with_results=True))
    ]
    assert texts == ["one", None]
    assert gateway.calls[-1].request.with_results

    gateway.will(pb.CountJobsResponse(waiting=3, running=1, failed=2))
    counts = await both.call("jobs.count", "batch_1")
    assert (counts.unfinished, counts.total, counts.failed) == (4, 6, 2)

    gateway.will(pb.CancelJobResponse(job=script.job(CANCELLED)))
    assert (await both.call("jobs.cancel", "job_1")).state is sdk.JobState.CANCELLED


async def test_a_watch_goes_on_after_a_break_and_ends_with_the_job(
    gateway: ScriptedGateway, both: Both
) -> None:
    gateway.will(script.update(WAITING, attempts=0), script.update(RUNNING, partial="on"), DRAINING)
    gateway.will(UNAVAILABLE)
    gateway.will(script.update(RUNNING, partial="on"), script.update(RUNNING, partial="one"))  # ends too soon
    gateway.will(script.update(RUNNING, partial="one"), Fail(grpc.StatusCode.DEADLINE_EXCEEDED))
    gateway.will(script.update(SUCCEEDED, text="one two"))
    updates: list[sdk.JobUpdate] = []
    await both.read(both.client.jobs.watch("job_1"), at_each=updates.append)
    assert [(one.job.state, one.partial_texts) for one in updates] == [
        ("waiting", ()),
        ("running", ("on",)),
        ("running", ("one",)),
        ("succeeded", ()),
    ]
    assert updates[-1].job.result is not None
    assert updates[-1].job.result.text == "one two"
    assert {call.request.id for call in gateway.calls} == {"job_1"}
    assert len(gateway.calls) == 5


async def test_a_watch_ends_on_errors_that_stay_and_by_cancel(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.update(RUNNING), REVOKED)
    with pytest.raises(sdk.AuthenticationError):
        await both.read(both.client.jobs.watch("job_1"))
    gateway.will(script.update(RUNNING), Hang)
    watch = both.client.jobs.watch("job_1")
    with pytest.raises(sdk.Cancelled):
        await both.read(watch, at_each=lambda update: watch.cancel())
    await wait(gateway.calls[-1].ended)


async def test_a_result_is_waited_for(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.update(RUNNING), DRAINING)
    gateway.will(script.update(SUCCEEDED, text="yes"))
    assert (await both.call("jobs.result", "job_1")).text == "yes"

    gateway.will(script.update(RUNNING), Hang)
    with pytest.raises(sdk.DeadlineExceeded) as late:
        await both.call("jobs.result", "job_1", wait_s=0.2)
    assert late.value.job_id == "job_1"
    assert "running" in str(late.value)

    gateway.will(script.got(WAITING, None, 0))
    with pytest.raises(sdk.DeadlineExceeded):
        await both.call("jobs.result", "job_1", wait_s=0)
    assert gateway.calls[-1].method == "GetJob"


@pytest.mark.parametrize(
    ("state", "error", "part"),
    [
        (FAILED, sdk.Unavailable, "No replica can serve"),
        (CANCELLED, sdk.Cancelled, "was cancelled"),
        (SUCCEEDED, sdk.NotFound, "no longer kept"),
    ],
)
async def test_a_job_without_a_result_says_why(
    gateway: ScriptedGateway,
    both: Both,
    state: pb.JobState.ValueType,
    error: type[sdk.LlmosError],
    part: str,
) -> None:
    gateway.will(script.update(state))
    with pytest.raises(error, match=part) as raised:
        await both.call("jobs.result", "job_1")
    assert raised.value.job_id == "job_1"
    if state == FAILED:
        assert (raised.value.reason, raised.value.request_id) == ("NO_REPLICA", "req_9")


async def test_a_failed_request_that_became_a_job_is_not_tried_again_here(
    gateway: ScriptedGateway, both: Both
) -> None:
    gateway.will(
        Fail(grpc.StatusCode.UNAVAILABLE, "NO_REPLICA", metadata=(("job_id", "job_5"),), retry_after_s=0.01)
    )
    again = sdk.RetryOnFailure(max_attempts=3, give_up_after_s=60)
    with pytest.raises(sdk.Unavailable) as raised:
        await both.call("generate", "q", retry_on_failure=again)
    assert raised.value.job_id == "job_5"
    assert len(gateway.calls) == 1
    asked = gateway.calls[0].request.retry_on_failure
    assert (asked.max_attempts, asked.give_up_after.seconds) == (3, 60)

    gateway.will(UNAVAILABLE)
    gateway.will(generated("yes"))
    assert (await both.call("generate", "q", retry_on_failure=again)).text == "yes"


async def test_dead_letters_are_listed_replayed_and_discarded(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.dead_letters(script.dead_letter("dl_2"), token="more"))
    gateway.will(script.dead_letters(script.unreadable()))
    since = datetime(2023, 1, 1, tzinfo=UTC)
    wanted = {"reason": "NO_REPLICA", "model": "echo", "since": since}
    found = [one async for one in both.each(both.client.jobs.dead_letters.list(**wanted))]
    assert [(one.id, one.error.reason) for one in found] == [("dl_2", "NO_REPLICA"), ("dl_9", "DATA_CORRUPT")]
    assert found[0].job is not None
    assert [one.error.reason for one in found[0].job.failed_attempts] == ["NO_REPLICA"]
    assert (found[1].job, found[1].topic, found[1].place) == (None, "llmos.jobs.v1", "0/42")
    asked = gateway.calls[0].request.filter
    assert (asked.error_reason, asked.model, asked.create_time_from.seconds) == (40, "echo", 1_672_531_200)

    gateway.will(pb.ReplayDeadLetterResponse(job=script.job(job_id="job_n")))
    job = await both.call(
        "jobs.dead_letters.replay",
        "dl_2",
        model="small",
        max_tokens=7,
        temperature=0,
        max_attempts=2,
        give_up_after_s=5,
    )
    assert job.id == "job_n"
    request = gateway.calls[-1].request
    assert (request.id, request.max_attempts, request.give_up_after.seconds) == ("dl_2", 2, 5)
    changes = request.override
    assert (changes.model, changes.max_tokens, changes.HasField("temperature")) == ("small", 7, True)

    gateway.will(pb.DiscardDeadLetterResponse())
    await both.call("jobs.dead_letters.discard", "dl_2")
    with pytest.raises(ValueError, match="NOTHING"):
        await both.read(both.client.jobs.dead_letters.list(reason="NOTHING"))


async def test_a_replay_of_all_goes_on_after_a_break(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.replayed("dl_1", "job_a"), script.replayed("dl_2"), DRAINING)
    gateway.will(UNAVAILABLE)
    gateway.will(script.replayed("dl_4", "job_d"))
    found: list[sdk.ReplayedDeadLetter] = []
    await both.read(
        both.client.jobs.dead_letters.replay_all(reason="NO_REPLICA", model_was="big", model="small"),
        at_each=found.append,
    )
    assert [
        (one.dead_letter_id, one.job and one.job.id, one.error and one.error.reason) for one in found
    ] == [
        ("dl_1", "job_a", None),
        ("dl_2", None, "CREDENTIAL_REVOKED"),
        ("dl_4", "job_d", None),
    ]
    request = gateway.calls[0].request
    assert (request.filter.error_reason, request.filter.model, request.override.model) == (40, "big", "small")
    assert gateway.calls[-1].request == request
