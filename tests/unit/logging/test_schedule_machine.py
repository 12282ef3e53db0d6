"""The job's machine: what holds whatever happens, in whatever order."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.logging.schedule.job import (
    Beaten,
    CancelAsked,
    CancelledByTenant,
    Claimed,
    Event,
    Failed,
    GaveUp,
    Job,
    LeaseEnded,
    Postponed,
    Reported,
    Succeeded,
    TellWebhook,
    TimeUp,
)
from services.logging.schedule.machine import Machine, Rules
from services.mesh.jobs import JobState, RetryRequested, Sealed
from tests.framework.schedule_jobs import NOW, START, S, requested

seconds = st.floats(0, 1000)
reports = st.one_of(
    st.just(Succeeded(Sealed("k", b"result"))),
    st.builds(Failed, st.just("REPLICA_LOST"), st.just(14), st.text(max_size=3), st.booleans(), seconds),
    st.builds(Postponed, seconds, seconds),
    st.just(CancelledByTenant()),
)
fences = st.integers(0, 6)
events = st.one_of(
    st.builds(Claimed, st.just("w"), st.integers(NOW, NOW + 3000 * S)),
    st.builds(Beaten, fences, st.integers(NOW, NOW + 3000 * S), st.integers(0, 9)),
    st.builds(Reported, fences, st.just("r"), reports),
    st.just(LeaseEnded()),
    st.just(CancelAsked()),
    st.just(TimeUp()),
)
moments = st.lists(st.tuples(st.integers(0, 600 * S), events), max_size=40)


@given(
    moments=moments,
    max_attempts=st.integers(1, 4),
    give_up_s=st.integers(1, 3000),
    chance=st.floats(0, 1),
    has_webhook=st.booleans(),
)
def test_what_holds_in_any_life(
    moments: list[tuple[int, Event]], max_attempts: int, give_up_s: int, chance: float, has_webhook: bool
) -> None:
    machine = Machine(Rules(), lambda: chance)
    arrived = machine.arrive(
        requested(
            max_attempts=max_attempts,
            give_up_time=START + timedelta(seconds=give_up_s),
            has_webhook=has_webhook,
        ),
        NOW,
    )
    job, now_us, webhooks, letters = arrived.job, NOW, 0, 0
    for passed_us, event in moments:
        now_us += passed_us
        step = machine.step(job, event, now_us)
        webhooks += sum(isinstance(effect, TellWebhook) for effect in step.effects)
        letters += sum(isinstance(effect, GaveUp) for effect in step.effects)
        _judge(job, event, step.job, now_us)
        assert step.taken or (step.job is job and not step.effects)
        job = step.job
    assert webhooks == (has_webhook and job.state.is_final)
    assert letters == (job.state is JobState.FAILED)


def _judge(old: Job, event: Event, new: Job, now_us: int) -> None:
    assert 0 <= new.attempts <= new.request.max_attempts
    assert new.fence >= old.fence
    if old.state.is_final:
        assert new == old
    if new != old:
        assert new.version == old.version + 1
    if isinstance(event, Claimed) and new != old:
        assert (new.state, new.fence, new.attempts) == (JobState.RUNNING, old.fence + 1, old.attempts + 1)
        assert now_us >= old.due_us
    if isinstance(event, Reported | Beaten) and event.fence != old.fence:
        assert new == old
    if isinstance(event, Reported) and new != old:
        counted = old.attempts - isinstance(event.report, Postponed)
        assert new.attempts == counted
        if isinstance(event.report, Failed) and new.state is JobState.WAITING:
            assert new.due_us >= now_us + 0.5 * S
            assert new.due_us >= now_us + int(event.report.retry_after_s * S) - 1
            assert new.due_us < new.give_up_us
            assert event.report.retryable
    if new.state.is_final and not old.state.is_final:
        assert new.end_us == now_us
        assert new.expire_us > now_us
        assert bool(new.error_reason) == (new.state is JobState.FAILED)
    if new.state is JobState.CANCELLED and old.state is JobState.WAITING:
        assert isinstance(event, CancelAsked)


@given(attempts=st.integers(1, 40), chance=st.floats(0, 1))
def test_backoffs_double_up_to_their_limit(attempts: int, chance: float) -> None:
    machine = Machine(Rules(first_backoff_s=1, max_backoff_s=300), lambda: chance)
    far = requested(max_attempts=20, give_up_time=START + timedelta(days=7))
    running = replace(
        machine.arrive(far, NOW).job, state=JobState.RUNNING, attempts=min(attempts, 19), fence=1
    )
    failed = Failed("REPLICA_LOST", 14, "", retryable=True)
    waiting = machine.step(running, Reported(1, "r", failed), NOW).job
    longest_s = min(2 ** (min(attempts, 19) - 1), 300)
    assert longest_s * 0.5 * S - 1 <= waiting.due_us - NOW <= longest_s * S + 1


@given(attempts=st.integers(1, 25), max_attempts=st.integers(1, 20))
def test_a_retry_that_comes_in_has_its_attempts_counted(attempts: int, max_attempts: int) -> None:
    machine = Machine(Rules(), lambda: 0.0)
    job = requested(max_attempts=max_attempts)
    step = machine.arrive(RetryRequested(job, "r", "REPLICA_LOST", attempts), NOW)
    if attempts < max_attempts:
        assert (step.job.state, step.job.attempts) == (JobState.WAITING, attempts)
        assert step.job.due_us > NOW
    else:
        assert (step.job.state, step.job.error_reason) == (JobState.FAILED, "REPLICA_LOST")


def test_a_history_keeps_the_newest() -> None:
    machine = Machine(Rules(max_history=3), lambda: 1.0)
    job = machine.arrive(requested(max_attempts=9), NOW).job
    now_us = NOW
    for number in range(1, 6):
        job = machine.step(job, Claimed("w", now_us + S), now_us).job
        job = machine.step(
            job, Reported(number, f"r{number}", Failed("REPLICA_LOST", 14, "", True)), now_us
        ).job
        now_us = job.due_us
    assert [attempt.number for attempt in job.history] == [3, 4, 5]
