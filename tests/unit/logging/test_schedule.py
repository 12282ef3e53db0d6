"""The schedule's rules over a store in memory, time being moved by hand: as they are, and by gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from services.gateway.jobs import ports
from services.gateway.jobs.clients import GrpcSchedule
from services.logging.schedule.schedule import Limits
from services.mesh import context
from services.mesh.clock import ManualClock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.errors import AlreadyExists, ConcurrencyLimit, NotFound, PolicyDenied, RequestInvalid
from services.mesh.jobs import DeadLettered, JobKind, JobState, RetryRequested, Sealed
from tests.framework.schedule_jobs import ADMIN, OTHER, START, TENANT, requested
from tests.framework.schedule_wire import Loopback, ScheduleOverWire
from tests.framework.schedules import ScheduleInMemory, report_one


@pytest.fixture
async def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=[ScheduleInMemory, ScheduleOverWire])
async def schedule(request: pytest.FixtureRequest, clock: ManualClock) -> AsyncIterator[ScheduleInMemory]:
    schedule: ScheduleInMemory = request.param(clock, draw=lambda: 1.0)
    await schedule.start()
    yield schedule
    await schedule.stop()


@contextmanager
def caller(identity: Identity = TENANT) -> Iterator[None]:
    token = context.enter(RequestContext("r", "/m", caller=Caller(identity)))
    try:
        yield
    finally:
        context.leave(token)


async def claim_one(schedule: ScheduleInMemory) -> ports.JobClaim:
    (claim,) = await schedule.claim("w1", 1, lease_s=30, wait_s=0)
    return claim


async def test_a_job_goes_its_way(schedule: ScheduleInMemory) -> None:
    await schedule.accept(requested())
    claim = await claim_one(schedule)
    assert claim.scheduled.job.request == Sealed("k1", b"request of job-1")
    assert claim.fence == 1
    assert claim.scheduled.attempts == 1
    assert await report_one(schedule, "job-1", 1, "r1", ports.Succeeded(Sealed("k1", b"result")))
    with caller():
        job, result = await schedule.get("job-1")
    assert job.state is JobState.SUCCEEDED
    assert job.last_request_id == "r1"
    assert result == Sealed("k1", b"result")
    assert job.result_expire_time == START + timedelta(hours=1)
    assert await schedule.claim("w1", 1, lease_s=30, wait_s=0) == []


async def test_a_claim_waits_for_a_job_that_comes(schedule: ScheduleInMemory, clock: ManualClock) -> None:
    waiting = asyncio.create_task(schedule.claim("w1", 4, lease_s=30, wait_s=10))
    await clock.advance(3)
    assert not waiting.done()
    await schedule.accept(requested())
    assert len(await waiting) == 1


async def test_a_claim_waits_for_time_and_gives_up(schedule: ScheduleInMemory, clock: ManualClock) -> None:
    await schedule.accept(requested(not_before=START + timedelta(seconds=4)))
    waiting = asyncio.create_task(schedule.claim("w1", 4, lease_s=30, wait_s=10))
    await clock.advance(3.9)
    assert not waiting.done()
    await clock.advance(0.2)
    assert len(await waiting) == 1
    waiting = asyncio.create_task(schedule.claim("w1", 4, lease_s=30, wait_s=10))
    await clock.advance(9.9)
    assert not waiting.done()
    await clock.advance(0.2)
    assert await waiting == []


async def test_a_watcher_sees_each_change_and_partial_results(schedule: ScheduleInMemory) -> None:
    await schedule.accept(requested())
    with caller():
        watching = schedule.watch("job-1")
        assert (await anext(watching))[0].state is JobState.WAITING
        claim = await claim_one(schedule)
        assert (await anext(watching))[0].state is JobState.RUNNING
        (standing,) = await schedule.heartbeat(
            [ports.Beat("job-1", claim.fence, 5, Sealed("k1", b"half"))], lease_s=30
        )
        assert standing == ports.Standing("job-1", held=True, cancel=False, watched=True)
        job, partial, _ = await anext(watching)
        assert job.progress_tokens == 5
        assert partial == Sealed("k1", b"half")
        await report_one(schedule, "job-1", claim.fence, "r1", ports.Succeeded(Sealed("k1", b"whole")))
        job, partial, result = await anext(watching)
        assert job.state is JobState.SUCCEEDED
        assert partial is None
        assert result == Sealed("k1", b"whole")
        with pytest.raises(StopAsyncIteration):
            await anext(watching)
    assert not (await schedule.heartbeat([ports.Beat("job-1", claim.fence)], lease_s=30))[0].held


async def test_watchers_are_bounded(clock: ManualClock) -> None:
    schedule = ScheduleInMemory(clock, limits=Limits(max_watchers=1))
    await schedule.accept(requested())
    with caller():
        first = schedule.watch("job-1")
        await anext(first)
        with pytest.raises(ConcurrencyLimit):
            await anext(schedule.watch("job-1"))
        await first.aclose()
        second = schedule.watch("job-1")
        await anext(second)
        await second.aclose()


async def test_a_tenant_sees_its_own_jobs_and_an_administrator_all(schedule: ScheduleInMemory) -> None:
    await schedule.accept(requested("job-a"), requested("job-b", identity=OTHER))
    with caller(OTHER):
        with pytest.raises(NotFound):
            await schedule.get("job-a")
        with pytest.raises(NotFound):
            await schedule.cancel("job-a")
        with pytest.raises(NotFound):
            await anext(schedule.watch("job-a"))
        jobs, _ = await schedule.list_jobs(ports.JobFilter(), 10)
        assert [job.job.job_id for job, _ in jobs] == ["job-b"]
        assert (await schedule.count()).waiting == 1
    with caller(ADMIN):
        assert (await schedule.count()).waiting == 2
        assert (await schedule.cancel("job-a")).state is JobState.CANCELLED


async def test_a_job_that_is_not_known_yet_is_waited_for(
    schedule: ScheduleInMemory, clock: ManualClock
) -> None:
    with caller():
        waiting = asyncio.create_task(schedule.get("job-1", wait_s=2))
        await clock.advance(1)
        await schedule.accept(requested())
        assert (await waiting)[0].state is JobState.WAITING
        waiting = asyncio.create_task(schedule.get("job-2", wait_s=2))
        await clock.advance(2.1)
        with pytest.raises(NotFound):
            await waiting


async def test_r38_a_lost_worker_and_its_late_report(schedule: ScheduleInMemory, clock: ManualClock) -> None:
    await schedule.accept(requested())
    first = await claim_one(schedule)
    await clock.advance(31)
    second_wait = asyncio.create_task(schedule.claim("w2", 1, lease_s=30, wait_s=5))
    await clock.advance(3)
    (second,) = await second_wait
    assert second.fence > first.fence
    assert second.scheduled.attempts == 2
    assert [attempt.error_reason for attempt in second.scheduled.history] == ["WORKER_LOST"]
    assert not await report_one(schedule, "job-1", first.fence, "r1", ports.Succeeded(Sealed("k1", b"late")))
    assert not (await schedule.heartbeat([ports.Beat("job-1", first.fence)], lease_s=30))[0].held
    assert await report_one(schedule, "job-1", second.fence, "r2", ports.Succeeded(Sealed("k1", b"right")))
    assert await report_one(schedule, "job-1", second.fence, "r2", ports.Succeeded(Sealed("k1", b"right")))
    with caller():
        job, result = await schedule.get("job-1")
    assert job.attempts == 2
    assert result == Sealed("k1", b"right")


async def test_a_retry_comes_after_its_backoff(schedule: ScheduleInMemory, clock: ManualClock) -> None:
    await schedule.accept(requested())
    claim = await claim_one(schedule)
    failed = ports.Failed("REPLICA_LOST", 14, "lost", retryable=True)
    assert await report_one(schedule, "job-1", claim.fence, "r1", failed)
    await clock.advance(0.9)
    assert await schedule.claim("w1", 1, lease_s=30, wait_s=0) == []
    await clock.advance(0.2)
    claim = await claim_one(schedule)
    assert claim.scheduled.attempts == 2
    (row,) = await schedule.schedule.outbox(10)
    assert isinstance(row.event, RetryRequested)
    assert row.event.error_reason == "REPLICA_LOST"
    assert row.event.job.request.ciphertext == b"request of job-1"


async def test_dead_letters_are_listed_replayed_and_discarded(schedule: ScheduleInMemory) -> None:
    await schedule.accept(requested("job-1"), requested("job-2"))
    for claim in await schedule.claim("w1", 2, lease_s=30, wait_s=0):
        failed = ports.Failed("REQUEST_INVALID", 3, "no", retryable=False)
        await report_one(schedule, claim.scheduled.job.job_id, claim.fence, "r", failed)
    with caller(OTHER), pytest.raises(NotFound):
        await schedule.dead_letter("job-1")
    with caller():
        letters, _ = await schedule.list_dead_letters(ports.DeadLetterFilter("REQUEST_INVALID"), 10)
        assert [letter.dead_letter_id for letter in letters] == ["job-2", "job-1"]
        letter = await schedule.dead_letter("job-1")
        assert letter.job is not None
        assert letter.job.job.request.ciphertext == b"request of job-1"
        assert (await schedule.replay("job-1", requested("job-3"))).state is JobState.WAITING
        with pytest.raises(NotFound):
            await schedule.replay("job-1", requested("job-4"))
        with pytest.raises(AlreadyExists):
            await schedule.replay("job-2", requested("job-1"))
        await schedule.discard("job-2")
        with pytest.raises(NotFound):
            await schedule.discard("job-2")
        assert (await schedule.list_dead_letters(ports.DeadLetterFilter(), 10)) == ([], "")
        with pytest.raises(NotFound):
            await schedule.get("job-1")
    await schedule.accept(requested("job-1"))  # its event comes again
    assert (await claim_one(schedule)).scheduled.job.job_id == "job-3"


async def test_a_dead_letter_is_replayed_for_its_own_tenant_only(schedule: ScheduleInMemory) -> None:
    await schedule.accept(requested("job-1", give_up_time=START))
    with caller(ADMIN), pytest.raises(RequestInvalid):
        await schedule.replay("job-1", requested("job-2", identity=OTHER))
    with caller(OTHER), pytest.raises(NotFound):
        await schedule.replay("job-1", requested("job-2"))


async def test_what_cannot_be_read_is_an_administrators(schedule: ScheduleInMemory) -> None:
    poison = DeadLettered("DATA_CORRUPT", "no event", raw=b"\xff\xff", topic="llmos.jobs.v1", offset=7)
    await schedule.accept(poison)
    await schedule.accept(poison)
    with caller():
        assert await schedule.list_dead_letters(ports.DeadLetterFilter(unreadable=True), 10) == ([], "")
    with caller(ADMIN):
        (letter,), _ = await schedule.list_dead_letters(ports.DeadLetterFilter(unreadable=True), 10)
        assert letter.raw == b""
        assert letter.offset == 7
        assert letter.job is None
        assert (await schedule.dead_letter(letter.dead_letter_id)).raw == b"\xff\xff"


async def test_the_end_of_a_job_is_told_to_its_webhook(schedule: ScheduleInMemory) -> None:
    await schedule.accept(requested(has_webhook=True))
    claim = await claim_one(schedule)
    await report_one(schedule, "job-1", claim.fence, "r", ports.Failed("REQUEST_INVALID", 3, "no", False))
    with caller():
        await schedule.discard("job-1")
    webhook = await claim_one(schedule)
    assert webhook.scheduled.job.kind is JobKind.WEBHOOK
    assert webhook.scheduled.job.max_attempts == 20
    assert webhook.scheduled.job.request.ciphertext == b"request of job-1"
    assert webhook.ended is not None
    assert webhook.ended.job.job_id == "job-1"
    assert webhook.ended.state is JobState.FAILED
    assert webhook.ended.error_reason == "REQUEST_INVALID"
    assert await report_one(
        schedule, webhook.scheduled.job.job_id, webhook.fence, "r", ports.Succeeded(Sealed("k1", b""))
    )
    assert await schedule.claim("w1", 1, lease_s=30, wait_s=0) == []


async def test_the_jobs_of_a_cancelled_batch_end_with_it(schedule: ScheduleInMemory) -> None:
    await schedule.accept(requested("b", kind=JobKind.BATCH))
    await schedule.accept(*(requested(f"job-{n:04}", batch_id="b") for n in range(600)))
    with caller():
        await schedule.cancel("b")
        counts = await schedule.count("b")
        assert (counts.waiting, counts.cancelled) == (100, 500)
        await schedule.sweep()
        assert (await schedule.count("b")).cancelled == 600
        await schedule.accept(requested("job-late", batch_id="b"))
        assert (await schedule.get("job-late"))[0].state is JobState.CANCELLED


async def test_after_standing_still_workers_get_to_beat_first(clock: ManualClock) -> None:
    schedule = ScheduleInMemory(clock, limits=Limits(lease_grace_s=30))
    await schedule.accept(requested())
    await schedule.sweep()
    claim = await claim_one(schedule)
    await clock.advance(300)  # nobody swept, nobody was heard
    await schedule.sweep()
    assert (await schedule.heartbeat([ports.Beat("job-1", claim.fence)], lease_s=30))[0].held


async def test_pages_go_on_where_they_ended(schedule: ScheduleInMemory) -> None:
    await schedule.accept(*(requested(f"job-{n}", give_up_time=START) for n in range(5)))
    kinds = frozenset({JobKind.REQUEST})
    with caller():
        for token, found in (("", list[str]()), ("", [])):
            while True:
                page, token = await schedule.list_jobs(ports.JobFilter(kinds=kinds), 2, token)
                found += [job.job.job_id for job, _ in page]
                if not token:
                    break
            assert found == [f"job-{n}" for n in (4, 3, 2, 1, 0)]
        letters, token = await schedule.list_dead_letters(ports.DeadLetterFilter(), 3)
        rest, last = await schedule.list_dead_letters(ports.DeadLetterFilter(), 3, token)
        assert [letter.dead_letter_id for letter in [*letters, *rest]] == [
            f"job-{n}" for n in (4, 3, 2, 1, 0)
        ]
        assert last == ""


async def test_tokens_that_no_list_returned_are_refused(clock: ManualClock) -> None:
    schedule = ScheduleOverWire(clock)
    with caller():
        for token in ("x", "eA==", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OmE="):
            with pytest.raises(RequestInvalid, match="page_token"):
                await schedule.list_jobs(ports.JobFilter(), 2, token)


async def test_only_gateways_speak_with_the_schedule(clock: ManualClock) -> None:
    schedule = ScheduleOverWire(clock)
    other = GrpcSchedule(Loopback(schedule.servicer, "service:inference"))  # type: ignore[arg-type]
    with pytest.raises(PolicyDenied):
        await other.claim("w", 1, lease_s=30, wait_s=0)
    with pytest.raises(PolicyDenied):
        await other.heartbeat([], lease_s=30)
    with pytest.raises(PolicyDenied):
        await report_one(other, "job-1", 1, "", ports.CancelledByTenant())
    with caller(), pytest.raises(PolicyDenied):
        await other.get("job-1")
