"""A request whose caller asked for it goes on as a job where it fails for a passing reason."""

from __future__ import annotations

import copy
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from services.gateway.auditing import RequestRecord
from services.gateway.jobs.ports import JobSpool, Seals
from services.gateway.jobs.submission import Submissions, new_job_id
from services.gateway.jobs.work import RetryPolicy, ValidSubmission, ValidWork
from services.mesh.errors import LlmosError
from services.mesh.jobs import RetryRequested

logger = logging.getLogger(__name__)

T = TypeVar("T")
JOB_ID_KEY = "x-llmos-job-id"
"""A header on HTTP, trailing metadata on gRPC; the error's metadata has it as `job_id`."""


@dataclass(frozen=True, slots=True)
class Retry:
    """A request that goes on as a job where it fails."""

    work: ValidWork
    policy: RetryPolicy


class Retries:
    """Makes the jobs."""

    def __init__(self, submissions: Submissions, spool: JobSpool, seals: Seals) -> None:
        self._submissions = submissions
        self._spool = spool
        self._seals = seals

    def around(
        self, record: RequestRecord, retry: Retry | None, work: Callable[[], Awaitable[T]]
    ) -> Awaitable[T]:
        """What the work gives. Its error names the job where it goes on as one. Raises StateConflict where
        that is asked for, and this deployment offers no jobs."""
        return work() if retry is None else self._retried(record, retry, work)

    async def _retried(self, record: RequestRecord, retry: Retry, work: Callable[[], Awaitable[T]]) -> T:
        self._seals.keyed_hash(record.identity.tenant_id, "probe", b"")
        try:
            return await work()
        except LlmosError as error:
            raise await self._going_on(record, retry, error) from error

    async def _going_on(self, record: RequestRecord, retry: Retry, error: LlmosError) -> LlmosError:
        """The error, which names the job once that is on the disk. One that does not pass stays as it is; so
        does one where the job cannot be kept: the caller is told of the failure alone."""
        if not error.retryable:
            return error
        submission = ValidSubmission(
            work=retry.work,
            content=retry.work.payload,
            max_attempts=retry.policy.max_attempts,
            give_up_after_s=retry.policy.give_up_after_s,
            labels=record.labels,
        )
        try:
            job = self._submissions.sealed(record.identity, submission, new_job_id())
            await self._spool.append_job(RetryRequested(job, record.request_id, error.reason, attempts=1))
        except LlmosError as failure:
            logger.warning("%s does not go on as a job: %s", record.request_id, failure.message)
            return error
        record.response_metadata[JOB_ID_KEY] = job.job_id
        # A copy: others may have failed with the same one, as those do that wait for one answer.
        named = copy.copy(error)
        named.metadata = error.metadata | {"job_id": job.job_id}
        named.retryable, named.retry_after_s = False, None
        named.hint = f"The request goes on as the job {job.job_id}: do not repeat it."
        return named
