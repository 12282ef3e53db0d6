"""What was given up: looked at, run again, or forgotten.

A replay is a new job, checked and authorised as if it were handed in now, by and for whoever replays it. An
administrator who replays another tenant's leaves it with whoever submitted it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from services.gateway.auditing import RequestRecord
from services.gateway.jobs.ports import DeadLetter, DeadLetterFilter, ScheduledJob, SchedulePort, Seals
from services.gateway.jobs.submission import Submissions, new_job_id
from services.gateway.jobs.work import Again, ValidSubmission, ValidWork
from services.mesh.context import require_current
from services.mesh.errors import DependencyUnavailable, LlmosError, NotFound, StateConflict
from services.mesh.jobs import JobKind
from services.mesh.policy import ADMIN

PAGE_SIZE = 100


class Changes(Protocol):
    """Reads what was sealed, and changes it: `request.JobParser`."""

    def again(self, payload: bytes, again: Again) -> ValidWork:
        """Raises RequestInvalid, NotImplementedYet, MessageTooLarge or DataCorrupt."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of one of many."""

    dead_letter_id: str
    job: ScheduledJob | None = None
    error: LlmosError | None = None


class DeadLetters:
    """The use case."""

    def __init__(
        self,
        *,
        schedule: SchedulePort,
        seals: Seals,
        submissions: Submissions,
        changes: Changes,
    ) -> None:
        self._schedule = schedule
        self._seals = seals
        self._submissions = submissions
        self._changes = changes

    async def found(
        self, which: DeadLetterFilter, page_size: int, page_token: str
    ) -> tuple[Sequence[DeadLetter], str]:
        """A page, and the token of the next. Raises ScopeMissing where those that could not be read are asked
        for by who is no administrator."""
        check_filter(which)
        return await self._schedule.list_dead_letters(which, page_size, page_token)

    async def replay(self, record: RequestRecord, dead_letter_id: str, again: Again) -> ScheduledJob:
        """The new job. Raises NotFound where the dead letter is gone, replayed or another's; StateConflict
        for what is no request; and as handing in a job does."""
        letter = await self._schedule.dead_letter(dead_letter_id)
        if letter.job is None or letter.job.job.kind is not JobKind.REQUEST:
            raise StateConflict(
                "Only a caller's request can be run again.", hint="Discard it, or leave it until it expires."
            )
        before = letter.job.job
        own = record.identity.tenant_id == before.identity.tenant_id
        identity = record.identity if own else before.identity
        work = self._changes.again(self._seals.open(before.request, before, "request"), again)
        if own:
            self._submissions.authorise(identity, record.source_address, work)
        submission = ValidSubmission(
            work=work,
            content=b"",
            max_attempts=again.max_attempts,
            give_up_after_s=again.give_up_after_s,
            result_ttl_s=before.result_ttl_s,
            priority=before.priority,
            labels=before.labels,
        )
        sealed = self._submissions.sealed(identity, submission, new_job_id(), before.batch_id)
        # It has no idempotency key of its own, and stays what it was for who asks by the old one.
        job = replace(sealed, request_digest=before.request_digest)
        try:
            return await self._schedule.replay(dead_letter_id, job)
        except (NotFound, DependencyUnavailable):
            # The answer to a replay that took place may have been lost, and the call repeated.
            try:
                found, _ = await self._schedule.get(job.job_id)
            except (NotFound, DependencyUnavailable):
                found = None
            if found is None:
                raise
            return found

    async def replay_all(
        self, record: RequestRecord, which: DeadLetterFilter, again: Again
    ) -> AsyncGenerator[Replayed, None]:
        """All that match and are there now, page by page. What another replays or discards meanwhile is left
        out; where the schedule goes away, DependencyUnavailable is raised, and a new call goes on."""
        check_filter(which)
        # Pages go from the newest to the oldest, so that what fails again meanwhile is not met again.
        token = ""
        while True:
            page, token = await self._schedule.list_dead_letters(which, PAGE_SIZE, token)
            for letter in page:
                try:
                    job = await self.replay(record, letter.dead_letter_id, again)
                    yield Replayed(letter.dead_letter_id, job)
                except NotFound:
                    continue
                except DependencyUnavailable:
                    raise
                except LlmosError as error:
                    yield Replayed(letter.dead_letter_id, error=error)
            if not token:
                return

    async def discard(self, dead_letter_id: str) -> None:
        """Raises NotFound."""
        await self._schedule.discard(dead_letter_id)


def check_filter(which: DeadLetterFilter) -> None:
    """Raises ScopeMissing."""
    if which.unreadable:
        require_current().identity.require(ADMIN)
