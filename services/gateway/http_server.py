"""The HTTP listener, and our own way of stopping it. uvicorn's server is not used: it installs signal
handlers. What a connection may do is said in `http_protocol`."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from services.gateway.http_protocol import BoundedProtocol, HttpLimits
from services.gateway.http_receiving import Receiving
from services.mesh.running import RunningCalls
from services.mesh.tls import TlsFiles

HANDSHAKE_TIMEOUT_S = 8.0
ABORT_TIMEOUT_S = 5.0
"""For the `finally` of requests that are cut off at the end of a drain."""


class HttpServer:
    """The edge: `start`, later `drain`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        running: RunningCalls,
        receiving: Receiving,
        limits: HttpLimits,
        tls: TlsFiles | None = None,
    ) -> None:
        """`running` has the calls that the application serves, so that a drain can cut them off by name."""
        self._host = host
        self._port = port
        self._running = running
        self._receiving = receiving
        self._limits = limits
        self._tls = tls
        self._state = ServerState()
        self._config = Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
        )
        self._server: asyncio.Server | None = None
        self._empty = asyncio.Event()
        self.ports: dict[str, int] = {}

    @property
    def connections(self) -> int:
        return len(self._state.connections)

    async def start(self) -> None:
        """Opens the listener. Raises OSError with a sentence where the port is taken."""
        self._config.load()
        # uvicorn would log every broken request and every cancelled one.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        context = None if self._tls is None else reloading_context(self._tls)
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._protocol,
                self._host,
                self._port,
                ssl=context,
                backlog=1024,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if context else None,
            )
        except OSError as error:
            raise OSError(f"cannot listen on {self._host}:{self._port} for HTTP: {error.strerror}") from error
        self.ports["http"] = self._server.sockets[0].getsockname()[1]

    async def drain(self, grace_s: float) -> None:
        """Stops accepting, closes idle connections, lets answers finish, cuts off the rest."""
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._state.connections):
            connection.shutdown()
        self._empty.clear()
        self._on_lost()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), grace_s)
            return
        await self._running.drain(0)
        tasks = set(self._state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=ABORT_TIMEOUT_S)
        for connection in tuple(self._state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.transport.abort()

    def _on_lost(self) -> None:
        if not self._state.connections:
            self._empty.set()

    def _protocol(self) -> asyncio.Protocol:
        return BoundedProtocol(self._config, self._state, self._limits, self._receiving, self._on_lost)


def reloading_context(files: TlsFiles) -> ssl.SSLContext:
    """A context that takes what the files hold at each handshake, and demands a client certificate."""
    outer = files.http_context()
    current, version = outer, files.version

    def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        nonlocal current, version
        files.load()
        if files.version != version:
            # A context of its own: the handshake that runs has taken its certificates already.
            current, version = files.http_context(), files.version
        if current is not outer:
            connection.context = current

    callback: Callable[[Any, Any, Any], None] = choose
    outer.sni_callback = callback
    return outer
