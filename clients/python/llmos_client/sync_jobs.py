"""Jobs for threads; the same as `async_jobs` but for how it waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Unpack

from llmos.gateway.v1 import job_service_pb2 as pb

from llmos_client import job_calls
from llmos_client.errors import DeadlineExceeded
from llmos_client.job_options import (
    DeadLetterFilter,
    NewJob,
    ReplayAllOptions,
    ReplayOptions,
    SubmitOptions,
    Work,
)
from llmos_client.job_types import (
    DeadLetter,
    Job,
    JobCounts,
    JobResult,
    JobState,
    JobUpdate,
    ReplayedDeadLetter,
    SubmittedJobs,
)
from llmos_client.sync_following import Following
from llmos_client.sync_wire import Wire
from llmos_client.tailing import GIVE_UP_AFTER_S, TailBreaks

JobWatch = Following[pb.WatchJobRequest, pb.WatchJobResponse, JobUpdate]
Replay = Following[pb.ReplayDeadLettersRequest, pb.ReplayDeadLettersResponse, ReplayedDeadLetter]


class Jobs:
    """Requests that run later, survive restarts and are tried again; needs the scope `generate`. Each method
    raises a class of `errors`; `timeout_s` is for each call."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.dead_letters = DeadLetters(wire)
        """What was given up."""

    def submit(self, work: Work, **options: Unpack[SubmitOptions]) -> Job:
        """Hands in a job. When this returns, the job is on durable storage."""
        return self._wire.unary(self._wire.jobs.SubmitJob, job_calls.submit(self._wire.config, work, options))

    def submit_many(
        self,
        jobs: Iterable[Work | NewJob],
        *,
        sent: Callable[[int], object] | None = None,
        **options: Unpack[SubmitOptions],
    ) -> SubmittedJobs:
        """Hands in up to 10,000 jobs; each is taken or refused on its own. `jobs` is read to its end before
        anything is sent. `options` are for each job that does not name its own; `idempotency_key` is for the
        whole call. `sent` is told how many have been sent so far, in a thread of grpc's."""
        call = job_calls.submit_many(self._wire.config, jobs, options)
        return self._wire.streamed(self._wire.jobs.SubmitJobs, call, sent)

    def get(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """The job as it is now, with its result where it has succeeded."""
        call = job_calls.get(self._wire.config, job_id, timeout_s=timeout_s)
        return self._wire.unary(self._wire.jobs.GetJob, call)

    def result(
        self, job_id: str, *, wait_s: float | None = None, give_up_after_s: float = GIVE_UP_AFTER_S
    ) -> JobResult:
        """What the job gave, once it has ended. Waits as long as that takes, or `wait_s`; 0: not at all.

        Raises what the job failed with, Cancelled, DeadlineExceeded where it has not ended by then, and
        Unavailable where the server stays out of reach for `give_up_after_s`. The error's `job_id` is set.
        """
        if wait_s == 0:
            return job_calls.outcome(self.get(job_id))
        last: Job | None = None
        try:
            with self.watch(job_id, timeout_s=wait_s, give_up_after_s=give_up_after_s) as updates:
                for update in updates:
                    last = update.job
        except DeadlineExceeded:
            if last is None:
                raise
        if last is None:
            raise AssertionError("a watch ends with the job's end")
        return job_calls.outcome(last)

    def list(
        self,
        *,
        states: Iterable[JobState] = (),
        labels: Mapping[str, str] | None = None,
        batch_id: str = "",
        with_results: bool = False,
        limit: int | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Job]:
        """Jobs, newest first: in one of `states`, with all of `labels`, and what they gave `with_results`."""
        token, left = "", limit
        while True:
            call = job_calls.list_page(
                self._wire.config,
                states=states,
                labels=labels or {},
                batch_id=batch_id,
                with_results=with_results,
                limit=left,
                page_token=token,
                timeout_s=timeout_s,
            )
            page = self._wire.unary(self._wire.jobs.ListJobs, call)
            yield from job_calls.listed(page)[:left]
            token, left = page.next_page_token, None if left is None else left - len(page.jobs)
            if not token or (left is not None and left <= 0):
                return

    def count(self, batch_id: str = "", *, timeout_s: float | None = None) -> JobCounts:
        """How many jobs stand where: of a batch, or all of the tenant's."""
        call = job_calls.count(self._wire.config, batch_id=batch_id, timeout_s=timeout_s)
        return self._wire.unary(self._wire.jobs.CountJobs, call)

    def cancel(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Ends a job. Ending one that has ended already changes nothing."""
        call = job_calls.cancel(self._wire.config, job_id, timeout_s=timeout_s)
        return self._wire.unary(self._wire.jobs.CancelJob, call)

    def watch(
        self, job_id: str, *, timeout_s: float | None = None, give_up_after_s: float = GIVE_UP_AFTER_S
    ) -> JobWatch:
        """The job as it is now, then each change, with the text so far, until it has ended.

        Goes on after a break. A reader that lags gets the newest state, not each one between. It gives up
        when the server stays out of reach for `give_up_after_s`, or after `timeout_s`.
        """
        return Following(
            self._wire,
            self._wire.jobs.WatchJob,
            job_calls.WatchState(job_id),
            _breaks(self._wire, timeout_s, give_up_after_s),
        )


class DeadLetters:
    """What was given up: jobs, and events that could not be read."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def list(
        self, *, limit: int | None = None, timeout_s: float | None = None, **wanted: Unpack[DeadLetterFilter]
    ) -> Iterator[DeadLetter]:
        """Dead letters, newest first."""
        token, left = "", limit
        while True:
            call = job_calls.dead_letter_page(
                self._wire.config, wanted, limit=left, page_token=token, timeout_s=timeout_s
            )
            page = self._wire.unary(self._wire.jobs.ListDeadLetters, call)
            for letter in page.dead_letters[:left]:
                yield DeadLetter.from_proto(letter)
            token, left = page.next_page_token, None if left is None else left - len(page.dead_letters)
            if not token or (left is not None and left <= 0):
                return

    def replay(self, dead_letter_id: str, **options: Unpack[ReplayOptions]) -> Job:
        """Makes a new job of it; it is gone then. NotFound: it was replayed or discarded before, maybe by an
        attempt of this call whose answer was lost."""
        call = job_calls.replay(self._wire.config, dead_letter_id, options)
        return self._wire.unary(self._wire.jobs.ReplayDeadLetter, call)

    def replay_all(self, **options: Unpack[ReplayAllOptions]) -> Replay:
        """Makes new jobs of all that match, as it is iterated: it tells of each. After a break it goes on
        with what is left, so none is replayed twice; of those whose answer was lost it does not tell."""
        return Following(
            self._wire,
            self._wire.jobs.ReplayDeadLetters,
            job_calls.ReplayState(options),
            _breaks(self._wire, options.get("timeout_s"), GIVE_UP_AFTER_S),
        )

    def discard(self, dead_letter_id: str, *, timeout_s: float | None = None) -> None:
        """Forgets it and what it holds. NotFound: as for `replay`."""
        call = job_calls.discard(self._wire.config, dead_letter_id, timeout_s=timeout_s)
        self._wire.unary(self._wire.jobs.DiscardDeadLetter, call)


def _breaks(wire: Wire, timeout_s: float | None, give_up_after_s: float) -> TailBreaks:
    return TailBreaks(wire.config.retry, wire.throttle, timeout_s=timeout_s, give_up_after_s=give_up_after_s)
