"""A TCP proxy that fails on demand: it refuses, resets, goes silent or slows down."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
from types import TracebackType

HOST = "127.0.0.1"
CHUNK_BYTES = 16 * 1024
MAX_CONNECTIONS = 1024


class Mode(enum.Enum):
    """What happens to connections."""

    PASS = "pass"
    REFUSE = "refuse"
    RESET = "reset"
    BLACK_HOLE = "black hole"
    THROTTLE = "throttle"


class _Connection:
    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None

    def close(self, *, reset: bool) -> None:
        for writer in (self.client, self.server):
            if writer is None:
                continue
            if reset:
                sock = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    # A close that lingers for 0 s sends RST.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                writer.close()


class TcpProxy:
    """`async with TcpProxy("127.0.0.1:50052") as proxy:` and connect to `proxy.target`.

    A mode applies to connections that are open and to new ones, at once:

    - `heal()`: everything passes
    - `await refuse()`: nobody listens, and open connections are reset
    - `reset()`: open connections are reset, new ones as soon as they are accepted
    - `black_hole()`: connections are accepted and stay open; not a byte goes through
    - `throttle(bytes_per_s)`: so many bytes a second go through, for each connection and direction
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._server: asyncio.Server | None = None
        self._port = 0
        self._mode = Mode.PASS
        self._open = asyncio.Event()
        self._bytes_per_s = 0.0
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted = 0
        """How many connections were accepted so far."""

    @property
    def target(self) -> str:
        """Where to connect; the same for the proxy's whole life."""
        return f"{HOST}:{self._port}"

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    async def __aenter__(self) -> TcpProxy:
        await self.heal()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop_listening()
        self._drop(reset=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def heal(self) -> None:
        self._set(Mode.PASS)
        await self._listen()

    async def refuse(self) -> None:
        self._set(Mode.REFUSE)
        await self._stop_listening()
        self._drop(reset=True)

    async def reset(self) -> None:
        self._set(Mode.RESET)
        await self._listen()
        self._drop(reset=True)

    async def black_hole(self) -> None:
        self._set(Mode.BLACK_HOLE)
        await self._listen()

    async def throttle(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._set(Mode.THROTTLE)
        await self._listen()

    def _set(self, mode: Mode) -> None:
        self._mode = mode
        if mode is Mode.BLACK_HOLE:
            self._open.clear()
        else:
            self._open.set()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(
                self._accept, HOST, self._port, limit=CHUNK_BYTES, reuse_address=True
            )
            self._port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _drop(self, *, reset: bool) -> None:
        for connection in list(self._connections):
            connection.close(reset=reset)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        connection = _Connection(writer)
        if self._mode is Mode.RESET or len(self._connections) >= MAX_CONNECTIONS:
            connection.close(reset=True)
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._connections.add(connection)
        try:
            await self._open.wait()
            upstream_reader, connection.server = await asyncio.open_connection(
                *self._upstream, limit=CHUNK_BYTES
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, connection.server))
                group.create_task(self._copy(upstream_reader, writer))
        except (OSError, ExceptionGroup):
            connection.close(reset=True)  # what one side lost, the other loses as well
        finally:
            connection.close(reset=False)
            self._connections.discard(connection)
            self._tasks.discard(task)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await self._open.wait()
            chunk = await reader.read(CHUNK_BYTES if self._mode is not Mode.THROTTLE else 1024)
            await self._open.wait()  # a chunk that was read before the silence began is held back, too
            if not chunk:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            if self._mode is Mode.THROTTLE:
                await asyncio.sleep(len(chunk) / self._bytes_per_s)
            writer.write(chunk)
            await writer.drain()
