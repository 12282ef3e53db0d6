"""OpenAI's routes for batches: POST and GET /v1/batches. They stand for methods of JobService."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from starlette.routing import BaseRoute

from services.gateway.auditing import RequestRecord, current_record
from services.gateway.batches import answers
from services.gateway.batches.batches import Batches
from services.gateway.batches.ports import ENDPOINTS, BatchWork
from services.gateway.files.http import CANCEL, GET, LIST, SUBMIT, number_of, query_of
from services.gateway.files.upload import MAX_TTL_S, MIN_TTL_S
from services.gateway.http_endpoint import ByMethod, Endpoint
from services.gateway.http_exchange import Exchange
from services.gateway.openai import parsing
from services.gateway.openai.parsing import refuse
from services.mesh.clock import Clock
from services.mesh.interceptors import Chain
from services.mesh.source_address import NO_PROXIES, TrustedProxies

WINDOW, WINDOW_S = "24h", 24 * 3600
MAX_BODY_BYTES = 64 * 1024
MAX_PAGE, PAGE = 100, 20
MAX_METADATA = 16
Key = Annotated[str, Meta(min_length=1, max_length=64)]
Value = Annotated[str, Meta(max_length=512)]


class ExpiresAfter(Struct, forbid_unknown_fields=True):
    """How long the files that a batch writes are kept."""

    anchor: str
    seconds: Annotated[int, Meta(ge=MIN_TTL_S, le=MAX_TTL_S)]


class BatchRequest(Struct, forbid_unknown_fields=True):
    """A batch to run."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[Key, Value], Meta(max_length=MAX_METADATA)] | None = None
    output_expires_after: ExpiresAfter | None = None


_decoder = msgspec.json.Decoder(BatchRequest)


class BatchRoutes:
    """Makes the routes."""

    def __init__(
        self, *, chain: Chain, batches: Batches, clock: Clock, proxies: TrustedProxies = NO_PROXIES
    ) -> None:
        self._chain = chain
        self._batches = batches
        self._clock = clock
        self._proxies = proxies

    def routes(self) -> list[BaseRoute]:
        def audited(method: str, serve: Callable[[Exchange, RequestRecord], Awaitable[None]]) -> Endpoint:
            async def recorded(exchange: Exchange) -> None:
                await serve(exchange, current_record())

            return Endpoint(self._chain, self._clock, self._proxies, method, recorded)

        all_of_them = {"POST": audited(SUBMIT, self._create), "GET": audited(LIST, self._list)}
        return [
            ByMethod(all_of_them).at("/v1/batches"),
            ByMethod({"GET": audited(GET, self._get)}).at("/v1/batches/{id}"),
            ByMethod({"POST": audited(CANCEL, self._cancel)}).at("/v1/batches/{id}/cancel"),
        ]

    async def _create(self, exchange: Exchange, record: RequestRecord) -> None:
        body = parsing.decode(_decoder, await exchange.json(MAX_BODY_BYTES))
        if body.endpoint not in ENDPOINTS:
            raise refuse("endpoint", f"must be one of {', '.join(ENDPOINTS)}")
        if body.completion_window != WINDOW:
            raise refuse("completion_window", f"must be `{WINDOW}`")
        expires = body.output_expires_after
        if expires is not None and expires.anchor != "created_at":
            raise refuse("output_expires_after.anchor", "must be `created_at`")
        work = BatchWork(
            input_file_id=body.input_file_id,
            endpoint=body.endpoint,
            window_s=WINDOW_S,
            line_key=b"",
            metadata=body.metadata or {},
            output_ttl_s=expires.seconds if expires else 0,
        )
        await exchange.respond(200, answers.batch(await self._batches.create(record, work)))

    async def _list(self, exchange: Exchange, record: RequestRecord) -> None:
        query = query_of(exchange, ("after", "limit"))
        limit = number_of(query, "limit", default=PAGE, most=MAX_PAGE)
        record.begin()
        found, more = await self._batches.list(limit=limit, after=query.get("after", ""))
        await record.committed()
        await exchange.respond(200, answers.batches(found, more))

    async def _get(self, exchange: Exchange, record: RequestRecord) -> None:
        record.begin()
        found = await self._batches.get(exchange.scope["path_params"]["id"])
        await record.committed()
        await exchange.respond(200, answers.batch(found))

    async def _cancel(self, exchange: Exchange, record: RequestRecord) -> None:
        # The official clients send no body, others an empty object.
        await exchange.body(MAX_BODY_BYTES)
        found = await self._batches.cancel(record, exchange.scope["path_params"]["id"])
        await exchange.respond(200, answers.batch(found))
