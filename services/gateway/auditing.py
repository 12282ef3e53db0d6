"""The audit link of the chain: each authenticated request leaves exactly one outcome, whatever ends it.

It stands inside `identity`, around everything that is done for the request, so no method and no error can
leave without passing. The request in between calls `begin` when it has passed all refusals (the intent is
then written beside the work), and `committed` before the caller is sent anything. A refusal before `begin`
leaves an outcome and no intent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import partial
from types import MappingProxyType, TracebackType

from services.gateway.generation import FinishReason, Usage
from services.gateway.ports import AuditPort
from services.mesh import events
from services.mesh.actions import OPEN_METHODS
from services.mesh.clock import Clock
from services.mesh.context import Identity, RequestContext
from services.mesh.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    Internal,
    LlmosError,
    ReaderStalled,
    Status,
)
from services.mesh.events import Edge, Outcome, RequestEnded, RequestFacts, RequestStarted
from services.mesh.interceptors import Call, Rest

logger = logging.getLogger(__name__)

DEADLINE_SLACK_S = 0.02
"""A caller whose deadline passes goes away a moment before our own clock sees it."""

_REFUSALS = frozenset(
    {
        Status.INVALID_ARGUMENT,
        Status.NOT_FOUND,
        Status.ALREADY_EXISTS,
        Status.PERMISSION_DENIED,
        Status.UNAUTHENTICATED,
        Status.RESOURCE_EXHAUSTED,
        Status.FAILED_PRECONDITION,
        Status.OUT_OF_RANGE,
        Status.UNIMPLEMENTED,
    }
)
_EDGES = {"grpc": Edge.GRPC, "http": Edge.HTTP, "job": Edge.JOB}


class RequestRecord:
    """One authenticated request on its way to its outcome. The use case fills in what it learns."""

    model = ""
    labels: Mapping[str, str] = MappingProxyType({})
    usage = Usage()
    finish_reasons: tuple[FinishReason, ...] = ()
    time_to_first_token_s: float | None = None
    replica = ""
    model_revision = ""
    numerics_id = ""
    served_from_cache = False
    cache_control = ""
    """What the caller said to the response cache."""
    is_committed = False
    is_complete = False
    _intent: asyncio.Future[None] | None = None
    _begun_with: RequestFacts | None = None

    def __init__(
        self,
        context: RequestContext,
        edge: Edge,
        *,
        receive_time: datetime,
        received_s: float,
        audit: AuditPort,
    ) -> None:
        self.identity: Identity = context.identity
        self.request_id = context.request_id
        self.deadline_s = context.deadline_s
        self.has_own_deadline = context.has_own_deadline
        self.received_s = received_s
        """Arrival, on the monotonic clock."""
        self.method = context.method
        self.source_address = context.source_address
        self.credential_expires_at = context.caller.expires_at
        self.response_metadata = context.response_metadata
        """Sent beside the answer or the error: see RequestContext."""
        self._context = context
        self._edge = edge
        self._receive_time = receive_time
        self._audit = audit

    def begin(self, *, urgent: bool = True) -> None:
        """The request has passed all refusals: starts to write its intent, and returns at once. It is not
        urgent where the answer takes a while and others begin meanwhile."""
        if self._intent is not None:
            raise Internal("a request began twice")
        facts = self._begun_with = self.facts()
        self._intent = self._audit.append_started(RequestStarted(facts), urgent=urgent)

    @property
    def has_begun(self) -> bool:
        return self._intent is not None

    async def committed(self) -> None:
        """Returns when the intent is on disk. Raises AuditUnavailable."""
        if self._intent is None:
            raise Internal("a request was answered before it began")
        if self._intent.done():
            self._intent.result()
        else:
            self._audit.hurry(self.request_id)
            await asyncio.shield(self._intent)
        self.is_committed = True

    def complete(self) -> None:
        """The whole answer is with the edge: a reader that leaves from now on has not cancelled anything."""
        self.is_complete = True

    def facts(self) -> RequestFacts:
        return RequestFacts(
            request_id=self.request_id,
            identity=self.identity,
            method=self.method,
            edge=self._edge,
            model=self.model,
            trace_id=self._context.trace_id,
            receive_time=self._receive_time,
            labels=self.labels,
        )

    @property
    def intent(self) -> asyncio.Future[None] | None:
        """That of the intent, where the request has begun."""
        return self._intent

    def end(self, error: LlmosError | None, end_time: datetime) -> asyncio.Future[None]:
        """Hands the outcome over, as `AuditPort.append_ended`; an intent must be settled."""
        intent_stored = self._intent is not None and self._intent.exception() is None
        return self._audit.append_ended(
            RequestEnded(
                facts=self._begun_with or self.facts(),
                outcome=self._outcome(error, intent_stored),
                error_reason="" if error is None else error.reason,
                status_code=int(Status.OK if error is None else error.status),
                usage=events.Usage(
                    self.usage.prompt_tokens, self.usage.completion_tokens, self.usage.cached_prompt_tokens
                ),
                finish_reasons=tuple(int(reason) for reason in self.finish_reasons),
                end_time=end_time,
                time_to_first_token_s=self.time_to_first_token_s,
                replica=self.replica,
                model_revision=self.model_revision,
                served_from_cache=self.served_from_cache,
            )
        )

    def _outcome(self, error: LlmosError | None, intent_stored: bool) -> Outcome:
        if error is None:
            return Outcome.SUCCEEDED
        if isinstance(error, Cancelled | DeadlineExceeded | ReaderStalled):
            return Outcome.CANCELLED
        if not intent_stored or (error.status in _REFUSALS and self.time_to_first_token_s is None):
            return Outcome.REJECTED
        return Outcome.FAILED


_current: ContextVar[RequestRecord | None] = ContextVar("llmos_gateway_record", default=None)


def current_record() -> RequestRecord:
    """The record of the request that this task serves."""
    record = _current.get()
    if record is None:
        raise Internal("a request is served outside of the audit link")
    return record


class AuditTrail:
    """Makes the records. A component of the app, to be stopped before the spool is closed."""

    def __init__(self, audit: AuditPort, clock: Clock, is_cut: Callable[[], bool] = lambda: False) -> None:
        """`is_cut` says whether it is our own drain, and no caller, that cancels the present task."""
        self._audit = audit
        self._clock = clock
        self._is_cut = is_cut
        self._writes: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Waits for outcomes that are still being written; the spool bounds how long that takes."""
        while self._writes:
            await asyncio.gather(*self._writes, return_exceptions=True)

    def link(self, call: Call, rest: Rest) -> Awaitable[None]:
        """The link, for the chain. An open method writes its own, once it is known whose request it was."""
        return rest(call) if call.context.method in OPEN_METHODS else self._recorded(call, rest)

    async def _recorded(self, call: Call, rest: Rest) -> None:
        with self.around(call.context, _EDGES[call.protocol]) as record:
            if said := call.metadata.get("cache-control"):
                record.cache_control = str(said)
            await rest(call)

    def around(self, context: RequestContext, edge: Edge) -> Around:
        """Serves one authenticated request, in a block. Lets errors out as they came."""
        record = RequestRecord(
            context,
            edge,
            receive_time=self._clock.now(),
            received_s=self._clock.monotonic(),
            audit=self._audit,
        )
        return Around(self, record)

    def ended(self, record: RequestRecord, error: BaseException | None) -> None:
        """Hands over the outcome of a request that ended so. Raises Internal where it was answered without an
        intent."""
        if error is None:
            if not record.is_committed:
                error = Internal(f"{record.method} was answered without an intent")
                self._end(record, error)
                raise error
            self._end(record, None)
        elif isinstance(error, LlmosError):
            self._end(record, error)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._end(record, None if record.is_complete else self._gone(record))
        else:
            self._end(record, Internal(type(error).__name__))

    def _gone(self, record: RequestRecord) -> LlmosError:
        if self._is_cut():
            return Draining("The server shut down before the answer was complete.")
        if self._clock.monotonic() >= record.deadline_s - DEADLINE_SLACK_S:
            return DeadlineExceeded("The deadline passed before the answer was complete.")
        return Cancelled("The caller went away.")

    def _end(self, record: RequestRecord, error: LlmosError | None) -> None:
        """Hands the outcome over. Nobody waits for the disk: what a crash takes with it, the next life of
        this process closes."""
        intent = record.intent
        if intent is None or intent.done():
            write = record.end(error, self._clock.now())
        else:
            write = asyncio.create_task(self._end_later(record, intent, error))
        if write.done() and write.exception() is None:
            return
        self._writes.add(write)
        write.add_done_callback(partial(self._ended, record.request_id))

    async def _end_later(
        self, record: RequestRecord, intent: asyncio.Future[None], error: LlmosError | None
    ) -> None:
        end_time = self._clock.now()
        await asyncio.wait([intent])
        await record.end(error, end_time)

    def _ended(self, request_id: str, write: asyncio.Future[None]) -> None:
        self._writes.discard(write)
        if not write.cancelled() and (failure := write.exception()) is not None:
            # Nothing can be done for the request any more; the spool counts what it cannot take.
            logger.error("the outcome of %s was not written", request_id, exc_info=failure)


class Around:
    """The block around one request."""

    __slots__ = ("_record", "_token", "_trail")

    def __init__(self, trail: AuditTrail, record: RequestRecord) -> None:
        self._trail = trail
        self._record = record

    def __enter__(self) -> RequestRecord:
        self._token = _current.set(self._record)
        return self._record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._trail.ended(self._record, error)
        finally:
            try:  # noqa: SIM105 (a `suppress` takes longer than all the rest here)
                _current.reset(self._token)
            except ValueError:
                pass
