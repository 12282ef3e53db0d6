"""A caller's request, run as a job: through the links that a request of the edges passes, and the same use
case. So each attempt is one authenticated request of the audit log, on the edge JOB."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing

from services.gateway.auditing import current_record
from services.gateway.completion import Completions
from services.gateway.folding import Fold
from services.gateway.generation import Delta, Started
from services.gateway.jobs.ports import Failed, Postponed, Report, Seals, Succeeded
from services.gateway.jobs.working.identities import RenewedIdentities
from services.gateway.jobs.working.outcomes import report_of, unreadable
from services.gateway.jobs.working.ports import Attempt, Payloads, Work
from services.mesh.clock import Clock
from services.mesh.context import Caller, RequestContext
from services.mesh.errors import DataCorrupt, LlmosError, MessageTooLarge, StateConflict, Status
from services.mesh.interceptors import Call, Chain, Link, Rest

PROTOCOL = "job"
AUTH_WAIT_S = 5.0
"""Auth is asked again after that."""
NO_KEY_WAIT_S = 60.0
MAX_RESULT_BYTES = 4 * 1024 * 1024 - 64 * 1024
"""A message of gRPC holds 4 MiB."""
_NOT_FOR_JOBS = ("identity", "slowdown")
"""Nobody shows a credential."""


class RequestRunner:
    """The `Runner` of kind REQUEST."""

    def __init__(
        self,
        links: Mapping[str, Link],
        identities: RenewedIdentities,
        completions: Completions,
        payloads: Payloads,
        seals: Seals,
        clock: Clock,
    ) -> None:
        """`links` are those of the edges' chain."""
        self._identities = identities
        self._completions = completions
        self._payloads = payloads
        self._seals = seals
        self._clock = clock
        inside: dict[str, Link] = {}
        for name, link in links.items():
            if name not in _NOT_FOR_JOBS:
                inside[name] = link
            if name == "audit":
                inside["renewed"] = self._renewed
        self.chain = Chain(inside)

    async def run(self, attempt: Attempt) -> Report:
        job = attempt.job
        try:
            plaintext = self._seals.open(job.request, job, "request")
        except DataCorrupt as error:
            return unreadable(error)
        except StateConflict:
            # This gateway has no key: another one may.
            return Postponed(NO_KEY_WAIT_S)
        try:
            # Before anything is written of the attempt: while auth is away, there is none.
            await self._identities.caller(job.identity)
        except LlmosError as error:
            if error.status is not Status.UNAUTHENTICATED:
                return Postponed(AUTH_WAIT_S)
        work: Work | LlmosError
        try:
            work = self._payloads.work(plaintext, job)
        except LlmosError as error:
            work = error
        address = work.source_address if isinstance(work, Work) else ""
        context = RequestContext(attempt.request_id, job.method, address, caller=Caller(job.identity))
        left_s = (job.give_up_time - self._clock.now()).total_seconds()
        result = b""

        async def body(call: Call) -> None:
            nonlocal result
            if isinstance(work, LlmosError):
                record = current_record()
                record.model = job.model
                raise work
            result = await self._answered(attempt, work)

        try:
            await self.chain.run(Call(context, {}, left_s, protocol=PROTOCOL), body)
        except LlmosError as error:
            return report_of(error)
        finally:
            attempt.waits = False
        return self._succeeded(attempt, result)

    async def _renewed(self, call: Call, rest: Rest) -> None:
        """The link that stands in the place of `identity`, but inside `audit`: a refusal is on record with
        whom it refused."""
        caller = await self._identities.caller(call.context.identity)
        call.context.caller = caller
        if caller.identity is not None:
            current_record().identity = caller.identity
        await rest(call)

    async def _answered(self, attempt: Attempt, work: Work) -> bytes:
        request = work.request
        folded = Fold(request.n)
        attempt.texts, attempt.waits = folded.texts, True
        async with aclosing(self._completions.stream(current_record(), request)) as events:
            async for event in events:
                if isinstance(event, Started):
                    attempt.waits = False
                elif isinstance(event, Delta):
                    attempt.progress_tokens += len(event.token_ids)
                folded.add(event)
        return self._payloads.result(folded.result())

    def _succeeded(self, attempt: Attempt, result: bytes) -> Report:
        if len(result) > MAX_RESULT_BYTES:
            what = f"The result has {len(result)} bytes, and {MAX_RESULT_BYTES} can be kept."
            return Failed(MessageTooLarge.reason, int(MessageTooLarge.status), what, retryable=False)
        return Succeeded(self._seals.seal(result, attempt.job, "result"))
