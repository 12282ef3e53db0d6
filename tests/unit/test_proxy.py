"""The proxy that fails on demand does fail as it says."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from tests.framework.proxy import TcpProxy


@contextlib.asynccontextmanager
async def echo_server() -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(4096):
                writer.write(chunk)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def connect(proxy: TcpProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = proxy.target.split(":")
    return await asyncio.open_connection(host, int(port))


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes = b"ping") -> bytes:
    writer.write(data)
    await writer.drain()
    return await asyncio.wait_for(reader.readexactly(len(data)), 5)


async def test_passes_both_ways() -> None:
    async with echo_server() as upstream, TcpProxy(upstream) as proxy:
        reader, writer = await connect(proxy)
        assert await ask(reader, writer, b"x" * 100_000) == b"x" * 100_000
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()


async def test_refuses_and_resets_what_is_open_then_heals_on_the_same_port() -> None:
    async with echo_server() as upstream, TcpProxy(upstream) as proxy:
        target = proxy.target
        reader, writer = await connect(proxy)
        await ask(reader, writer)
        await proxy.refuse()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(ConnectionRefusedError):
            await connect(proxy)
        await proxy.heal()
        assert proxy.target == target
        assert await ask(*await connect(proxy)) == b"ping"


async def test_resets_new_connections() -> None:
    async with echo_server() as upstream, TcpProxy(upstream) as proxy:
        await proxy.reset()
        reader, writer = await connect(proxy)
        with pytest.raises(ConnectionResetError):
            await ask(reader, writer)


async def test_black_hole_keeps_connections_open_and_lets_nothing_through() -> None:
    async with echo_server() as upstream, TcpProxy(upstream) as proxy:
        old_reader, old_writer = await connect(proxy)
        await ask(old_reader, old_writer)
        await proxy.black_hole()
        new_reader, new_writer = await connect(proxy)
        for writer in (old_writer, new_writer):
            writer.write(b"ping")
            await writer.drain()
        waiting = [asyncio.ensure_future(reader.readexactly(4)) for reader in (old_reader, new_reader)]
        done, pending = await asyncio.wait(waiting, timeout=0.3)
        assert not done
        await proxy.heal()
        assert await asyncio.wait_for(asyncio.gather(*pending), 5) == [b"ping", b"ping"]


async def test_throttles() -> None:
    async with echo_server() as upstream, TcpProxy(upstream) as proxy:
        await proxy.throttle(40_000)
        reader, writer = await connect(proxy)
        began_s = time.monotonic()
        await ask(reader, writer, b"x" * 20_000)
        assert time.monotonic() - began_s > 0.4


async def test_a_lost_upstream_resets_the_client() -> None:
    async with TcpProxy("127.0.0.1:1") as proxy:
        reader, _ = await connect(proxy)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 5)
