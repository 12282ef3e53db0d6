"""The use case: one straight line with named phases, the same for both edges and for jobs.

authorise -> reserve limits -> response cache -> admit -> intent -> route -> stream -> settle. The outcome is
written by the audit link around the whole call (`auditing`), which no path can leave without passing. The
intent is written while the replica already prefills, and is on disk before the caller sees the first byte.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from msgspec import Struct

from services.gateway.admission.claim import Claim
from services.gateway.admission.permits import Admission, Permit
from services.gateway.auditing import RequestRecord
from services.gateway.authorisation import Authorisation
from services.gateway.cache.answers import AnswerCache
from services.gateway.folding import Fold, folded
from services.gateway.generation import (
    Delta,
    EngineStarted,
    Event,
    Finished,
    Generation,
    Started,
    TokenCount,
    Usage,
    ValidGeneration,
    ValidPrompt,
    WholeAnswer,
)
from services.gateway.limits.guard import Limits, Ticket
from services.gateway.routing import Replica, Router
from services.gateway.telemetry import Instruments, Measured
from services.mesh.clock import Clock
from services.mesh.errors import (
    DataCorrupt,
    DependencyUnavailable,
    Internal,
    LlmosError,
    ReplicaLost,
    RequestInvalid,
    Status,
)
from services.mesh.interceptors import REQUEST_TIMEOUT_KEY

MAX_ATTEMPTS = 2
"""A replica that is lost before it has sent anything is replaced once."""


class _Progress(Struct, eq=False):
    """What has been seen of an answer so far."""

    ticket: Ticket
    permit: Permit
    measured: Measured
    attempts: int = 1
    engine: EngineStarted | None = None
    replica: str = ""
    sent_s: float = 0.0
    """When the replica was asked, on the monotonic clock."""
    last_seq: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    finished: Finished | None = None

    def usage(self) -> Usage:
        """What the engine counted; before it has said so, what was delivered."""
        if self.finished is not None:
            return self.finished.usage
        prompt_tokens = self.engine.prompt_tokens if self.engine else 0
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=self.completion_tokens)


class Completions:
    """Generates, and counts what a generation would cost."""

    def __init__(
        self,
        *,
        authorisation: Authorisation,
        limits: Limits,
        cache: AnswerCache,
        admission: Admission,
        router: Router,
        clock: Clock,
        instruments: Instruments,
        max_tokens_limit: int,
        require_deadline: bool = False,
    ) -> None:
        """`max_tokens_limit` is what a request asks for that names no number, for each choice.
        `require_deadline` refuses those that leave their deadline to us."""
        self._require_deadline = require_deadline
        self._authorisation = authorisation
        self._limits = limits
        self._max_tokens_limit = max_tokens_limit
        self._cache = cache
        self._admission = admission
        self._router = router
        self._clock = clock
        self._instruments = instruments

    async def stream(self, record: RequestRecord, request: ValidGeneration) -> AsyncGenerator[Event, None]:
        """Started, then Delta and Moved, then Finished. Closing the generator ends the work at the replica.

        Raises LlmosError: of policy, limits and routing before Started; ReplicaLost, DataCorrupt or what the
        replica raised also later.
        """
        ticket = await self._reserved(record, request)
        try:
            events = self._generated(record, request, ticket)
            if not self._cache.passes(record, request):
                events = self._cache.stream(record, request, events, whole=False)
            async with aclosing(events):
                async for event in events:
                    yield event
        finally:
            _end(record, ticket)

    async def generate(self, record: RequestRecord, request: ValidGeneration) -> Generation:
        """The whole answer, which nobody reads along. Raises as `stream` does."""
        ticket = await self._reserved(record, request)
        try:
            if self._cache.passes(record, request):
                started, answer = await self._generated_whole(record, request, ticket)
                return folded(started, answer.deltas, answer.finished)
            fold = Fold(request.n)
            events = self._events_of_whole(record, request, ticket)
            async with aclosing(self._cache.stream(record, request, events, whole=True)) as stream:
                async for event in stream:
                    fold.add(event)
            return fold.result()
        finally:
            _end(record, ticket)

    async def _reserved(self, record: RequestRecord, request: ValidGeneration) -> Ticket:
        """Passes policy and limits."""
        record.model, record.labels = request.model, request.labels
        self._authorisation.decide_request(
            record.identity,
            record.method,
            address=record.source_address,
            model=request.model,
            task=request.prompt.task,
            max_tokens=request.n * (request.max_tokens or self._max_tokens_limit),
            labels=request.labels,
        )
        self._check_deadline(record)
        return await self._limits.reserve(record, request)

    def _check_deadline(self, record: RequestRecord) -> None:
        if self._require_deadline and not record.has_own_deadline:
            raise RequestInvalid(
                "The request has no deadline, and this deployment serves none without.",
                hint=f"Set a deadline on the call; on HTTP, send `{REQUEST_TIMEOUT_KEY}`.",
            )

    async def _generated(
        self, record: RequestRecord, request: ValidGeneration, ticket: Ticket
    ) -> AsyncGenerator[Event, None]:
        """The answer of an engine. Another replica takes over only before the first event."""
        with self._instruments.generation(request, record) as measured:
            async with self._admission.permit(self._claim(record, request)) as permit:
                progress = self._begin(record, ticket, permit, measured)
                try:
                    while True:
                        replica = await self._chosen(request.model, progress)
                        events = replica.port.generate(record.request_id, request)
                        try:
                            with replica.lease():
                                async with aclosing(events):
                                    async for event in events:
                                        if isinstance(event, Delta):
                                            self._check(event, record, request, progress)
                                            yield event
                                        elif isinstance(event, EngineStarted):
                                            progress.ticket.correct(event.prompt_tokens)
                                            yield await self._begun(event, record, request, progress)
                                        else:
                                            self._finish(event, record, request, progress)
                                            yield event
                                            return
                            raise ReplicaLost("The replica ended the stream before the answer was complete.")
                        except LlmosError as error:
                            self._give_up_or_move(replica, error, progress)
                finally:
                    self._settle(record, progress)

    async def _generated_whole(
        self, record: RequestRecord, request: ValidGeneration, ticket: Ticket
    ) -> tuple[Started, WholeAnswer]:
        """As `_generated`, in one piece."""
        with self._instruments.generation(request, record) as measured:
            async with self._admission.permit(self._claim(record, request)) as permit:
                progress = self._begin(record, ticket, permit, measured)
                try:
                    while True:
                        replica = await self._chosen(request.model, progress)
                        try:
                            with replica.lease():
                                answer = await replica.port.generate_whole(record.request_id, request)
                            break
                        except LlmosError as error:
                            self._give_up_or_move(replica, error, progress)
                    started = await self._begun(answer.started, record, request, progress)
                    for delta in answer.deltas:
                        self._check(delta, record, request, progress)
                    self._finish(answer.finished, record, request, progress)
                    return started, answer
                finally:
                    self._settle(record, progress)

    async def _events_of_whole(
        self, record: RequestRecord, request: ValidGeneration, ticket: Ticket
    ) -> AsyncGenerator[Event, None]:
        """`_generated_whole` for the cache, which may have no use for it."""
        started, answer = await self._generated_whole(record, request, ticket)
        yield started
        for delta in answer.deltas:
            yield delta
        yield answer.finished

    async def count_tokens(self, record: RequestRecord, request: ValidPrompt) -> TokenCount:
        """Raises ScopeMissing, PolicyDenied, ModelNotFound, NoReplica, ReplicaLost, or what the replica
        raised."""
        record.model = request.model
        self._authorisation.decide_request(
            record.identity,
            record.method,
            address=record.source_address,
            model=request.model,
            task=request.prompt.task,
            max_tokens=0,
            labels={},
        )
        record.begin()
        attempts = 1
        while True:
            replica = await self._router.choose(request.model)
            try:
                with replica.lease():
                    count = await replica.port.count_tokens(request)
            except LlmosError as error:
                self._move(replica, error, attempts)
                attempts += 1
            else:
                await record.committed()
                return count

    def _claim(self, record: RequestRecord, request: ValidGeneration) -> Claim:
        identity = record.identity
        return Claim(
            model=request.model,
            tenant_id=identity.tenant_id,
            key=identity.key_id or identity.client_id,
            tokens=request.prompt.estimated_tokens
            + request.n * (request.max_tokens or self._max_tokens_limit),
            sequences=request.n,
            deadline_s=record.deadline_s,
            priority=request.priority,
        )

    def _begin(self, record: RequestRecord, ticket: Ticket, permit: Permit, measured: Measured) -> _Progress:
        """There is a place for the request."""
        measured.waited(permit.waited_s)
        if not record.has_begun:
            # A replica takes longer than the disk, and one write does for all that begin meanwhile.
            record.begin(urgent=self._admission.running <= 1)
        return _Progress(ticket, permit, measured)

    async def _chosen(self, model: str, progress: _Progress) -> Replica:
        """Who is asked now."""
        replica = await self._router.choose(model)
        progress.replica, progress.sent_s = replica.name, self._clock.monotonic()
        return replica

    def _give_up_or_move(self, replica: Replica, error: LlmosError, progress: _Progress) -> None:
        """Raises `error` where something of the answer has come, or nobody else may do better."""
        if progress.engine is not None:
            if isinstance(error, ReplicaLost):
                self._router.lost(replica)
            raise error
        self._move(replica, error, progress.attempts)
        progress.attempts += 1

    def _move(self, replica: Replica, error: LlmosError, attempts: int) -> None:
        """Raises `error` unless another replica, or this one come back, may do better."""
        if error.status is not Status.UNAVAILABLE or isinstance(error, DependencyUnavailable):
            raise error
        self._router.lost(replica)
        if attempts >= MAX_ATTEMPTS:
            raise error

    # A replica keeps the contract: EngineStarted, deltas without gap or repeat, Finished.

    async def _begun(
        self, event: EngineStarted, record: RequestRecord, request: ValidGeneration, progress: _Progress
    ) -> Started:
        if progress.engine is not None:
            raise Internal("a replica began the same answer twice")
        progress.engine = event
        # The last moment: nothing may reach the caller before the intent is on disk.
        await record.committed()
        return Started(record.request_id, request.model, event.model_revision, request.sampling.seed)

    def _check(
        self, delta: Delta, record: RequestRecord, request: ValidGeneration, progress: _Progress
    ) -> None:
        engine = progress.engine
        if engine is None or delta.seq != progress.last_seq + 1:
            raise DataCorrupt(f"The stream is broken: delta {delta.seq} came after {progress.last_seq}.")
        if delta.choice_index >= request.n:
            raise Internal("a replica sent a choice that was not asked for")
        progress.last_seq = delta.seq
        progress.completion_tokens += len(delta.token_ids)
        if progress.first_token_s is None:
            since_s = engine.first_token_s
            arrived_s = self._clock.monotonic() if since_s is None else progress.sent_s + since_s
            progress.first_token_s = arrived_s - record.received_s
            progress.permit.first_token(arrived_s)

    def _finish(
        self, event: Finished, record: RequestRecord, request: ValidGeneration, progress: _Progress
    ) -> None:
        if progress.engine is None or len(event.finish_reasons) != request.n:
            raise Internal("a replica finished what it did not begin, or not each choice")
        progress.finished = event
        self._note(record, progress)
        record.complete()

    def _settle(self, record: RequestRecord, progress: _Progress) -> None:
        """The work has ended, however it did."""
        if progress.finished is None:
            self._note(record, progress)
        usage, engine = record.usage, progress.engine
        progress.measured.settle(usage, progress.finished, engine, progress.first_token_s)
        progress.ticket.settle(usage if engine else None)

    def _note(self, record: RequestRecord, progress: _Progress) -> None:
        """What the outcome will say."""
        finished, engine = progress.finished, progress.engine
        record.usage = progress.usage()
        record.finish_reasons = finished.finish_reasons if finished else ()
        record.time_to_first_token_s = progress.first_token_s
        if engine is None:
            record.replica = progress.replica
        else:
            record.replica = engine.replica
            record.model_revision, record.numerics_id = engine.model_revision, engine.numerics_id


def _end(record: RequestRecord, ticket: Ticket) -> None:
    """What an engine did is settled where it did it; an answer from the cache is a request without tokens."""
    ticket.settle(Usage() if record.has_begun else None)
