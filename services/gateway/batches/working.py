"""Batches among the jobs that a worker runs."""

from __future__ import annotations

from services.gateway.batches.runner import BatchRunner
from services.gateway.jobs.ports import Postponed, Report
from services.gateway.jobs.working.identities import RenewedIdentities
from services.gateway.jobs.working.outcomes import failed
from services.gateway.jobs.working.ports import Attempt
from services.mesh.errors import LlmosError, Status

AUTH_WAIT_S = 5.0
"""Auth is asked again after that."""


class BatchJobs:
    """The `Runner` of kind BATCH. A step leaves no record of its own in the audit log: its requests do, and
    whoever handed the batch in."""

    def __init__(self, runner: BatchRunner, identities: RenewedIdentities) -> None:
        self._runner = runner
        self._identities = identities

    async def run(self, attempt: Attempt) -> Report:
        try:
            await self._identities.caller(attempt.job.identity)
        except LlmosError as error:
            if error.status is not Status.UNAUTHENTICATED:
                return Postponed(AUTH_WAIT_S)
            return failed(error, retryable=False)
        return await self._runner.run(attempt.claim)
