"""The gateway's connections to Redis, which several gateways share limits and answers in.

Redis may be lost at any moment, and no request waits for it then: a call that fails closes the way, further
calls fail at once, and about every second one probe asks whether it is back. Whoever calls has a way to go on
without it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from services.gateway.settings import GatewaySettings
from services.mesh.app import StartError
from services.mesh.clock import Clock

logger = logging.getLogger(__name__)

Value = str | bytes | int | float


class RedisLost(Exception):
    """Redis did not answer. Not an error for callers of the gateway: there is a way to go on without it."""


class Script:
    """A Lua script: Redis runs it as one step."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Redis:
    """A bounded number of connections, as a component."""

    def __init__(
        self,
        url: str,
        clock: Clock,
        *,
        password: str | None = None,
        ca_file: Path | None = None,
        max_connections: int = 32,
        timeout_s: float = 0.1,
        retry_s: float = 1.0,
    ) -> None:
        """`url` is `redis://`, `rediss://` or `unix://`. `timeout_s` is all that a call may take, the wait
        for a connection included. Opens nothing yet."""
        # here, since most gateways have no Redis: its import is a fifth of what a start costs
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        options: dict[str, Any] = {} if password is None else {"password": password}
        if ca_file is not None:
            options["ssl_ca_certs"] = str(ca_file)
        self._pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=timeout_s,
            socket_timeout=None,  # `_within` bounds the whole call
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            **options,
        )
        client = redis.asyncio.Redis(connection_pool=self._pool)
        client.response_callbacks.clear()  # answers as Redis sends them
        # the client names no types for it
        self._execute: Callable[..., Awaitable[Any]] = client.execute_command
        self._no_script = redis.exceptions.NoScriptError
        self._faults = (redis.exceptions.RedisError, OSError, TimeoutError)
        self._clock = clock
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._is_available = False
        self._life = 0
        """How often it was found: a call that began in an earlier life says nothing of this one."""
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_available(self) -> bool:
        """Whether a call has a chance; without one, do not build what it needs."""
        return self._is_available

    async def start(self) -> None:
        """Asks once, so that what comes next can count on it, and goes on where Redis is away."""
        if not await self._probe():
            logger.warning("Redis does not answer: this gateway goes on by itself until it does")
        self._task = asyncio.create_task(self._keep_probing(), name="redis")

    async def stop(self) -> None:
        self._is_available = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._disconnect(in_use=True)

    async def execute(self, *command: Value) -> Any:
        """The answer to one command, as Redis sends it: texts are bytes. Raises RedisLost."""
        return await self._guarded(*command)

    async def evaluate(self, script: Script, keys: Sequence[Value], arguments: Sequence[Value]) -> Any:
        """What the script returns. Raises RedisLost."""
        try:
            return await self._guarded("EVALSHA", script.digest, len(keys), *keys, *arguments)
        except self._no_script:
            return await self._guarded("EVAL", script.text, len(keys), *keys, *arguments)

    async def _guarded(self, *command: Value) -> Any:
        if not self._is_available:
            raise RedisLost
        life = self._life
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._execute(*command)
        except self._no_script:
            raise
        except self._faults as error:
            self._lose(life, error)
            raise RedisLost from error

    def _lose(self, life: int, error: Exception) -> None:
        if self._is_available and life == self._life:
            self._is_available = False
            # the kind alone: a message may hold the address, and what stands in it
            logger.warning("Redis is lost (%s): this gateway goes on by itself", type(error).__name__)
            self._wake.set()

    async def _keep_probing(self) -> None:
        while True:
            if self._is_available:
                await self._wake.wait()
            self._wake.clear()
            await self._disconnect(in_use=False)
            await self._clock.sleep(self._retry_s)
            if await self._probe():
                logger.info("Redis is back")

    async def _probe(self) -> bool:
        """Asks outside of the guard. A replica that only reads, or a server that still loads, is no Redis."""
        try:
            async with asyncio.timeout(self._timeout_s * 5):
                await self._execute("SET", "llmos:probe", "", "PX", 1000)
        except self._faults:
            return False
        self._life += 1
        self._is_available = True
        return True

    async def _disconnect(self, *, in_use: bool) -> None:
        """Connections of the life before are of no use, and each would fail one more call."""
        with suppress(*self._faults):
            async with asyncio.timeout(self._timeout_s):
                await self._pool.disconnect(inuse_connections=in_use)


def connect(settings: GatewaySettings, clock: Clock) -> Redis | None:
    """As the settings say; None: this gateway shares nothing. Raises StartError."""
    if settings.redis_url is None:
        return None
    password = None
    if settings.redis_password_file is not None:
        try:
            password = settings.redis_password_file.read_text().strip()
        except OSError as error:
            raise StartError(f"LLMOS_GATEWAY_REDIS_PASSWORD_FILE cannot be read: {error.strerror}") from None
    return Redis(
        settings.redis_url.get_secret_value(),
        clock,
        password=password,
        ca_file=settings.redis_ca_file,
        max_connections=settings.redis_max_connections,
        timeout_s=settings.redis_timeout_s,
    )
