"""The client for threads. All its parts are safe to use from several threads, a single stream is not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import grpc
from llmos.gateway.v1 import generation_service_pb2

from llmos_client import calls, transport
from llmos_client.audit_types import AuditFilter, AuditRecord
from llmos_client.calls import GenerateOptions, Prompt, StreamOptions
from llmos_client.config import ClientConfig, ClientOptions
from llmos_client.errors import Cancelled
from llmos_client.generation_types import Completion, Delta, Event, Model, TokenCount
from llmos_client.retry import Attempts
from llmos_client.streaming import StreamFacts, StreamState
from llmos_client.sync_admin import Admin
from llmos_client.sync_following import AuditTail
from llmos_client.sync_jobs import Jobs
from llmos_client.sync_wire import Wire
from llmos_client.tailing import GIVE_UP_AFTER_S, TailBreaks, TailState

if TYPE_CHECKING:
    from grpc import _CallIterator


class Client:
    """A connection to an llmos gateway. Use it as a context manager, or `close` it."""

    def __init__(self, target: str | None = None, **options: Unpack[ClientOptions]) -> None:
        """`target` is host:port; see `config` for the environment. Raises ConfigurationError.

        Nothing is connected before the first call.
        """
        self._wire = Wire(ClientConfig.of(target, options))
        self.audit = Audit(self._wire)
        """The audit log; needs the scope `audit.read`."""
        self.admin = Admin(self._wire)
        """Administration; needs the scope `admin` or `tenant.admin`."""
        self.jobs = Jobs(self._wire)
        """Requests that run later, and dead letters; needs the scope `generate`."""

    @property
    def target(self) -> str:
        return self._wire.config.target

    @property
    def default_model(self) -> str | None:
        """The model of calls that name none."""
        return self._wire.config.model

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """A whole answer. Raises a class of `errors`."""
        call = calls.generate(self._wire.config, prompt, options)
        return self._wire.unary(self._wire.generation.Generate, call)

    def stream(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> Stream:
        """An answer as it comes. The work begins now; errors of the call are raised by the iteration."""
        return Stream(self._wire, calls.stream(self._wire.config, prompt, options))

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        system: str | None = None,
        timeout_s: float | None = None,
    ) -> TokenCount:
        """The length of a prompt as the model would see it."""
        call = calls.count_tokens(self._wire.config, prompt, model=model, system=system, timeout_s=timeout_s)
        return self._wire.unary(self._wire.generation.CountTokens, call)

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The models that this credential may use, sorted by id."""
        call = calls.list_models(self._wire.config, timeout_s=timeout_s)
        return self._wire.unary(self._wire.models.ListModels, call)

    def close(self) -> None:
        """Ends what is still running."""
        self._wire.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.target!r})"


class Stream(StreamFacts):
    """An answer as it comes: iterate it for its deltas. Use it as a context manager: leaving it early, by
    `break` or by an error, cancels the work at the server.

    The iteration ends only after the answer was complete and in order; otherwise it raises: StreamIncomplete,
    StreamBroken, or what the server said.
    """

    def __init__(self, wire: Wire, call: calls.StreamCall) -> None:
        self._wire = wire
        self._request = call.request
        self._attempts = Attempts(wire.config.retry, wire.throttle, call.timeout_s)
        self._state = StreamState(transport.new_trace_id())
        self._cancelled = threading.Event()
        self._events = self._run()
        self._call = self._open()

    def __iter__(self) -> Iterator[Delta]:
        for event in self._events:
            if isinstance(event, Delta):
                yield event

    def events(self) -> Iterator[Event]:
        """All events, in place of the deltas alone."""
        return self._events

    def result(self) -> Completion:
        """Reads to the end, and gives the whole answer."""
        for _ in self._events:
            pass
        return self._state.completion()

    def cancel(self) -> None:
        """Ends the work, at the server too. The iteration then raises Cancelled. From any thread."""
        self._cancelled.set()
        self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _open(self) -> _CallIterator[generation_service_pb2.StreamGenerateResponse]:
        return self._wire.generation.StreamGenerate(
            self._request,
            timeout=self._attempts.remaining_s(),
            metadata=transport.call_metadata(self._wire.config, self._state.trace_id),
        )

    def _run(self) -> Iterator[Event]:
        try:
            while True:
                try:
                    response = next(self._call, None)
                except grpc.RpcError as rpc_error:
                    error = self._wire.error(rpc_error, self._state.trace_id)
                    if self._state.started is not None:
                        raise error from rpc_error
                    if self._cancelled.wait(self._attempts.failed(error)):
                        raise Cancelled(
                            "The call was cancelled.", trace_id=self._state.trace_id
                        ) from rpc_error
                    self._call = self._open()
                    if self._cancelled.is_set():  # by another thread, which saw the former call
                        self._call.cancel()
                    continue
                if response is None:
                    self._state.end()
                    return
                if self._state.started is None:
                    self._attempts.succeeded()
                event = self._state.accept(response)
                if event is not None:
                    yield event
        finally:
            self._call.cancel()


class Audit:
    """The audit log."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def search(
        self, wanted: AuditFilter | None = None, *, limit: int = 50, timeout_s: float | None = None
    ) -> list[AuditRecord]:
        """The newest requests that match, newest first, `limit` at most (up to 100,000).

        `timeout_s` is for each page of 1,000.
        """
        calls.check_limit(limit)
        records: list[AuditRecord] = []
        token = ""
        while True:
            call = calls.search_page(
                self._wire.config,
                wanted or AuditFilter(),
                limit=limit - len(records),
                page_token=token,
                timeout_s=timeout_s,
            )
            page = self._wire.unary(self._wire.audit.Search, call)
            records += [AuditRecord.from_proto(record) for record in page.records]
            token = page.next_page_token
            if not token or len(records) >= limit:
                return records[:limit]

    def tail(
        self,
        wanted: AuditFilter | None = None,
        *,
        last: int = 10,
        after_position: int | None = None,
        timeout_s: float | None = None,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> AuditTail:
        """Follows the log: `last` stored records (up to 1,000) or all after a position, then what is added.

        Goes on after a break without losing or doubling a record. Without `timeout_s` it ends only by
        `cancel`, or when the server stays out of reach for `give_up_after_s`.
        """
        return AuditTail(
            self._wire,
            TailState(wanted or AuditFilter(), last=last, after_position=after_position),
            TailBreaks(
                self._wire.config.retry,
                self._wire.throttle,
                timeout_s=timeout_s,
                give_up_after_s=give_up_after_s,
            ),
        )
