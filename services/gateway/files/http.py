"""OpenAI's routes for files: POST, GET and DELETE /v1/files.

They stand for methods of JobService, whose inputs and outputs files are: uploading for SubmitJob, deleting
for CancelJob, reading for GetJob and ListJobs.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Literal
from urllib.parse import parse_qsl

from msgspec import Struct
from starlette.routing import BaseRoute

from services.gateway.auditing import RequestRecord, current_record
from services.gateway.files.store import FileStore, Purpose, StoredFile
from services.gateway.files.upload import FORM_MAX_BYTES, Upload, boundary_of
from services.gateway.http_endpoint import ByMethod, Endpoint
from services.gateway.http_errors import unsupported_media_type
from services.gateway.http_exchange import Exchange
from services.gateway.openai.answers import encode
from services.gateway.openai.parsing import refuse
from services.mesh.clock import Clock
from services.mesh.errors import ConcurrencyLimit, LlmosError
from services.mesh.interceptors import Chain
from services.mesh.source_address import NO_PROXIES, TrustedProxies

_JOBS = "/llmos.gateway.v1.JobService/"
SUBMIT, GET, LIST, CANCEL = f"{_JOBS}SubmitJob", f"{_JOBS}GetJob", f"{_JOBS}ListJobs", f"{_JOBS}CancelJob"
MAX_UPLOADS = 16
"""At once, in this gateway; with S3 each may hold 24 MiB."""
MAX_PAGE = 10_000
PAGE = 1000
"""What a page holds at most, and where no number is given: OpenAI's client asks on by itself."""
_CONTENT = ((b"content-type", b"application/octet-stream"), (b"x-content-type-options", b"nosniff"))


class FileObject(Struct):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FileList(Struct):
    """Files of the caller's tenant."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Struct):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: bool


class FileRoutes:
    """Makes the routes."""

    def __init__(
        self,
        *,
        chain: Chain,
        files: FileStore,
        clock: Clock,
        upload_timeout_s: float,
        proxies: TrustedProxies = NO_PROXIES,
    ) -> None:
        self._chain = chain
        self._files = files
        self._clock = clock
        self._upload_timeout_s = upload_timeout_s
        self._proxies = proxies
        self._uploads = 0

    def routes(self) -> list[BaseRoute]:
        def audited(method: str, serve: Callable[[Exchange, RequestRecord], Awaitable[None]]) -> Endpoint:
            async def recorded(exchange: Exchange) -> None:
                await serve(exchange, current_record())

            return Endpoint(self._chain, self._clock, self._proxies, method, recorded)

        one = {"GET": audited(GET, self._stat), "DELETE": audited(CANCEL, self._delete)}
        return [
            ByMethod({"POST": audited(SUBMIT, self._create), "GET": audited(LIST, self._list)}).at(
                "/v1/files"
            ),
            ByMethod(one).at("/v1/files/{id}"),
            ByMethod({"GET": audited(GET, self._content)}).at("/v1/files/{id}/content"),
        ]

    async def _create(self, exchange: Exchange, record: RequestRecord) -> None:
        max_bytes = self._files.limits.max_file_bytes + FORM_MAX_BYTES
        body = exchange.parts(max_bytes, self._upload_timeout_s)
        if self._uploads >= MAX_UPLOADS:
            raise ConcurrencyLimit("The server takes as many files as it may at once.", retry_after_s=1)
        self._uploads += 1
        try:
            boundary = boundary_of(exchange.headers.get("content-type", ""))
            if not boundary or exchange.headers.get("content-encoding", "identity").lower() != "identity":
                raise unsupported_media_type("A file is sent as multipart/form-data, and not compressed.")
            record.begin()
            upload = Upload(boundary, body, self._files.limits.max_file_bytes)
            file = await upload.store(self._files, record.identity.tenant_id)
        except LlmosError:
            await exchange.discard(max_bytes)
            raise
        finally:
            self._uploads -= 1
        await record.committed()
        await exchange.respond(200, encode(described(file)))

    async def _list(self, exchange: Exchange, record: RequestRecord) -> None:
        query = query_of(exchange, ("after", "limit", "order", "purpose"))
        if (order := query.get("order", "desc")) not in ("asc", "desc"):
            raise refuse("order", "must be `asc` or `desc`")
        limit = number_of(query, "limit", default=PAGE, most=MAX_PAGE)
        record.begin()
        word = query.get("purpose")
        purpose = next((each for each in Purpose if each.word == word), None)
        found, more = (
            ((), False)
            if word and purpose is None
            else await self._files.list(
                record.identity.tenant_id,
                limit=min(limit, PAGE),
                after=query.get("after", ""),
                purpose=purpose,
                descending=order == "desc",
            )
        )
        await record.committed()
        ids = [each.file_id for each in found]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        await exchange.respond(
            200, encode(FileList("list", [described(each) for each in found], first, last, more))
        )

    async def _stat(self, exchange: Exchange, record: RequestRecord) -> None:
        record.begin()
        file = await self._files.stat(record.identity.tenant_id, _id(exchange))
        await record.committed()
        await exchange.respond(200, encode(described(file)))

    async def _content(self, exchange: Exchange, record: RequestRecord) -> None:
        record.begin()
        file = await self._files.stat(record.identity.tenant_id, _id(exchange))
        await record.committed()
        exchange.watch()
        async with aclosing(self._files.read(record.identity.tenant_id, file.file_id)) as chunks:
            begun = False
            async for chunk in chunks:
                if not begun:
                    # Only now: an answer that has begun can only break off.
                    await exchange.begin_content(file.size_bytes, _CONTENT)
                    begun = True
                await exchange.send(chunk)
        await exchange.end(b"")

    async def _delete(self, exchange: Exchange, record: RequestRecord) -> None:
        record.begin()
        file_id = _id(exchange)
        await self._files.delete(record.identity.tenant_id, file_id)
        await record.committed()
        await exchange.respond(200, encode(FileDeleted(file_id, "file", True)))


def described(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.file_id,
        object="file",
        bytes=file.size_bytes,
        created_at=int(file.create_time.timestamp()),
        expires_at=int(file.expire_time.timestamp()),
        filename=file.filename,
        purpose=file.purpose.word,
        status="processed",
        status_details=None,
    )


def query_of(exchange: Exchange, known: tuple[str, ...]) -> dict[str, str]:
    """The parameters of the URL. Raises RequestInvalid for one that is not known, twice there or no text."""
    found: dict[str, str] = {}
    try:
        pairs = parse_qsl(
            exchange.scope["query_string"].decode("ascii"), keep_blank_values=True, errors="strict"
        )
    except ValueError:
        raise refuse("query", "is not valid text") from None
    for name, value in pairs:
        if name not in known:
            raise refuse(name[:128], "is not a known parameter")
        if name in found:
            raise refuse(name, "must be given once")
        found[name] = value
    return found


def number_of(query: dict[str, str], name: str, *, default: int, most: int) -> int:
    """Raises RequestInvalid."""
    given = query.get(name)
    if given is None:
        return default
    if not re.fullmatch(r"[0-9]{1,6}", given) or not 1 <= int(given) <= most:
        raise refuse(name, f"must be a number from 1 to {most}")
    return int(given)


def _id(exchange: Exchange) -> str:
    found: str = exchange.scope["path_params"]["id"]
    return found
