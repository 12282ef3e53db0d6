"""The chain that every call passes on its way in, the same for gRPC (all four arities) and HTTP.

From the outside in:

1. `request_id`: names the call before anything can be said about it
2. `trace`: a SERVER span around all the rest, child of the caller's
3. `metrics`: outside of `errors`, so that it sees what the caller will see
4. `errors`: whatever is raised leaves as a LlmosError; what is not ours is logged and becomes Internal
5. `limit`: refuses at once what is too much, before anything is paid for it; registers the call for the drain
6. `deadline`: the caller's or the server's cap, whichever is sooner
7. `identity`: who calls; inside the deadline, since it may have to ask auth

A link awaits the rest of the call, or returns it where it has nothing to do afterwards: each coroutine that
waits inside another takes its time again whenever the call waits and goes on. A context manager would say the
same, and cost every call ten microseconds for each link.
"""

from __future__ import annotations

import asyncio
import logging
import string
from collections.abc import Awaitable, Callable, Mapping, Set
from contextlib import AbstractContextManager
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

from msgspec import Struct, field

from services.mesh import context as request_context
from services.mesh import errors, telemetry
from services.mesh.clock import Clock
from services.mesh.context import Caller, RequestContext
from services.mesh.deadlines import Deadline
from services.mesh.errors import LlmosError
from services.mesh.randomness import random_bytes
from services.mesh.running import RunningCalls

logger = logging.getLogger(__name__)

Metadata = Mapping[str, str | bytes]
Authenticator = Callable[[str, Metadata, str], Awaitable[Caller]]
"""(method, metadata, source address) -> caller. Raises one of the UNAUTHENTICATED errors."""

REQUEST_ID_KEY = "x-request-id"
REQUEST_TIMEOUT_KEY = "x-request-timeout-ms"
"""How long the caller will wait for the whole answer, where its protocol has no deadlines: HTTP. The clients'
own `x-stainless-…` are not taken for it: they tell how long a client waits for the next byte."""
DEADLINE_MARGIN_S = 0.01
"""Our own deadline is so much before the caller's, so that it gets our status and not its own."""

_ID_ALPHABET = frozenset(string.ascii_letters + string.digits + "-_")


def own_task() -> asyncio.Task[Any]:
    """The present task. Raises RuntimeError outside of one."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a call is served outside of a task")
    return task


class Call(Struct):
    """One call on its way through the chain."""

    context: RequestContext
    metadata: Metadata
    """Keys in lower case; keys that end in `-bin` have bytes."""
    time_remaining_s: float | None = None
    """What the caller allows; None where it set no deadline."""
    protocol: str = "grpc"
    span: telemetry.Span = telemetry.NO_SPAN
    body: Rest | None = None
    """What is served inside all links."""
    task: asyncio.Task[Any] = field(default_factory=own_task)
    """That which serves it. To ask asyncio each time costs a system call."""


class Rest(Protocol):
    """What is inside of a link; to be awaited at most once."""

    def __call__(self, call: Call, /) -> Awaitable[None]: ...


class Link(Protocol):
    """A part of the chain."""

    def __call__(self, call: Call, rest: Rest) -> Awaitable[None]: ...


def new_request_id() -> str:
    """128 random bits. A caller's own id is never taken on: the audit log is keyed by this."""
    return f"req_{random_bytes(16).hex()}"


class Chain:
    """The links in their order."""

    def __init__(self, links: Mapping[str, Link]) -> None:
        self.links = dict(links)
        rest: Rest = _body
        for link in reversed(self.links.values()):
            rest = partial(link, rest=rest)
        self._whole = rest

    def run(self, call: Call, body: Rest) -> Awaitable[None]:
        """Runs the call's body inside all links. Raises LlmosError and asyncio.CancelledError only."""
        call.body = body
        return self._whole(call)


def _body(call: Call) -> Awaitable[None]:
    if call.body is None:
        raise RuntimeError("a call without a body")
    return call.body(call)


def server_chain(
    *,
    clock: Clock,
    running: RunningCalls,
    authenticator: Authenticator,
    open_methods: frozenset[str] = frozenset(),
    watch_methods: Set[str] = frozenset(),
    max_call_s: float,
    longer_s: Mapping[str, float] = MappingProxyType({}),
    adopt_request_id: bool,
) -> Chain:
    """The chain of a service.

    `open_methods` need no credential; `watch_methods` last as long as their client likes (`RunningCalls`).
    `longer_s`: by method, how much longer than `max_call_s` it may last.
    `adopt_request_id` is for services that only others of the mesh call: the id that the gateway made goes
    on through all hops.
    """
    deadlines = Deadline.blocks()

    async def request_id(call: Call, rest: Rest) -> None:
        given = call.metadata.get(REQUEST_ID_KEY)
        if adopt_request_id and isinstance(given, str) and _well_formed(given):
            call.context.request_id = given
        token = request_context.enter(call.context)
        try:
            await rest(call)
        finally:
            request_context.leave(token)

    def trace(call: Call, rest: Rest) -> Awaitable[None]:
        around = telemetry.server_span(call.context, call.metadata, call.protocol)
        return rest(call) if around is None else traced(call, rest, around)

    async def traced(call: Call, rest: Rest, around: AbstractContextManager[telemetry.Span]) -> None:
        with around as span:
            call.span = span
            await rest(call)

    async def metrics(call: Call, rest: Rest) -> None:
        begun_s = clock.monotonic()
        telemetry.calls_running[call.context.method] += 1
        status = errors.Status.OK
        try:
            await rest(call)
        except LlmosError as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = errors.Status.CANCELLED
            raise
        finally:
            telemetry.calls_running[call.context.method] -= 1
            telemetry.call_ended(
                call.span, call.context.method, call.protocol, status, clock.monotonic() - begun_s
            )

    async def anonymous(method: str, metadata: Metadata, source: str) -> Caller:
        return Caller()

    async def limit(call: Call, rest: Rest) -> None:
        with running.enter(call.task, watch=call.context.method in watch_methods):
            await rest(call)

    async def deadline(call: Call, rest: Rest) -> None:
        allowed_s = max_call_s + longer_s.get(call.context.method, 0.0)
        if call.time_remaining_s is not None:
            call.context.has_own_deadline = True
            allowed_s = min(allowed_s, call.time_remaining_s - DEADLINE_MARGIN_S)
        call.context.deadline_s = clock.monotonic() + allowed_s
        with Deadline(deadlines, call.task, allowed_s):
            await rest(call)

    async def identity(call: Call, rest: Rest) -> None:
        authenticate = anonymous if call.context.method in open_methods else authenticator
        call.context.caller = await authenticate(
            call.context.method, call.metadata, call.context.source_address
        )
        await rest(call)

    return Chain(
        {
            "request_id": request_id,
            "trace": trace,
            "metrics": metrics,
            "errors": normalised_errors,
            "limit": limit,
            "deadline": deadline,
            "identity": identity,
        }
    )


async def normalised_errors(call: Call, rest: Rest) -> None:
    """Lets only LlmosError and CancelledError out."""
    try:
        await rest(call)
    except LlmosError as error:
        if isinstance(error, errors.Internal):
            logger.exception("%s failed: %s", call.context.method, error.message)
        raise
    except Exception as error:
        logger.exception("%s failed", call.context.method)
        raise errors.Internal(f"{type(error).__name__} in {call.context.method}") from error


def _well_formed(request_id: str) -> bool:
    return 0 < len(request_id) <= 64 and _ID_ALPHABET.issuperset(request_id)
