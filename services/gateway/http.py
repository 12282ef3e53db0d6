"""The HTTP edge: OpenAI's routes, translated to the same messages and the same use case as gRPC.

Each route names the gRPC method that it stands for and passes the same chain: identity, deadline, audit,
scopes and errors are not written twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec
from llmos.gateway.v1 import model_service_pb2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from services.gateway import http_errors
from services.gateway.auditing import RequestRecord, current_record
from services.gateway.completion import Completions
from services.gateway.generation import Delta, Finished, Generation, Started, ValidGeneration
from services.gateway.http_endpoint import Endpoint
from services.gateway.http_exchange import Exchange, Receive, Scope, Send
from services.gateway.jobs.request import RETRY_HEADER, JobParser, retry_policy_of_header
from services.gateway.jobs.retries import Retries
from services.gateway.models import Models
from services.gateway.openai import (
    answers,
    chat,
    chat_answers,
    completions,
    completions_answers,
    document,
    responses,
    responses_answers,
)
from services.gateway.openai.parsing import refuse
from services.gateway.openai.request import to_message
from services.gateway.request import RequestParser
from services.mesh.clock import Clock
from services.mesh.errors import Internal, LlmosError, NotImplementedYet
from services.mesh.health import Health
from services.mesh.interceptors import Chain, new_request_id
from services.mesh.source_address import NO_PROXIES, TrustedProxies

GENERATE = "/llmos.gateway.v1.GenerationService/Generate"
STREAM_GENERATE = "/llmos.gateway.v1.GenerationService/StreamGenerate"
LIST_MODELS = "/llmos.gateway.v1.ModelService/ListModels"
GET_MODEL = "/llmos.gateway.v1.ModelService/GetModel"
EMBED = "/llmos.gateway.v1.EmbeddingService/Embed"

NOTHING_STORED = "There is no response {id}: this server stores none, so none can be fetched or deleted."


class Writer(Protocol):
    """Writes one stream's events."""

    def opening(self) -> bytes: ...

    def delta(self, delta: Delta, /) -> bytes: ...

    def closing(self, finished: Finished, /) -> bytes: ...

    def failed(self, error: LlmosError, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Face:
    """One of OpenAI's forms for a generation."""

    parse: Callable[[bytes], Any]
    answer: Callable[..., bytes]
    """(request, generation, created_s)"""
    writer: Callable[..., Writer]
    """(request, started, created_s, n)"""


CHAT = Face(chat.parse, chat_answers.answer, chat_answers.ChunkWriter)
COMPLETION = Face(completions.parse, completions_answers.answer, completions_answers.ChunkWriter)
RESPONSE = Face(responses.parse, responses_answers.answer, responses_answers.EventWriter)


class _App(Starlette):
    """Finds the busiest routes in one step; Starlette's layers are for all the others."""

    def __init__(self, posts: Mapping[str, Endpoint], **settings: Any) -> None:
        super().__init__(**settings)
        self._posts = posts

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        endpoint = self._posts.get(scope["path"]) if scope.get("method") == "POST" else None
        return (endpoint or super().__call__)(scope, receive, send)


class HttpEdge:
    """Makes the ASGI application."""

    def __init__(
        self,
        *,
        chain: Chain,
        parser: RequestParser,
        completions: Completions,
        models: Models,
        jobs: JobParser,
        retries: Retries,
        health: Health,
        clock: Clock,
        max_body_bytes: int,
        routes: Sequence[BaseRoute] = (),
        proxies: TrustedProxies = NO_PROXIES,
    ) -> None:
        self._chain = chain
        self._parser = parser
        self._completions = completions
        self._models = models
        self._jobs = jobs
        self._retries = retries
        self._health = health
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._routes = routes
        self._proxies = proxies
        self._document = document.document(max_body_bytes=max_body_bytes)

    def app(self) -> Starlette:
        def audited(method: str, serve: Callable[[Exchange, RequestRecord], Awaitable[None]]) -> Endpoint:
            def recorded(exchange: Exchange) -> Awaitable[None]:
                return serve(exchange, current_record())

            return Endpoint(self._chain, self._clock, self._proxies, method, recorded)

        def generating(face: Face) -> Endpoint:
            return audited(GENERATE, partial(self._generate, face))

        generations = {
            "/v1/chat/completions": generating(CHAT),
            "/v1/completions": generating(COMPLETION),
            "/v1/responses": generating(RESPONSE),
        }
        app = _App(
            generations,
            routes=[
                Route("/healthz", self._live, methods=["GET"]),
                Route("/readyz", self._ready, methods=["GET"]),
                Route("/openapi.json", self._describe, methods=["GET"]),
                Route("/v1/models", audited(LIST_MODELS, self._list_models), methods=["GET"]),
                Route("/v1/models/{id:path}", audited(GET_MODEL, self._get_model), methods=["GET"]),
                *(Route(path, endpoint, methods=["POST"]) for path, endpoint in generations.items()),
                Route("/v1/responses/{id}", _nothing_stored, methods=["GET", "DELETE"]),
                Route("/v1/embeddings", audited(EMBED, _no_embeddings), methods=["POST"]),
                *self._routes,
            ],
            exception_handlers={HTTPException: _refused},
        )
        # A redirect would lose the body, and the client its error.
        app.router.redirect_slashes = False
        return app

    async def _live(self, request: Request) -> Response:
        return _json(200, b'{"status":"live"}')

    async def _ready(self, request: Request) -> Response:
        if self._health.ready:
            return _json(200, b'{"status":"ready"}')
        missing = msgspec.json.encode({"status": "not ready", "waiting_for": self._health.waiting_for})
        return _json(503, missing)

    async def _describe(self, request: Request) -> Response:
        return _json(200, self._document)

    async def _list_models(self, exchange: Exchange, record: RequestRecord) -> None:
        record.begin()
        found = await self._models.visible(record)
        await record.committed()
        await exchange.respond(200, answers.models(found))

    async def _get_model(self, exchange: Exchange, record: RequestRecord) -> None:
        name = exchange.scope["path_params"]["id"]
        message = model_service_pb2.GetModelRequest()
        try:
            message.id = name
        except (ValueError, UnicodeError):
            raise refuse("model", "is not valid text") from None
        model_id = self._parser.model(message)
        record.model = model_id
        record.begin()
        found = await self._models.named(record, model_id)
        await record.committed()
        await exchange.respond(200, answers.model(found))

    async def _generate(self, face: Face, exchange: Exchange, record: RequestRecord) -> None:
        body = face.parse(await exchange.json(self._max_body_bytes))
        exchange.parameter = body.parameter
        record.method = STREAM_GENERATE if body.stream else GENERATE
        message = to_message(body)
        request = self._parser.generation(message)
        policy = retry_policy_of_header(exchange.headers.get(RETRY_HEADER), streams=body.stream)
        exchange.watch()
        if body.stream:
            await self._stream(exchange, record, face, body, request)
            return
        retry = self._jobs.retry(message.spec, request, record.source_address, policy)
        generate = partial(self._completions.generate, record, request)
        generation: Generation = await self._retries.around(record, retry, generate)
        created_s = int(self._clock.now().timestamp())
        await exchange.respond(200, face.answer(body, generation, created_s=created_s))

    async def _stream(
        self, exchange: Exchange, record: RequestRecord, face: Face, body: Any, request: ValidGeneration
    ) -> None:
        writer: Writer | None = None
        gathers = False
        async with aclosing(self._completions.stream(record, request)) as events:
            async for event in events:
                if isinstance(event, Started):
                    created_s = int(self._clock.now().timestamp())
                    writer = face.writer(body, event, created_s=created_s, n=request.n)
                    await exchange.begin_stream(writer.failed, writer.opening())
                elif writer is None:
                    raise Internal("a stream did not begin with Started")
                elif isinstance(event, Delta):
                    if chunk := writer.delta(event):
                        await exchange.send(chunk)
                        if not gathers:
                            # The first token is not held back, nor is one that comes after a pause.
                            gathers = True
                            exchange.gather()
                elif isinstance(event, Finished):
                    await exchange.end(writer.closing(event))


async def _no_embeddings(exchange: Exchange, record: RequestRecord) -> None:
    raise NotImplementedYet(
        "Embeddings are not offered by this version of the server.", hint="A later version will offer them."
    )


async def _nothing_stored(request: Request) -> Response:
    return _plain(404, NOTHING_STORED.format(id=request.path_params["id"][:100]), {})


def _json(status: int, body: bytes) -> Response:
    return Response(body, status, media_type="application/json")


def _plain(status: int, text: str, headers: dict[str, str]) -> Response:
    headers = {**headers, "x-request-id": new_request_id(), "x-should-retry": "false"}
    body = http_errors.plain_body(status, text)
    return Response(body, status, headers=headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: unknown routes and methods."""
    if not isinstance(error, HTTPException):
        raise error
    text = {
        404: f"There is no route {request.method} {request.url.path[:200]}.",
        405: f"The route {request.url.path[:200]} does not take {request.method}.",
    }.get(error.status_code, error.detail)
    return _plain(error.status_code, text, dict(error.headers or {}))
