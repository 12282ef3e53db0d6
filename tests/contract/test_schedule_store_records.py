"""What every store of the schedule must do, in memory and in SQLite: what is kept, listed and forgotten."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from services.logging.schedule.job import (
    CancelledByTenant,
    Postponed,
    Succeeded,
    from_us,
    to_us,
)
from services.logging.schedule.machine import webhook_id
from services.logging.schedule.store import (
    Bounds,
    Cursor,
    DeadLetterFilter,
    JobFilter,
    ScheduleStore,
)
from services.mesh.errors import AlreadyExists, NotFound, Overloaded
from services.mesh.jobs import (
    JobKind,
    JobState,
    Sealed,
)
from tests.framework.schedule_jobs import (
    LASTING,
    LEASE,
    NOW,
    OTHER,
    PASSING,
    RESULT,
    START,
    TENANT,
    MakeStore,
    S,
    claim_ids,
    kept,
    report_one,
    requested,
)


async def test_cancelling(schedule: ScheduleStore) -> None:
    await schedule.accept([requested("job-1"), requested("job-2"), requested("job-3")], NOW)
    assert await claim_ids(schedule, 2) == ["job-1", "job-2"]
    assert (await schedule.cancel("job-3", TENANT.tenant_id, NOW))[0].state is JobState.CANCELLED
    ended, changed = await schedule.cancel("job-3", TENANT.tenant_id, NOW)
    assert (ended.state, changed) == (JobState.CANCELLED, ())
    for job_id in ("job-1", "job-2"):
        one, _ = await schedule.cancel(job_id, "", NOW)
        assert (one.state, one.cancel_asked) == (JobState.RUNNING, True)
    await report_one(schedule, "job-1", 1, "r", PASSING, NOW)
    await report_one(schedule, "job-2", 1, "r", CancelledByTenant(), NOW)
    assert await schedule.count(TENANT.tenant_id) == {JobState.CANCELLED: 3}
    with pytest.raises(NotFound):
        await schedule.cancel("job-1", OTHER.tenant_id, NOW)
    with pytest.raises(NotFound):
        await schedule.cancel("job-9", "", NOW)


async def test_a_batch_that_waits_is_due_when_the_last_of_its_jobs_has_ended(schedule: ScheduleStore) -> None:
    await schedule.accept([requested("b", kind=JobKind.BATCH), requested("other", kind=JobKind.BATCH)], NOW)
    await schedule.claim("w", 2, LEASE, NOW)
    for name in ("b", "other"):
        await report_one(schedule, name, 1, "", Postponed(20.0), NOW)
    jobs = [requested(f"job-{n}", batch_id="b") for n in range(3)]
    await schedule.accept([*jobs, requested("theirs", batch_id="other", identity=OTHER)], NOW)
    assert len((await schedule.claim("w", 9, LEASE, NOW)).claims) == 4
    await report_one(schedule, "job-0", 1, "r", Succeeded(RESULT), NOW + S)
    await report_one(schedule, "job-1", 1, "r", PASSING, NOW + S)
    await report_one(schedule, "theirs", 1, "r", Succeeded(RESULT), NOW + S)
    taken = await report_one(schedule, "job-2", 1, "r", LASTING, NOW + S)
    assert taken.changed == ("job-2",)
    (again,) = (await schedule.claim("w", 9, LEASE, NOW + 3 * S)).claims
    assert again.job.job_id == "job-1"
    taken = await report_one(schedule, "job-1", 2, "r", CancelledByTenant(), NOW + 4 * S)
    assert taken.changed == ("job-1", "b")
    (woken,) = (await schedule.claim("w", 9, LEASE, NOW + 4 * S)).claims
    assert (woken.job.job_id, woken.job.attempts) == ("b", 1)


async def test_a_claim_that_ends_the_last_job_of_a_batch_finds_the_batch(schedule: ScheduleStore) -> None:
    late = requested("late", batch_id="b", give_up_time=from_us(NOW + S), not_before=from_us(NOW + S))
    waiting = requested("b", kind=JobKind.BATCH, not_before=from_us(NOW + 20 * S))
    await schedule.accept([waiting, late], NOW)
    found = await schedule.claim("w", 9, LEASE, NOW + 2 * S)
    assert [claim.job.job_id for claim in found.claims] == ["b"]
    assert found.dead == {"DEADLINE_EXCEEDED": 1}


async def test_a_batch_is_cancelled_in_pieces_and_with_what_comes_after(
    schedule: ScheduleStore,
) -> None:
    await schedule.accept([requested("b", kind=JobKind.BATCH)], NOW)
    await schedule.accept([requested(f"job-{n:04}", batch_id="b") for n in range(700)], NOW)
    await schedule.cancel("b", "", NOW)
    assert await schedule.count("", "b") == {JobState.WAITING: 200, JobState.CANCELLED: 500}
    assert (await schedule.sweep(NOW, 150)).more
    await schedule.sweep(NOW, 150)
    assert await schedule.count("", "b") == {JobState.CANCELLED: 700}
    await schedule.accept([requested("late", batch_id="b")], NOW)
    assert (await kept(schedule, "late")).state is JobState.CANCELLED
    await schedule.accept([requested("other", batch_id="b", identity=OTHER)], NOW)
    assert (await kept(schedule, "other")).state is JobState.WAITING


async def test_webhooks(schedule: ScheduleStore) -> None:
    await schedule.accept([requested(has_webhook=True)], NOW)
    await schedule.claim("w1", 1, LEASE, NOW)
    taken = await report_one(schedule, "job-1", 1, "r1", Succeeded(RESULT), NOW + S)
    assert taken.changed == ("job-1", webhook_id("job-1"))
    (claim,) = (await schedule.claim("w1", 1, LEASE, NOW + S)).claims
    assert (claim.job.request.kind, claim.job.job_id) == (JobKind.WEBHOOK, webhook_id("job-1"))
    assert claim.request == requested().request
    assert claim.job.ended == await kept(schedule)
    assert (claim.job.request.max_attempts, claim.job.give_up_us) == (20, NOW + S + 86_400 * S)
    await schedule.sweep(NOW + 3601 * S, 10, leases=False)
    assert await schedule.get("job-1") is None
    assert (await kept(schedule, webhook_id("job-1"))).ended is not None


async def test_what_ended_is_forgotten_in_time_and_its_id_is_not(schedule: ScheduleStore) -> None:
    give_up = START + timedelta(hours=2)
    jobs = [requested(f"job-{n}", give_up_time=give_up) for n in (1, 2)]
    await schedule.accept(jobs, NOW)
    await schedule.claim("w1", 2, LEASE, NOW)
    await report_one(schedule, "job-1", 1, "r1", Succeeded(RESULT), NOW)
    await report_one(schedule, "job-2", 1, "r2", LASTING, NOW)
    assert (await schedule.sweep(NOW + 3600 * S - 1, 10)).forgotten == 0
    assert (await schedule.sweep(NOW + 3600 * S, 10)).changed == ("job-1",)
    assert (await schedule.sweep(NOW + 14 * 86_400 * S, 10)).changed == ("job-2",)
    assert (await schedule.dead_letters(DeadLetterFilter(), 10, None)).items == []
    assert (await schedule.totals()).kept == 0
    assert (await schedule.accept(jobs[1:], NOW)).job_ids == ()


async def test_replay_and_discard(schedule: ScheduleStore) -> None:
    await schedule.accept([requested("job-1"), requested("job-2")], NOW)
    await schedule.claim("w1", 2, LEASE, NOW)
    for job_id in ("job-1", "job-2"):
        await report_one(schedule, job_id, 1, "r", LASTING, NOW)
    new, changed = await schedule.replay("job-1", TENANT.tenant_id, requested("job-3"), NOW)
    assert (new.state, changed) == (JobState.WAITING, ("job-1", "job-3"))
    assert await schedule.get("job-1") is None
    with pytest.raises(NotFound):
        await schedule.replay("job-1", TENANT.tenant_id, requested("job-4"), NOW)
    with pytest.raises(NotFound):
        await schedule.replay("job-2", OTHER.tenant_id, requested("job-4"), NOW)
    with pytest.raises(AlreadyExists):
        await schedule.replay("job-2", "", requested("job-3"), NOW)
    assert (await schedule.accept([requested("job-1")], NOW)).job_ids == ()
    await schedule.discard("job-2", TENANT.tenant_id, NOW)
    with pytest.raises(NotFound):
        await schedule.discard("job-2", "", NOW)
    assert await claim_ids(schedule, 9) == ["job-3"]


async def test_pages_of_jobs(schedule: ScheduleStore) -> None:
    times = [START - timedelta(seconds=n // 2) for n in range(9)]
    jobs = [
        requested(f"job-{n}", create_time=time, labels={"n": str(n % 2)}, batch_id="b" if n < 4 else "")
        for n, time in enumerate(times)
    ]
    await schedule.accept([*jobs, requested("x", identity=OTHER), requested("b", kind=JobKind.BATCH)], NOW)
    which = JobFilter(TENANT.tenant_id)
    for oldest_first in (False, True):
        expected = sorted(jobs, key=lambda j: (j.create_time, j.job_id), reverse=not oldest_first)
        found: list[str] = []
        after = None
        while page := (await schedule.list_jobs(which, 2, after, oldest_first=oldest_first)).items:
            found += [job.job_id for job, _ in page]
            last = page[-1][0]
            after = Cursor(to_us(last.request.create_time), last.job_id)
        assert found == [job.job_id for job in expected]

    async def ids(which: JobFilter) -> set[str]:
        return {job.job_id for job, _ in (await schedule.list_jobs(which, 100, None)).items}

    assert await ids(replace(which, labels={"n": "1"})) == {"job-1", "job-3", "job-5", "job-7"}
    assert await ids(JobFilter(batch_id="b")) == {"job-0", "job-1", "job-2", "job-3"}
    assert await ids(JobFilter(kinds=frozenset(JobKind))) == {j.job_id for j in jobs} | {"x", "b"}
    assert await ids(replace(which, states=frozenset({JobState.FAILED}))) == set()
    (done,) = await claim_ids(schedule, 1)
    await report_one(schedule, done, 1, "r", Succeeded(RESULT), NOW)
    succeeded = JobFilter(states=frozenset({JobState.SUCCEEDED}), kinds=frozenset(JobKind))
    ((one, result),) = (await schedule.list_jobs(succeeded, 5, None, with_results=True)).items
    assert (one.job_id, result) == (done, RESULT)


async def test_pages_of_dead_letters(schedule: ScheduleStore) -> None:
    for n in range(5):
        job_ = requested(f"job-{n}", model=f"model-{n % 2}", give_up_time=START)
        await schedule.accept([job_], NOW + n)
    await schedule.accept([requested("x", identity=OTHER, give_up_time=START)], NOW)
    own = DeadLetterFilter(TENANT.tenant_id)
    first = (await schedule.dead_letters(own, 3, None)).items
    assert [letter.dead_letter_id for letter in first] == ["job-4", "job-3", "job-2"]
    rest = (await schedule.dead_letters(own, 3, Cursor(first[-1].create_us, first[-1].dead_letter_id))).items
    assert [letter.dead_letter_id for letter in rest] == ["job-1", "job-0"]

    async def ids(which: DeadLetterFilter) -> set[str]:
        return {letter.dead_letter_id for letter in (await schedule.dead_letters(which, 100, None)).items}

    assert await ids(replace(own, model="model-1")) == {"job-1", "job-3"}
    assert await ids(replace(own, error_reason="INTERNAL")) == set()
    assert await ids(replace(own, create_time_from_us=NOW + 1, create_time_before_us=NOW + 3)) == {
        "job-1",
        "job-2",
    }
    assert len(await ids(DeadLetterFilter())) == 6


async def test_a_tenants_jobs_are_bounded(make_schedule: MakeStore) -> None:
    store = make_schedule(Bounds(max_jobs_per_tenant=2))
    await store.start()
    accepted = await store.accept([requested(f"job-{n}", has_webhook=True) for n in range(3)], NOW)
    assert accepted.dead == {"OVERLOADED": 1}
    assert (await kept(store, "job-2")).error_reason == "OVERLOADED"
    await store.accept([requested("other", identity=OTHER)], NOW)
    assert (await kept(store, "other")).state is JobState.WAITING
    await store.cancel("job-0", "", NOW)
    await store.published([row.number for row in await store.outbox(9)])
    await store.stop()


async def test_a_full_schedule_takes_nothing_of_a_batch(make_schedule: MakeStore) -> None:
    store = make_schedule(Bounds(max_jobs=2))
    await store.start()
    with pytest.raises(Overloaded):
        await store.accept([requested(f"job-{n}") for n in range(3)], NOW)
    totals = await store.totals()
    assert (totals.kept, totals.waiting) == (0, 0)
    await store.accept([requested(f"job-{n}") for n in range(2)], NOW)
    await store.accept([requested(f"job-{n}") for n in range(2)], NOW)
    await store.stop()


async def test_the_oldest_dead_letters_go_first(make_schedule: MakeStore) -> None:
    store = make_schedule(Bounds(max_dead_letters_per_tenant=2))
    await store.start()
    for n in range(4):
        await store.accept([requested(f"job-{n}", give_up_time=START)], NOW + n)
    letters = (await store.dead_letters(DeadLetterFilter(), 9, None)).items
    assert [letter.dead_letter_id for letter in letters] == ["job-3", "job-2"]
    assert await store.get("job-0") is None
    await store.stop()


async def test_news_of_retries_are_bounded_and_of_ends_are_not(make_schedule: MakeStore) -> None:
    store = make_schedule(Bounds(max_outbox=1))
    await store.start()
    await store.accept([requested(f"job-{n}") for n in range(3)], NOW)
    await store.claim("w1", 3, LEASE, NOW)
    for n in range(3):
        await report_one(store, f"job-{n}", 1, "r", PASSING if n else LASTING, NOW)
    await store.accept([requested("job-9", give_up_time=START)], NOW)
    assert [row.event_id for row in await store.outbox(9)] == ["dead/job-0", "dead/job-9"]
    await store.stop()


async def test_ids_are_forgotten_in_the_end(make_schedule: MakeStore) -> None:
    store = make_schedule(Bounds(remember_s=10))
    await store.start()
    await store.accept([requested(give_up_time=START)], NOW)
    await store.discard("job-1", "", NOW)
    await store.sweep(NOW + 9 * S, 10)
    assert (await store.accept([requested()], NOW)).job_ids == ()
    assert await store.is_gone("job-1")
    await store.sweep(NOW + 10 * S, 10)
    assert not await store.is_gone("job-1")
    assert (await store.accept([requested()], NOW)).job_ids == ("job-1",)
    await store.stop()


async def test_totals(schedule: ScheduleStore) -> None:
    assert (await schedule.totals()).oldest_due_us is None
    later = requested("job-2", not_before=START + timedelta(seconds=5))
    await schedule.accept([requested("job-1"), later, requested("job-3", give_up_time=START)], NOW)
    totals = await schedule.totals()
    assert (totals.waiting, totals.running, totals.kept, totals.dead_letters) == (2, 0, 3, 1)
    assert (totals.oldest_due_us, totals.outbox) == (NOW, 1)
    await schedule.claim("w1", 1, LEASE, NOW)
    totals = await schedule.totals()
    assert (totals.waiting, totals.running, totals.oldest_due_us) == (1, 1, NOW + 5 * S)


async def test_answers_are_bounded_in_bytes(schedule: ScheduleStore) -> None:
    large = Sealed("k1", bytes(900_000))
    await schedule.accept([requested(f"job-{n}", request=large) for n in range(6)], NOW)
    claims = (await schedule.claim("w1", 6, LEASE, NOW)).claims
    assert [claim.job.job_id for claim in claims] == ["job-0", "job-1", "job-2"]
    for claim in claims:
        await report_one(schedule, claim.job.job_id, 1, "r", Succeeded(large), NOW)
    which = JobFilter(states=frozenset({JobState.SUCCEEDED}))
    page = await schedule.list_jobs(which, 10, None, with_results=True)
    assert (len(page.items), page.more) == (2, True)
    page = await schedule.list_jobs(which, 10, None)
    assert (len(page.items), page.more) == (3, False)
