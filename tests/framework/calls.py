"""Calls as a plain client makes them, and the history that a test judges afterwards."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from llmos.events.v1 import events_pb2
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc
from llmos.logging.v1 import audit_service_pb2, audit_service_pb2_grpc

from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually


@dataclass
class Streamed:
    """What a client saw of one stream."""

    request_id: str = ""
    text: str = ""
    seqs: list[int] = field(default_factory=list)
    finished: bool = False
    error: grpc.aio.AioRpcError | None = None

    @property
    def unbroken(self) -> bool:
        """No delta doubled, none lost, as far as it went."""
        return self.seqs == list(range(1, len(self.seqs) + 1))


def spec(text: str, *, model: str = "echo", **fields: Any) -> generation_pb2.GenerationSpec:
    return generation_pb2.GenerationSpec(
        model=model, prompt=generation_pb2.Prompt(text=text), sampling={"seed": 1}, **fields
    )


class Caller:
    """One client of a mesh's gateway."""

    def __init__(self, mesh: MeshHarness, *, key: str | None = None, gateway: str = "gateway") -> None:
        self._metadata = mesh.bearer(key)
        channel = mesh.channel(gateway)
        self.generation = generation_service_pb2_grpc.GenerationServiceStub(channel)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(channel)

    def begin(self, text: str, *, timeout_s: float | None = 60, **fields: Any) -> Any:
        """The call itself, for tests that cancel it."""
        request = generation_service_pb2.StreamGenerateRequest(spec=spec(text, **fields))
        return self.generation.StreamGenerate(request, metadata=self._metadata, timeout=timeout_s)

    async def stream(
        self, text: str, *, first: asyncio.Event | None = None, timeout_s: float | None = 60, **fields: Any
    ) -> Streamed:
        """Reads a stream to its end, good or bad; `first` is set when something has come."""
        seen = Streamed()
        call = self.begin(text, timeout_s=timeout_s, **fields)
        try:
            async for response in call:
                match response.WhichOneof("event"):
                    case "started":
                        seen.request_id = response.started.request_id
                    case "delta":
                        seen.seqs.append(response.delta.seq)
                        seen.text += response.delta.text
                        if first is not None:
                            first.set()
                    case "finished":
                        seen.finished = True
        except grpc.aio.AioRpcError as error:
            seen.error = error
            seen.request_id = seen.request_id or request_id_of(error)
        finally:
            call.cancel()
        return seen

    async def records(self, **filters: Any) -> dict[str, audit_service_pb2.RequestRecord]:
        """All that the audit log has, by request id."""
        found: dict[str, audit_service_pb2.RequestRecord] = {}
        token = ""
        while True:
            request = audit_service_pb2.SearchRequest(
                filter=audit_service_pb2.RequestFilter(**filters), page_size=1000, page_token=token
            )
            page = await self.audit.Search(request, metadata=self._metadata, timeout=20)
            for record in page.records:
                assert record.request_id not in found, f"{record.request_id} is there twice"
                found[record.request_id] = record
            token = page.next_page_token
            if not token:
                return found

    async def outcomes(self, request_ids: set[str], *, timeout_s: float = 30) -> dict[str, int]:
        """The outcomes of these requests, once the log has them all.

        Every other request in the log has to have one too: nothing may stay open.
        """

        async def settled() -> dict[str, int]:
            try:
                records = await self.records()
            except grpc.aio.AioRpcError as error:
                raise AssertionError(f"the audit log cannot be read: {error.details()}") from error
            missing = request_ids - records.keys()
            assert not missing, (
                f"{len(missing)} requests are not in the log, {sorted(missing)[:3]} for example"
            )
            # The search that reads the log is itself a request, which runs.
            opened = [
                key
                for key, record in records.items()
                if not record.HasField("ended") and (record.started.facts.method.startswith(GENERATION))
            ]
            assert not opened, f"{len(opened)} requests have no outcome, {opened[:3]} for example"
            return {key: records[key].ended.outcome for key in request_ids}

        return await eventually(settled, timeout_s=timeout_s) if request_ids else {}


GENERATION = "/llmos.gateway.v1.GenerationService/"


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The ErrorReason of a refusal; empty where the status is not ours."""
    return _info(error).reason


def request_id_of(error: grpc.aio.AioRpcError) -> str:
    return _info(error).metadata.get("request_id", "")


def _info(error: grpc.aio.AioRpcError) -> Any:
    # Read as a client in any language reads it. grpcio-status insists on equal messages in both places, and
    # at its own deadline a client may write another one over ours.
    info = error_details_pb2.ErrorInfo()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    break
    return info


@asynccontextmanager
async def sse(
    mesh: MeshHarness, text: str, *, ahead_bytes: int = 0
) -> AsyncIterator[tuple[str, asyncio.StreamReader]]:
    """Opens an SSE stream on a connection of its own, and goes away at the end: the request id, and the body
    as it comes, chunked. `ahead_bytes`: more than about that is not taken from the network before it is
    read."""
    host, port = mesh.http_url().removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "echo", "stream": True, "messages": [{"role": "user", "content": text}]}
    ).encode()
    connection = socket.socket()
    connection.setblocking(False)
    if ahead_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ahead_bytes)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connection, limit=ahead_bytes or 2**16)
    try:
        head = (
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: {host}",
            f"Authorization: Bearer {mesh.admin_key}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        headers = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert headers.startswith("HTTP/1.1 200"), headers
        fields = dict(line.split(": ", 1) for line in headers.lower().splitlines()[1:] if ": " in line)
        yield fields["x-request-id"], reader
    finally:
        writer.close()


async def cancel_sse_after_first_token(mesh: MeshHarness, text: str) -> str:
    """Opens an SSE stream, reads one token, and goes away. Returns the request id."""
    async with sse(mesh, text) as (request_id, reader):
        while b'"content":"' not in (line := await reader.readline()):
            assert line, "the stream ended before its first token"
    return request_id


OUTCOME = events_pb2.Outcome
