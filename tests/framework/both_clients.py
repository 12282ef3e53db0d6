"""The sync and the async client behind one vocabulary, so that one test runs against both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
from llmos_client import AsyncClient, Client, RetryPolicy

from tests.framework import scripted_gateway as script
from tests.framework.scripted_gateway import Fail

FAST = RetryPolicy(max_attempts=4, initial_backoff_s=0.001, max_backoff_s=0.002)
UNAVAILABLE = Fail(grpc.StatusCode.UNAVAILABLE, "NO_REPLICA", retry_after_s=0.01)
REVOKED = Fail(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_REVOKED")


class Both:
    """One vocabulary for the two clients. The sync one runs in a thread."""

    def __init__(self, kind: str, target: str, **options: Any) -> None:
        options = {"model": "echo", "api_key": "llmos_secret", "retry": FAST, **options}
        self.sync = kind == "sync"
        self.client: Any = (Client if self.sync else AsyncClient)(target, **options)

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        method: Any = self.client
        for part in name.split("."):
            method = getattr(method, part)
        if self.sync:
            return await asyncio.to_thread(method, *args, **kwargs)
        return await method(*args, **kwargs)

    async def each(self, iterable: Any) -> AsyncIterator[Any]:
        if not self.sync:
            async with aclosing(aiter(iterable)) as items:
                async for item in items:
                    yield item
            return
        iterator, end = iter(iterable), object()
        while (item := await asyncio.to_thread(next, iterator, end)) is not end:
            yield item

    async def read(self, iterable: Any, at_each: Callable[[Any], object] = lambda item: None) -> None:
        async for item in self.each(iterable):
            at_each(item)

    async def result(self, stream: Any) -> Any:
        return await asyncio.to_thread(stream.result) if self.sync else await stream.result()

    async def streamed(self, prompt: str, **options: Any) -> Any:
        return await self.result(self.client.stream(prompt, **options))

    async def close(self) -> None:
        if self.sync:
            self.client.close()
        else:
            await self.client.close()


Connect = Callable[..., Both]
"""Makes a client of the kind under test; it is closed at the end."""


async def wait(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, script.DEADLINE_S)
