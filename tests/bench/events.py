"""Server-sent events over HTTP, read with little work: who asks shares the cores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import msgspec

LINE_BYTES = 4 * 1024 * 1024


class Refused(Exception):
    """Another status than 200; the message is its body."""


async def post(
    host: str, port: int, path: str, body: Mapping[str, Any], bearer: str = ""
) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON of each event of the answer. Raises Refused, OSError, EOFError, ValueError."""
    content = msgspec.json.encode(body)
    credential = f"Authorization: Bearer {bearer}\r\n" if bearer else ""
    reader, writer = await asyncio.open_connection(host, port, limit=LINE_BYTES)
    try:
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"{credential}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
            + content
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if head.split(b" ", 2)[1] != b"200":
            raise Refused((await reader.read(500)).decode(errors="replace"))
        pieces = _chunks(reader) if b"transfer-encoding: chunked" in head else _rest(reader)
        held = b""
        async for piece in pieces:
            *lines, held = (held + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield msgspec.json.decode(line[6:])
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """All that has come is taken in one go: most of what a read costs is its wake-up."""
    held = b""
    while True:
        head = held.find(b"\r\n")
        size = int(held[:head].split(b";")[0], 16) if head >= 0 else 0
        end = head + 2 + size + 2
        if head >= 0 and len(held) >= end:
            if size == 0:
                return
            yield held[head + 2 : end - 2]
            held = held[end:]
        elif piece := await reader.read(65536):
            held += piece
        else:
            raise EOFError("the answer ended before its last chunk")


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(65536):
        yield piece
