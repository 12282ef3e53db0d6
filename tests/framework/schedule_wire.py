"""The schedule as a gateway has it over gRPC, without a network: its client, messages, the servicer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from services.gateway.jobs.clients import GrpcSchedule
from services.logging.schedule.servicer import ScheduleServicer
from services.mesh import context, validation
from services.mesh.context import Caller, RequestContext
from services.mesh.tokens import GATEWAY
from tests.framework.schedules import ScheduleInMemory


class Loopback:
    """A channel to a servicer in this process: as a gateway, for whoever's request is being served."""

    def __init__(self, servicer: object, peer: str = GATEWAY) -> None:
        self._servicer = servicer
        self._peer = peer

    def unary_unary(self, method: str, *, response_deserializer: Any, **_: Any) -> Any:
        async def call(request: Any, timeout: float | None = None) -> Any:
            handler = self._handler(method)
            with _Served(method, self._peer):
                answer = await handler(self._received(request), None)
            return response_deserializer(answer.SerializeToString())

        return call

    def unary_stream(self, method: str, *, response_deserializer: Any, **_: Any) -> Any:
        def call(request: Any) -> Any:
            return _Stream(
                self._handler(method), self._received(request), method, self._peer, response_deserializer
            )

        return call

    def _handler(self, method: str) -> Callable[..., Any]:
        handler: Callable[..., Any] = getattr(self._servicer, method.rsplit("/", 1)[1])
        return handler

    def _received(self, request: Any) -> Any:
        received = type(request).FromString(request.SerializeToString())
        validation.validate(received)
        return received


class _Served:
    """The request as the other side knows it."""

    def __init__(self, method: str, peer: str) -> None:
        asking = context.current()
        identity = asking.caller.identity if asking is not None else None
        self._context = RequestContext("served", method, caller=Caller(identity, peer))

    def __enter__(self) -> None:
        self._token = context.enter(self._context)

    def __exit__(self, *_: object) -> None:
        context.leave(self._token)


class _Stream:
    def __init__(self, handler: Any, request: Any, method: str, peer: str, deserialise: Any) -> None:
        self._served = _Served(method, peer)
        with self._served:
            self._answers = handler(request, None)
        self._deserialise = deserialise

    async def __aiter__(self) -> AsyncIterator[Any]:
        async with aclosing(self._answers) as answers:
            while True:
                with self._served:
                    try:
                        answer = await anext(answers)
                    except StopAsyncIteration:
                        return
                yield self._deserialise(answer.SerializeToString())

    def cancel(self) -> None:
        """The generator is closed by whoever iterates."""


class ScheduleOverWire(ScheduleInMemory):
    """The same, each call of the port by way of the messages."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.servicer = ScheduleServicer(self.schedule)
        wire: Any = GrpcSchedule(Loopback(self.servicer))  # type: ignore[arg-type]
        for name in (
            "claim",
            "heartbeat",
            "report",
            "get",
            "list_jobs",
            "count",
            "cancel",
            "watch",
            "list_dead_letters",
            "dead_letter",
            "replay",
            "discard",
        ):
            setattr(self, name, getattr(wire, name))
