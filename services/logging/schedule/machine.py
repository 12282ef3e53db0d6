"""The life of a job, as a pure state machine: job + event -> job, effects.

    WAITING --Claimed--> RUNNING --Reported--> SUCCEEDED | WAITING | FAILED | CANCELLED
    RUNNING --LeaseEnded--> WAITING, or FAILED where no attempt is left
    WAITING --CancelAsked | TimeUp--> CANCELLED | FAILED

Times are microseconds since 1970. What is sealed (request, result) is no part of a `Job`: stores keep it
apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

from services.logging.schedule.job import (
    NOTHING_SEALED,
    Beaten,
    CancelAsked,
    CancelledByTenant,
    Claimed,
    Event,
    Failed,
    GaveUp,
    HoldTenant,
    Job,
    KeepResult,
    LeaseEnded,
    Postponed,
    Report,
    Reported,
    Retried,
    Step,
    Succeeded,
    TellWebhook,
    TimeUp,
    Woken,
    from_us,
    to_us,
    us,
)
from services.mesh.errors import BY_REASON, DeadlineExceeded, LlmosError, WorkerLost
from services.mesh.jobs import JobAttempt, JobKind, JobPriority, JobRequested, JobState, RetryRequested


@dataclass(frozen=True, slots=True)
class Rules:
    """What a deployment may choose."""

    first_backoff_s: float = 1.0
    """Doubled for each further attempt."""
    max_backoff_s: float = 300.0
    dead_letter_ttl_s: float = 14 * 86_400.0
    max_result_ttl_s: float = 30 * 86_400.0
    max_history: int = 20
    """Failed attempts that are kept of a job: the newest."""
    webhook_attempts: int = 20
    webhook_give_up_s: float = 86_400.0
    webhook_ttl_s: float = 3600.0


class Machine:
    """The rules, with a deployment's numbers. `random` gives numbers from 0 to 1."""

    def __init__(self, rules: Rules, random: Callable[[], float]) -> None:
        self.rules = rules
        self._random = random

    def arrive(self, event: JobRequested | RetryRequested, now_us: int) -> Step:
        """A job that was not known."""
        request = event if isinstance(event, JobRequested) else event.job
        request = replace(request, request=NOTHING_SEALED)
        due_us = max(to_us(request.not_before), now_us if isinstance(event, RetryRequested) else 0)
        job = Job(request, due_us=due_us, order_us=max(due_us, to_us(request.create_time)))
        if isinstance(event, RetryRequested):
            failed = _of_reason(event.error_reason)
            attempt = JobAttempt(
                event.attempts,
                event.request_id,
                "",
                request.create_time,
                request.create_time,
                event.error_reason,
                int(failed.status),
                "The request failed for a passing reason.",
            )
            job = replace(job, attempts=event.attempts, history=(attempt,))
            if event.attempts >= request.max_attempts:
                return self._give_up(job, now_us, event.error_reason, "No attempt is left.")
            job = replace(job, due_us=max(due_us, now_us + self._backoff_us(event.attempts, 0.0)))
        if job.give_up_us <= now_us:
            return self._give_up(
                job, now_us, DeadlineExceeded.reason, "Its give-up time had passed when it was scheduled."
            )
        return Step(job)

    def refuse(self, event: JobRequested | RetryRequested, now_us: int, reason: str, detail: str) -> Step:
        """A job that is given up as it comes. Nobody's webhook is told, since nobody vouches for it."""
        request = event if isinstance(event, JobRequested) else event.job
        request = replace(request, request=NOTHING_SEALED)
        attempts = event.attempts if isinstance(event, RetryRequested) else 0
        job = Job(request, attempts=attempts)
        step = self._give_up(job, now_us, reason, detail)
        return replace(step, effects=tuple(e for e in step.effects if not isinstance(e, TellWebhook)))

    def step(self, job: Job, event: Event, now_us: int) -> Step:
        """What becomes of a job."""
        step = self._step(job, event, now_us)
        if step.taken and step.job is not job:
            return replace(step, job=replace(step.job, version=job.version + 1))
        return step

    def _step(self, job: Job, event: Event, now_us: int) -> Step:
        refused = Step(job, taken=False)
        running, waiting = job.state is JobState.RUNNING, job.state is JobState.WAITING
        match event:
            case Claimed(worker, lease_us):
                if not waiting or job.due_us > now_us or job.give_up_us <= now_us:
                    return refused
                return Step(
                    replace(
                        job,
                        state=JobState.RUNNING,
                        attempts=job.attempts + 1,
                        fence=job.fence + 1,
                        lease_us=lease_us,
                        worker=worker,
                        start_us=now_us,
                        progress_tokens=0,
                    )
                )
            case Beaten(fence, lease_us, tokens):
                if not running or fence != job.fence:
                    return refused
                tokens = max(tokens, job.progress_tokens)
                return Step(replace(job, lease_us=max(lease_us, job.lease_us), progress_tokens=tokens))
            case Reported(fence, request_id, report):
                if fence == job.reported_fence != 0:
                    return Step(job)
                if not running or fence != job.fence:
                    return refused
                return self._report(replace(job, reported_fence=fence), request_id, report, now_us)
            case LeaseEnded():
                if not running or job.lease_us > now_us:
                    return refused
                lost = Failed(
                    WorkerLost.reason, int(WorkerLost.status), "Its worker was lost.", retryable=True
                )
                return self._fail(job, "", lost, now_us)
            case CancelAsked():
                if job.state.is_final or job.cancel_asked:
                    return Step(job)
                if waiting:
                    return self._end(job, JobState.CANCELLED, now_us)
                return Step(replace(job, cancel_asked=True))
            case TimeUp():
                if not waiting or job.give_up_us > now_us:
                    return refused
                return self._give_up(job, now_us, DeadlineExceeded.reason, _time_up(job))
            case Woken():
                if not waiting or job.due_us <= now_us:
                    return refused
                return Step(replace(job, due_us=now_us))

    def _report(self, job: Job, request_id: str, report: Report, now_us: int) -> Step:
        match report:
            case Succeeded(result):
                step = self._end(replace(job, last_request_id=request_id), JobState.SUCCEEDED, now_us)
                return replace(step, effects=(KeepResult(result), *step.effects))
            case Failed():
                return self._fail(job, request_id, report, now_us)
            case Postponed(retry_after_s, hold_tenant_s):
                hold = (HoldTenant(now_us + us(hold_tenant_s)),) if hold_tenant_s > 0 else ()
                job = replace(job, attempts=job.attempts - 1)
                if job.cancel_asked:
                    step = self._end(job, JobState.CANCELLED, now_us)
                    return replace(step, effects=(*hold, *step.effects))
                return Step(_wait(job, now_us + us(retry_after_s)), hold)
            case CancelledByTenant():
                return self._end(job, JobState.CANCELLED, now_us)

    def _fail(self, job: Job, request_id: str, failed: Failed, now_us: int) -> Step:
        attempt = JobAttempt(
            job.attempts,
            request_id,
            job.worker,
            from_us(job.start_us),
            from_us(now_us),
            failed.error_reason,
            failed.status_code,
            failed.message,
        )
        job = replace(job, history=(*job.history, attempt)[-self.rules.max_history :])
        if job.cancel_asked:
            return self._end(job, JobState.CANCELLED, now_us)
        if not failed.retryable:
            return self._give_up(job, now_us, failed.error_reason, failed.message)
        if job.attempts >= job.request.max_attempts:
            return self._give_up(job, now_us, failed.error_reason, f"No attempt is left: {failed.message}")
        due_us = now_us + self._backoff_us(job.attempts, failed.retry_after_s)
        if due_us >= job.give_up_us:
            detail = f"The next attempt would come after its give-up time: {failed.message}"
            return self._give_up(job, now_us, failed.error_reason, detail)
        return Step(_wait(job, due_us), (Retried(request_id, failed.error_reason, job.attempts),))

    def _backoff_us(self, attempts: int, retry_after_s: float) -> int:
        longest_s = self.rules.max_backoff_s
        backoff_s = min(self.rules.first_backoff_s * 2 ** min(attempts - 1, 30), longest_s)
        return us(max(backoff_s * (0.5 + self._random() / 2), retry_after_s))

    def _give_up(self, job: Job, now_us: int, reason: str, detail: str) -> Step:
        step = self._end(replace(job, error_reason=reason), JobState.FAILED, now_us)
        return replace(step, effects=(GaveUp(detail[:1024]), *step.effects))

    def _end(self, job: Job, state: JobState, now_us: int) -> Step:
        ttl_s = min(job.request.result_ttl_s, self.rules.max_result_ttl_s)
        if state is JobState.FAILED:
            ttl_s = self.rules.dead_letter_ttl_s
        ended = replace(
            job, state=state, end_us=now_us, expire_us=now_us + us(ttl_s), due_us=0, lease_us=0, worker=""
        )
        if not job.request.has_webhook or job.request.kind is JobKind.WEBHOOK:
            return Step(ended)
        return Step(ended, (TellWebhook(self._webhook(ended, now_us)),))

    def _webhook(self, ended: Job, now_us: int) -> Job:
        rules, now = self.rules, from_us(now_us)
        # The version that whoever reads the ended job will see.
        ended = replace(ended, version=ended.version + 1)
        request = replace(
            ended.request,
            job_id=webhook_id(ended.job_id),
            kind=JobKind.WEBHOOK,
            create_time=now,
            not_before=now,
            max_attempts=rules.webhook_attempts,
            give_up_time=now + timedelta(seconds=rules.webhook_give_up_s),
            result_ttl_s=rules.webhook_ttl_s,
            priority=JobPriority.HIGH,
            prefix_group="",
            batch_id="",
            request_digest=b"",
            has_webhook=False,
        )
        return Job(request, due_us=now_us, order_us=now_us, ended=ended)


def webhook_id(job_id: str) -> str:
    """The id of the job that tells of another's end: a function of it, so that none is told of twice."""
    return f"wh-{hashlib.sha256(job_id.encode()).hexdigest()[:32]}"


def _wait(job: Job, due_us: int) -> Job:
    return replace(
        job, state=JobState.WAITING, due_us=due_us, lease_us=0, worker="", start_us=0, progress_tokens=0
    )


def _of_reason(reason: str) -> type[LlmosError]:
    return BY_REASON.get(reason, LlmosError)


def _time_up(job: Job) -> str:
    last = f" The last attempt: {job.history[-1].message}" if job.history else ""
    return f"Its give-up time has passed.{last}"
