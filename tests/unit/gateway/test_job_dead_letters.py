"""What was given up, through the gateway's edge: listed, run again once, discarded; and watched."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from llmos.common.v1 import error_reason_pb2
from llmos.gateway.v1 import job_service_pb2 as pb
from llmos.jobs.v1 import payload_pb2

from services.gateway.jobs.ports import Beat, Failed, JobClaim, Succeeded
from services.mesh import errors
from services.mesh.jobs import DeadLettered, JobKind
from tests.framework.gateway_fakes import KEY
from tests.framework.gateway_grpc import AUTH
from tests.framework.gateway_job_calls import CANARY, Served, auth_of, jobs_served, refused
from tests.framework.jobs import a_job
from tests.framework.schedules import report_one
from tests.framework.waiting import eventually

FAILED = Failed("MODEL_NOT_FOUND", 5, "There is no model `echo-1`.", retryable=False)
ROOT = auth_of("root-key")


async def given_up(served: Served, *texts: str, key: str = KEY) -> list[str]:
    """Jobs that failed; their ids, the oldest first."""
    ids = [(await served.submit(key, text, labels={"text": text})).id for text in texts]
    for claim in await served.jobs.claim():
        job_id = claim.scheduled.job.job_id
        assert await report_one(served.jobs.schedule, job_id, claim.fence, "req_9", FAILED)
    return ids


def text_of(served: Served, claim: JobClaim) -> str:
    job = claim.scheduled.job
    opened = payload_pb2.RequestPayload.FromString(served.jobs.seals.open(job.request, job, "request"))
    return str(opened.work.generate.prompt.text)


async def test_they_are_listed_with_their_reason(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        (job_id,) = await given_up(served, CANARY)
        await given_up(served, "theirs", key="other-key")
        listed = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=AUTH)
        none = await served.stub.ListDeadLetters(
            pb.ListDeadLettersRequest(
                filter=pb.DeadLetterFilter(error_reason=error_reason_pb2.ERROR_REASON_RATE_LIMIT)
            ),
            metadata=AUTH,
        )
        everything = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=ROOT)
    (letter,) = listed.dead_letters
    assert letter.job.id == job_id
    assert letter.job.state == pb.JOB_STATE_FAILED
    assert letter.error.reason == error_reason_pb2.ERROR_REASON_MODEL_NOT_FOUND
    assert letter.error.status_code == 5
    assert letter.job.last_error.message == FAILED.message
    assert letter.job.failed_attempts[0].request_id == letter.job.last_request_id == "req_9"
    assert CANARY not in str(listed).replace(f'value: "{CANARY}"', ""), "but for the label"
    assert not none.dead_letters
    assert len(everything.dead_letters) == 2


async def test_a_replay_runs_once_as_it_was_or_changed(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        await given_up(served, "one", "two")
        listed = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=AUTH)
        two, one = (letter.id for letter in listed.dead_letters)
        same = await served.stub.ReplayDeadLetter(pb.ReplayDeadLetterRequest(id=one), metadata=AUTH)
        changed = await served.stub.ReplayDeadLetter(
            pb.ReplayDeadLetterRequest(
                id=two,
                max_attempts=2,
                give_up_after=Duration(seconds=60),
                override=pb.ReplayOverride(model="echo-2", max_tokens=9, temperature=0),
            ),
            metadata=AUTH,
        )
        twice = await refused(served.stub.ReplayDeadLetter(pb.ReplayDeadLetterRequest(id=one), metadata=AUTH))
        left = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=AUTH)
        claims = {claim.scheduled.job.job_id: claim for claim in await served.jobs.claim()}
    assert isinstance(twice, errors.NotFound)
    assert not left.dead_letters
    assert set(claims) == {same.job.id, changed.job.id}
    assert text_of(served, claims[same.job.id]) == "one"
    assert dict(same.job.labels) == {"text": "one"}
    job = claims[changed.job.id].scheduled.job
    opened = payload_pb2.RequestPayload.FromString(served.jobs.seals.open(job.request, job, "request"))
    spec = opened.work.generate
    assert (spec.model, spec.max_tokens, spec.prompt.text) == ("echo-2", 9, "two")
    assert spec.sampling.HasField("temperature")
    assert (job.model, job.max_attempts) == ("echo-2", 2)
    assert (job.give_up_time - job.create_time).total_seconds() == 60


async def test_a_change_is_checked_as_a_request(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        (dead,) = await given_up(served, "one")
        listed = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=AUTH)
        request = pb.ReplayDeadLetterRequest(
            id=listed.dead_letters[0].id, override=pb.ReplayOverride(max_tokens=100_000)
        )
        long = await refused(served.stub.ReplayDeadLetter(request, metadata=AUTH))
        still = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=AUTH)
        other = await refused(served.stub.ReplayDeadLetter(request, metadata=auth_of("other-key")))
    assert isinstance(long, errors.RequestInvalid)
    assert [each.field for each in long.violations] == ["work.generate.max_tokens"]
    assert still.dead_letters[0].job.id == dead
    assert isinstance(other, errors.NotFound)


async def test_an_administrators_replay_leaves_the_job_with_its_tenant(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        await given_up(served, "one")
        listed = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=ROOT)
        request = pb.ReplayDeadLetterRequest(id=listed.dead_letters[0].id)
        await served.stub.ReplayDeadLetter(request, metadata=ROOT)
        (claim,) = await served.jobs.claim()
    assert claim.scheduled.job.identity.tenant_id == "acme"
    assert text_of(served, claim) == "one"


async def test_a_replay_whose_answer_is_lost_took_place_once(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        await given_up(served, "one")
        listed = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=AUTH)
        served.jobs.schedule.lost_replays = 1
        request = pb.ReplayDeadLetterRequest(id=listed.dead_letters[0].id)
        answer = await served.stub.ReplayDeadLetter(request, metadata=AUTH)
        (claim,) = await served.jobs.claim()
    assert claim.scheduled.job.job_id == answer.job.id


@pytest.mark.parametrize("broken_off", [False, True])
async def test_all_that_match_are_replayed_once(tmp_path: Path, broken_off: bool) -> None:
    texts = [str(index) for index in range(250)]
    async with jobs_served(tmp_path) as served:
        await given_up(served, *texts)
        await given_up(served, "theirs", key="other-key")
        told: list[str] = []
        if broken_off:
            call = served.stub.ReplayDeadLetters(pb.ReplayDeadLettersRequest(), metadata=AUTH)
            told += [(await call.read()).dead_letter_id for _ in range(30)]
            call.cancel()
        async for each in served.stub.ReplayDeadLetters(pb.ReplayDeadLettersRequest(), metadata=AUTH):
            assert not each.HasField("error")
            assert each.job.state == pb.JOB_STATE_WAITING
            told.append(each.dead_letter_id)
        claims = await served.jobs.claim()
        left = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=ROOT)
    assert len(told) == len(set(told))
    assert sorted(text_of(served, claim) for claim in claims) == sorted(texts)
    assert [letter.job.labels["text"] for letter in left.dead_letters] == ["theirs"]


async def test_what_cannot_be_replayed_is_told_and_stays(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        await given_up(served, "one", "two")
        request = pb.ReplayDeadLettersRequest(override=pb.ReplayOverride(max_tokens=100_000))
        told = [each async for each in served.stub.ReplayDeadLetters(request, metadata=AUTH)]
        left = await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=AUTH)
    assert {each.error.reason for each in told} == {error_reason_pb2.ERROR_REASON_REQUEST_INVALID}
    assert len(left.dead_letters) == len(told) == 2


async def test_those_that_cannot_be_read_are_for_administrators(tmp_path: Path) -> None:
    unreadable = pb.ListDeadLettersRequest(filter=pb.DeadLetterFilter(unreadable=True))
    event = DeadLettered(
        "DATA_CORRUPT", "no event of a job", raw=b"poison", topic="llmos.jobs.v1", partition=2, offset=7
    )
    async with jobs_served(tmp_path) as served:
        await served.jobs.schedule.accept(event)
        error = await refused(served.stub.ListDeadLetters(unreadable, metadata=AUTH))
        listed = await served.stub.ListDeadLetters(unreadable, metadata=ROOT)
        (letter,) = listed.dead_letters
        replayed = await refused(
            served.stub.ReplayDeadLetter(pb.ReplayDeadLetterRequest(id=letter.id), metadata=ROOT)
        )
        discard = pb.DiscardDeadLetterRequest(id=letter.id)
        theirs = await refused(served.stub.DiscardDeadLetter(discard, metadata=AUTH))
        await served.stub.DiscardDeadLetter(discard, metadata=ROOT)
        twice = await refused(served.stub.DiscardDeadLetter(discard, metadata=ROOT))
    assert isinstance(error, errors.ScopeMissing)
    assert (letter.topic, letter.place) == ("llmos.jobs.v1", "2/7")
    assert letter.error.message == "no event of a job"
    assert isinstance(replayed, errors.StateConflict)
    assert isinstance(theirs, errors.NotFound)
    assert isinstance(twice, errors.NotFound)


async def test_a_watch_tells_of_each_change(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        job = await served.submit()
        call = served.stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=AUTH)
        first = await call.read()
        (claim,) = await served.jobs.claim()
        running = await call.read()
        partial = served.jobs.seals.seal(
            payload_pb2.PartialResult(texts=["so", "far"]).SerializeToString(), claim.scheduled.job, "partial"
        )
        beat = Beat(job.id, claim.fence, progress_tokens=2, partial=partial)
        (standing,) = await served.jobs.schedule.heartbeat([beat], lease_s=60)
        so_far = await call.read()
        result = pb.JobResult()
        result.generate.choices.add(text="so far and on")
        sealed = served.jobs.seals.seal(result.SerializeToString(), claim.scheduled.job, "result")
        await report_one(served.jobs.schedule, job.id, claim.fence, "req_9", Succeeded(sealed))
        last = await call.read()
        assert await call.read() is grpc.aio.EOF
    assert standing.watched
    assert (first.job.state, running.job.state) == (pb.JOB_STATE_WAITING, pb.JOB_STATE_RUNNING)
    assert list(so_far.partial_texts) == ["so", "far"]
    assert so_far.job.progress_tokens == 2
    assert last.result == result
    assert not last.partial_texts


async def test_a_watcher_may_leave(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        job = await served.submit()
        call = served.stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=AUTH)
        await call.read()
        call.cancel()
        await eventually(lambda: len(served.bench.running) == 0)
    assert len(served.bench.audit.ended) == 2


async def test_batches_and_webhooks_are_no_jobs_here(tmp_path: Path) -> None:
    async with jobs_served(tmp_path) as served:
        identity = served.bench.callers[KEY]
        await served.jobs.schedule.accept(a_job(job_id="batch_1", kind=JobKind.BATCH, identity=identity))
        error = await refused(served.stub.GetJob(pb.GetJobRequest(id="batch_1"), metadata=AUTH))
        listed = await served.stub.ListJobs(pb.ListJobsRequest(), metadata=AUTH)
    assert isinstance(error, errors.NotFound)
    assert not listed.jobs
