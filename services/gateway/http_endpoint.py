"""One route of the HTTP edge: the chain around a handler. The routes differ in how their errors look."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from starlette.routing import Route

from services.gateway.http_exchange import Exchange, Receive, Scope, Send
from services.mesh.clock import Clock
from services.mesh.context import RequestContext
from services.mesh.errors import Draining, LlmosError, ReaderStalled, RequestInvalid, Violation
from services.mesh.interceptors import REQUEST_TIMEOUT_KEY, Call, Chain, new_request_id, own_task
from services.mesh.source_address import TrustedProxies

Serve = Callable[[Exchange], Awaitable[None]]
Fail = Callable[[Exchange, LlmosError], Awaitable[None]]


class Endpoint:
    """An ASGI application. The route stands for the gRPC method that it names."""

    def __init__(
        self,
        chain: Chain,
        clock: Clock,
        proxies: TrustedProxies,
        method: str,
        serve: Serve,
        fail: Fail = Exchange.fail,
    ) -> None:
        self._chain = chain
        self._clock = clock
        self._proxies = proxies
        self._method = method
        self._serve = serve
        self._fail = fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        task = own_task()
        context = RequestContext(new_request_id(), self._method)
        exchange = Exchange(
            scope,
            receive,
            send,
            request_id=context.request_id,
            clock=self._clock,
            response_metadata=context.response_metadata,
            task=task,
        )
        context.source_address = self._proxies.source_address(client[0] if client else "", exchange.headers)
        allowed_s, malformed = _timeout_s(exchange.headers.get(REQUEST_TIMEOUT_KEY))
        try:
            await self._chain.run(
                Call(context, exchange.headers, allowed_s, protocol="http", task=task),
                lambda call: self._guarded(exchange, malformed),
            )
        except LlmosError as error:
            await self._fail(exchange, error)
        except asyncio.CancelledError:
            # Nobody waits for this task: it was the caller who left, or the drain that ran out of patience.
            await self._fail(exchange, Draining("The server shut down before the answer was complete."))
        finally:
            exchange.close()

    async def _guarded(self, exchange: Exchange, malformed: LlmosError | None) -> None:
        if malformed is not None:
            raise malformed
        try:
            await self._serve(exchange)
        except asyncio.CancelledError:
            if exchange.stalled:
                raise ReaderStalled(
                    "The reader took nothing for too long, so the stream was ended."
                ) from None
            raise


class ByMethod:
    """An ASGI application: one path, and an endpoint for each method that it takes."""

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        self.endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self.endpoints[method](scope, receive, send)

    def at(self, path: str) -> Route:
        """Its route, which refuses other methods and names these."""
        return Route(path, self, methods=list(self.endpoints))


def _timeout_s(value: str | None) -> tuple[float | None, LlmosError | None]:
    """What the header allows, and the error where it does not say so."""
    if value is None:
        return None, None
    if value.isascii() and value.isdecimal() and len(value) <= 9 and int(value) > 0:
        return int(value) / 1000, None
    said = "must be a number of milliseconds from 1 to 999999999"
    return None, RequestInvalid(
        f"`{REQUEST_TIMEOUT_KEY}` {said}.", violations=[Violation(REQUEST_TIMEOUT_KEY, said)]
    )
