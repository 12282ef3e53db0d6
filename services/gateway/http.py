"""The HTTP edge: OpenAI's routes, translated to the same messages and the same use case as gRPC.

Each route names the gRPC method that it stands for and passes the same chain: identity, deadline, audit,
scopes and errors are not written twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

import msgspec
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, model_service_pb2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from services.gateway import http_errors, openai, openai_answers
from services.gateway.auditing import RequestRecord, current_record
from services.gateway.completion import Completions
from services.gateway.generation import Delta, Finished, Started, ValidGeneration
from services.gateway.http_endpoint import Endpoint
from services.gateway.http_exchange import Exchange
from services.gateway.models import Models
from services.gateway.request import RequestParser
from services.mesh.clock import Clock
from services.mesh.errors import Internal, RequestInvalid
from services.mesh.health import Health
from services.mesh.interceptors import Chain, new_request_id
from services.mesh.source_address import NO_PROXIES, TrustedProxies

GENERATE = "/llmos.gateway.v1.GenerationService/Generate"
STREAM_GENERATE = "/llmos.gateway.v1.GenerationService/StreamGenerate"
LIST_MODELS = "/llmos.gateway.v1.ModelService/ListModels"
GET_MODEL = "/llmos.gateway.v1.ModelService/GetModel"

_ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "developer": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
    "tool": generation_pb2.ROLE_TOOL,
}


class HttpEdge:
    """Makes the ASGI application."""

    def __init__(
        self,
        *,
        chain: Chain,
        parser: RequestParser,
        completions: Completions,
        models: Models,
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
        self._health = health
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._routes = routes
        self._proxies = proxies

    def app(self) -> Starlette:
        def audited(method: str, serve: Callable[[Exchange, RequestRecord], Awaitable[None]]) -> Endpoint:
            async def recorded(exchange: Exchange) -> None:
                await serve(exchange, current_record())

            return Endpoint(self._chain, self._clock, self._proxies, method, recorded)

        app = Starlette(
            routes=[
                Route("/healthz", self._live, methods=["GET"]),
                Route("/readyz", self._ready, methods=["GET"]),
                Route("/v1/models", audited(LIST_MODELS, self._list_models), methods=["GET"]),
                Route("/v1/models/{id:path}", audited(GET_MODEL, self._get_model), methods=["GET"]),
                Route("/v1/chat/completions", audited(GENERATE, self._chat), methods=["POST"]),
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

    async def _list_models(self, exchange: Exchange, record: RequestRecord) -> None:
        record.begin()
        found = await self._models.visible(record)
        await record.committed()
        await exchange.respond(200, openai_answers.models(found))

    async def _get_model(self, exchange: Exchange, record: RequestRecord) -> None:
        name = exchange.scope["path_params"]["id"]
        message = model_service_pb2.GetModelRequest()
        try:
            message.id = name
        except (ValueError, UnicodeError):
            raise openai.refuse("model", "is not valid text") from None
        model_id = self._parser.model(message)
        record.model = model_id
        record.begin()
        found = await self._models.named(record, model_id)
        await record.committed()
        await exchange.respond(200, openai_answers.model(found))

    async def _chat(self, exchange: Exchange, record: RequestRecord) -> None:
        body = openai.parse(await exchange.body(self._max_body_bytes))
        record.method = STREAM_GENERATE if body.stream else GENERATE
        request = self._parser.generation(to_message(body))
        exchange.watch()
        if body.stream:
            await self._stream(exchange, record, request, body.include_usage)
            return
        generation = await self._completions.generate(record, request)
        created_s = int(self._clock.now().timestamp())
        await exchange.respond(200, openai_answers.completion(generation, created_s=created_s))

    async def _stream(
        self, exchange: Exchange, record: RequestRecord, request: ValidGeneration, include_usage: bool
    ) -> None:
        writer: openai_answers.ChunkWriter | None = None
        async with aclosing(self._completions.stream(record, request)) as events:
            async for event in events:
                if isinstance(event, Started):
                    created_s = int(self._clock.now().timestamp())
                    writer = openai_answers.ChunkWriter(
                        event, created_s=created_s, n=request.n, include_usage=include_usage
                    )
                    await exchange.begin_stream()
                    await exchange.send(writer.opening())
                elif writer is None:
                    raise Internal("a stream did not begin with Started")
                elif isinstance(event, Delta):
                    if chunk := writer.delta(event):
                        await exchange.send(chunk)
                elif isinstance(event, Finished):
                    await exchange.end(writer.closing(event))


def to_message(body: openai.ChatRequest) -> generation_service_pb2.StreamGenerateRequest:
    """The same message that a gRPC caller would send. Raises RequestInvalid."""
    message = generation_service_pb2.StreamGenerateRequest()
    spec = message.spec
    try:
        _fill(spec, body)
    except (ValueError, TypeError, UnicodeError) as error:
        raise RequestInvalid(f"The body holds a value that is out of range: {error}.") from None
    return message


def _fill(spec: generation_pb2.GenerationSpec, body: openai.ChatRequest) -> None:
    spec.model = body.model
    chat = spec.prompt.chat
    chat.SetInParent()  # no messages are an empty conversation, not a prompt that is missing
    for index, given in enumerate(body.messages):
        message = chat.messages.add()
        role = _ROLES.get(given.role)
        if role is None:
            raise openai.refuse(f"messages[{index}].role", "must be system, developer, user or assistant")
        message.role = role
        message.name = given.name or ""
        message.tool_call_id = given.tool_call_id or ""
        if isinstance(given.content, str):
            message.content.add().text = given.content
        for part in given.content if isinstance(given.content, list) else ():
            message.content.add().text = part.text or ""
    sampling = spec.sampling
    for name in (
        *("temperature", "top_p", "top_k", "min_p"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    ):
        value = getattr(body, name)
        if value is not None:
            setattr(sampling, name, value)
    if body.seed is not None:
        sampling.seed = body.seed % 2**64
    sampling.logit_bias.update(body.logit_bias or {})
    if body.token_limit is not None:
        spec.max_tokens = body.token_limit
    spec.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop or ())
    spec.stop_token_ids.extend(body.stop_token_ids or ())
    spec.n = body.n or 0
    spec.logprobs = bool(body.logprobs)
    spec.top_logprobs = body.top_logprobs or 0
    spec.ignore_eos = bool(body.ignore_eos)
    spec.end_user = body.user or body.safety_identifier or ""
    spec.labels.update(body.metadata or {})


def _json(status: int, body: bytes) -> Response:
    return Response(body, status, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: unknown routes and methods."""
    if not isinstance(error, HTTPException):
        raise error
    text = {
        404: f"There is no route {request.method} {request.url.path[:200]}.",
        405: f"The route {request.url.path[:200]} does not take {request.method}.",
    }.get(error.status_code, error.detail)
    headers = {**(error.headers or {}), "x-request-id": new_request_id()}
    body = http_errors.plain_body(error.status_code, text)
    return Response(body, error.status_code, headers=headers, media_type="application/json")
