"""What every store of the schedule must do, run by the one in memory and by SQLite: how jobs run and end."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from msgspec import structs

from services.logging.schedule.job import (
    CancelledByTenant,
    Postponed,
    Succeeded,
    from_us,
)
from services.logging.schedule.store import (
    Beat,
    DeadLetterFilter,
    ScheduleStore,
    Standing,
)
from services.mesh.errors import NotFound
from services.mesh.jobs import (
    DeadLettered,
    JobAttempt,
    JobKind,
    JobPriority,
    JobState,
    RetryRequested,
    Sealed,
)
from tests.framework.schedule_jobs import (
    LEASE,
    NOW,
    OTHER,
    PASSING,
    RESULT,
    START,
    TENANT,
    S,
    claim_ids,
    kept,
    report_one,
    requested,
)


async def test_a_job_comes_back_as_it_came_in(schedule: ScheduleStore) -> None:
    full = requested(
        labels={"team": "blue"},
        priority=JobPriority.LOW,
        prefix_group="g",
        batch_id="batch",
        request_digest=b"\x01" * 32,
        not_before=START + timedelta(seconds=5, microseconds=7),
    )
    accepted = await schedule.accept([full], NOW)
    assert accepted.job_ids == accepted.changed == ("job-1",)
    found = await schedule.get("job-1")
    assert found is not None
    one, request, result = found
    assert one.request == replace(full, request=Sealed("", b""))
    assert request == full.request
    assert result is None
    assert (one.state, one.attempts, one.due_us) == (JobState.WAITING, 0, NOW + 5 * S + 7)
    assert await schedule.get("job-2") is None


async def test_a_repeat_changes_nothing(schedule: ScheduleStore) -> None:
    await schedule.accept([requested(), requested()], NOW)
    await schedule.claim("w1", 1, LEASE, NOW)
    before = await kept(schedule)
    again = await schedule.accept([requested(), RetryRequested(requested(), "r", "REPLICA_LOST", 1)], NOW)
    assert again.job_ids == ()
    assert await kept(schedule) == before


async def test_a_retry_becomes_a_job_with_its_attempt_counted(schedule: ScheduleStore) -> None:
    await schedule.accept([RetryRequested(requested(), "r1", "REPLICA_LOST", 1)], NOW)
    one = await kept(schedule)
    assert (one.attempts, one.due_us) == (1, NOW + 1 * S)
    assert [(a.number, a.request_id, a.status_code) for a in one.history] == [(1, "r1", 14)]
    await schedule.accept([RetryRequested(requested("job-2"), "r1", "REPLICA_LOST", 3)], NOW)
    assert (await kept(schedule, "job-2")).state is JobState.FAILED


async def test_what_comes_too_late_is_a_dead_letter(schedule: ScheduleStore) -> None:
    accepted = await schedule.accept([requested(give_up_time=START)], NOW)
    assert accepted.dead == {"DEADLINE_EXCEEDED": 1}
    letter, request = await schedule.dead_letter("job-1", TENANT.tenant_id)
    assert letter.job is not None
    assert (letter.job.state, letter.error_reason) == (JobState.FAILED, "DEADLINE_EXCEEDED")
    assert request == requested().request
    (row,) = await schedule.outbox(10)
    assert isinstance(row.event, DeadLettered)
    assert (row.event_id, row.event.job) == ("dead/job-1", requested(give_up_time=START))


async def test_an_event_that_cannot_be_read_is_kept_with_its_bytes(schedule: ScheduleStore) -> None:
    poison = DeadLettered("DATA_CORRUPT", "no event", raw=b"\xff\x00", topic="t", partition=2, offset=7)
    await schedule.accept([poison, replace(poison, offset=8)], NOW)
    assert (await schedule.accept([poison], NOW)).dead == {}
    letters = (await schedule.dead_letters(DeadLetterFilter(unreadable=True), 10, None)).items
    assert sorted((letter.topic, letter.partition, letter.offset) for letter in letters) == [
        ("t", 2, 7),
        ("t", 2, 8),
    ]
    assert {letter.raw for letter in letters} == {b""}
    letter, _ = await schedule.dead_letter(letters[0].dead_letter_id, "")
    assert letter.raw == b"\xff\x00"
    with pytest.raises(NotFound):
        await schedule.dead_letter(letters[0].dead_letter_id, TENANT.tenant_id)
    assert [row.event for row in await schedule.outbox(10)] == [poison, replace(poison, offset=8)]
    assert (await schedule.sweep(letter.expire_us, 10)).forgotten == 2


async def test_a_job_that_nobody_vouches_for_is_a_dead_letter_and_tells_no_webhook(
    schedule: ScheduleStore,
) -> None:
    dead = DeadLettered("DATA_CORRUPT", "forged", "job-1", job=requested(has_webhook=True))
    await schedule.accept([dead], NOW)
    assert (await schedule.accept([dead], NOW)).changed == ()
    assert (await kept(schedule)).error_reason == "DATA_CORRUPT"
    assert await claim_ids(schedule, 5) == []


async def test_a_claim_counts_an_attempt_and_raises_the_fence(schedule: ScheduleStore) -> None:
    await schedule.accept([requested()], NOW)
    (claim,) = (await schedule.claim("w1", 4, LEASE, NOW)).claims
    assert claim.request == requested().request
    one = claim.job
    assert (one.state, one.attempts, one.fence, one.worker) == (
        JobState.RUNNING,
        1,
        1,
        "w1",
    )
    assert (one.lease_us, one.start_us) == (LEASE, NOW)
    assert await kept(schedule) == one
    assert (await schedule.claim("w2", 4, LEASE, NOW)).claims == ()


async def test_none_is_handed_out_early(schedule: ScheduleStore) -> None:
    await schedule.accept([requested(not_before=START + timedelta(seconds=5))], NOW)
    early = await schedule.claim("w1", 1, LEASE, NOW + 5 * S - 1)
    assert (early.claims, early.next_due_us) == ((), NOW + 5 * S)
    assert await claim_ids(schedule, 1, NOW + 5 * S) == ["job-1"]
    assert (await schedule.claim("w1", 1, LEASE, NOW + 5 * S)).next_due_us is None


async def test_inside_a_tenant_by_priority_then_group_then_time(schedule: ScheduleStore) -> None:
    def at(job_id: str, second: float, **changes: object) -> None:
        time = START - timedelta(seconds=100 - second)
        jobs.append(requested(job_id, create_time=time, not_before=time, **changes))

    jobs: list = []  # type: ignore[type-arg]
    at("low", 0, priority=JobPriority.LOW)
    at("g1-first", 1, prefix_group="g1")
    at("g2-first", 2, prefix_group="g2")
    at("plain", 3)
    at("g1-second", 4, prefix_group="g1")
    at("g2-second", 5, prefix_group="g2")
    at("high", 6, priority=JobPriority.HIGH)
    at("batch", 7, kind=JobKind.BATCH, priority=JobPriority.LOW)
    await schedule.accept(jobs, NOW)
    assert await claim_ids(schedule, 10) == [
        "batch",
        "high",
        "g1-first",
        "g1-second",
        "g2-first",
        "g2-second",
        "plain",
        "low",
    ]


async def test_a_group_that_is_always_added_to_does_not_hold_up_the_others(
    schedule: ScheduleStore,
) -> None:
    early, late = START - timedelta(hours=1), START - timedelta(seconds=1)
    await schedule.accept(
        [
            requested("first", prefix_group="g", create_time=early, not_before=early),
            requested("other", create_time=START - timedelta(minutes=30), not_before=early),
            requested("later", prefix_group="g", create_time=late, not_before=late),
        ],
        NOW,
    )
    assert await claim_ids(schedule, 3) == ["first", "other", "later"]


async def test_tenants_take_turns_by_how_many_of_theirs_run(schedule: ScheduleStore) -> None:
    third = structs.replace(TENANT, tenant_id="tenant-c")
    await schedule.accept(
        [requested(f"a{n}") for n in range(6)]
        + [requested(f"b{n}", identity=OTHER) for n in range(6)]
        + [requested("c0", identity=third)],
        NOW,
    )
    assert await claim_ids(schedule, 5) == ["a0", "b0", "c0", "a1", "b1"]
    assert await claim_ids(schedule, 2, NOW + 1) == ["a2", "b2"]
    await report_one(schedule, "b0", 1, "r", Succeeded(RESULT), NOW + 1)
    await report_one(schedule, "b1", 1, "r", Succeeded(RESULT), NOW + 1)
    assert await claim_ids(schedule, 3, NOW + 2) == ["b3", "b4", "a3"]


async def test_among_equals_who_was_served_longest_ago_goes_first(schedule: ScheduleStore) -> None:
    await schedule.accept([requested(f"a{n}") for n in range(3)], NOW)
    await schedule.accept([requested(f"b{n}", identity=OTHER) for n in range(3)], NOW)
    order = []
    for moment in range(4):
        (job_id,) = await claim_ids(schedule, 1, NOW + moment)
        await report_one(schedule, job_id, 1, "r", Succeeded(RESULT), NOW + moment)
        order.append(job_id)
    assert order == ["a0", "b0", "a1", "b1"]


async def test_a_tenant_without_jobs_is_forgotten_as_if_never_served(schedule: ScheduleStore) -> None:
    await schedule.accept([requested("a-1"), requested("b-1", identity=OTHER)], NOW)
    await schedule.accept([requested("a-2", not_before=from_us(NOW + 5 * S))], NOW)
    first, second = (await schedule.claim("w1", 2, LEASE, NOW)).claims
    assert [first.job.job_id, second.job.job_id] == ["a-1", "b-1"]
    for claim in (first, second):
        await report_one(schedule, claim.job.job_id, claim.job.fence, "r", Succeeded(RESULT), NOW)
    await schedule.accept([requested("b-2", identity=OTHER)], NOW)
    (next_one,) = (await schedule.claim("w1", 1, LEASE, NOW + 5 * S)).claims
    assert next_one.job.job_id == "b-2"


async def test_a_postponed_attempt_does_not_count_and_may_hold_the_tenant(
    schedule: ScheduleStore,
) -> None:
    await schedule.accept([requested("a0"), requested("a1"), requested("b0", identity=OTHER)], NOW)
    assert await claim_ids(schedule, 1) == ["a0"]
    await report_one(schedule, "a0", 1, "", Postponed(2.0, 10.0), NOW)
    one = await kept(schedule, "a0")
    assert (one.state, one.attempts, one.fence, one.due_us) == (
        JobState.WAITING,
        0,
        1,
        NOW + 2 * S,
    )
    assert await claim_ids(schedule, 9, NOW + 5 * S) == ["b0"]
    assert (await schedule.claim("w1", 9, LEASE, NOW + 5 * S)).next_due_us == NOW + 10 * S
    assert await claim_ids(schedule, 9, NOW + 10 * S) == ["a0", "a1"]


async def test_a_heartbeat_prolongs_and_tells(schedule: ScheduleStore) -> None:
    await schedule.accept([requested("job-1"), requested("job-2")], NOW)
    await schedule.claim("w1", 2, LEASE, NOW)
    await schedule.cancel("job-2", "", NOW)
    beats = [Beat("job-1", 1, 9), Beat("job-2", 1), Beat("job-1", 2), Beat("job-9", 1)]
    standings = await schedule.heartbeat(beats, LEASE + 5 * S, NOW + 1)
    assert standings == [
        Standing(True, False),
        Standing(True, True),
        Standing(False, False),
        Standing(False, False),
    ]
    one = await kept(schedule)
    assert (one.lease_us, one.progress_tokens) == (LEASE + 5 * S, 9)
    assert (await schedule.sweep(LEASE + 1, 10)).lost == 0
    assert (await schedule.sweep(LEASE + 5 * S, 10, leases=False)).lost == 0
    assert (await schedule.sweep(LEASE + 5 * S, 10)).lost == 2


async def test_r38_a_late_report_is_fenced_off(schedule: ScheduleStore) -> None:
    await schedule.accept([requested()], NOW)
    await schedule.claim("w1", 1, LEASE, NOW)
    assert (await schedule.sweep(LEASE, 10)).lost == 1
    assert (await kept(schedule)).history[0] == JobAttempt(
        1, "", "w1", START, from_us(LEASE), "WORKER_LOST", 14, "Its worker was lost."
    )
    (claim,) = (await schedule.claim("w2", 1, LEASE + 60 * S, LEASE + 2 * S)).claims
    assert (claim.job.fence, claim.job.attempts) == (2, 2)
    for report in (Succeeded(RESULT), PASSING, Postponed(), CancelledByTenant()):
        late = await report_one(schedule, "job-1", 1, "r1", report, LEASE + 3 * S)
        assert (late.taken, late.changed) == (False, ())
        assert (await kept(schedule)).state is JobState.RUNNING
    taken = await report_one(schedule, "job-1", 2, "r2", Succeeded(RESULT), LEASE + 4 * S)
    assert (taken.taken, (await kept(schedule)).state) == (True, JobState.SUCCEEDED)
    repeated = await report_one(schedule, "job-1", 2, "r2", Succeeded(Sealed("k", b"other")), LEASE + 5 * S)
    assert (repeated.taken, repeated.changed) == (True, ())
    found = await schedule.get("job-1")
    assert found is not None
    assert (found[0].last_request_id, found[1], found[2]) == ("r2", None, RESULT)
    unknown = await report_one(schedule, "job-9", 1, "r", PASSING, NOW)
    assert (unknown.taken, unknown.changed) == (False, ())


async def test_a_job_is_tried_as_often_as_it_may_be(schedule: ScheduleStore) -> None:
    await schedule.accept([requested()], NOW)
    now_us = NOW
    for attempt in (1, 2, 3):
        (claim,) = (await schedule.claim("w1", 1, now_us + 30 * S, now_us)).claims
        assert claim.job.attempts == attempt
        taken = await report_one(schedule, "job-1", claim.job.fence, f"r{attempt}", PASSING, now_us)
        if attempt < 3:
            assert taken.retried == "REPLICA_LOST"
            now_us = (await kept(schedule)).due_us
            assert now_us == claim.job.start_us + 2 ** (attempt - 1) * S
    assert taken.dead == {"REPLICA_LOST": 1}
    one = await kept(schedule)
    assert (one.state, [a.request_id for a in one.history]) == (
        JobState.FAILED,
        ["r1", "r2", "r3"],
    )
    rows = await schedule.outbox(10)
    assert [row.event_id for row in rows] == ["retry/job-1/1", "retry/job-1/2", "dead/job-1"]
    assert rows[1].event == RetryRequested(requested(), "r2", "REPLICA_LOST", 2)
    assert isinstance(rows[2].event, DeadLettered)
    assert (rows[2].event.attempts, rows[2].event.history) == (3, one.history)
    await schedule.published([row.number for row in rows[:2]])
    assert [row.event_id for row in await schedule.outbox(10)] == ["dead/job-1"]


async def test_its_give_up_time_ends_a_waiting_job(schedule: ScheduleStore) -> None:
    at = START + timedelta(seconds=10)
    await schedule.accept([requested("job-1", give_up_time=at), requested("job-2", give_up_time=at)], NOW)
    assert await claim_ids(schedule, 1) == ["job-1"]
    swept = await schedule.sweep(NOW + 10 * S, 10)
    assert (swept.changed, swept.dead) == (("job-2",), {"DEADLINE_EXCEEDED": 1})
    # One that runs may end; it is not tried again.
    taken = await report_one(schedule, "job-1", 1, "r", PASSING, NOW + 11 * S)
    assert ((await kept(schedule)).state, taken.dead) == (JobState.FAILED, {"REPLICA_LOST": 1})


async def test_a_claim_comes_upon_one_whose_time_is_up(schedule: ScheduleStore) -> None:
    at = START + timedelta(seconds=10)
    await schedule.accept([requested("job-1", give_up_time=at), requested("job-2")], NOW)
    found = await schedule.claim("w1", 1, LEASE, NOW + 10 * S)
    assert [claim.job.job_id for claim in found.claims] == ["job-2"]
    assert found.dead == {"DEADLINE_EXCEEDED": 1}
