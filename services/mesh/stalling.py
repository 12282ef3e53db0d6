"""Writing to a reader who may take nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from services.mesh.errors import Cancelled, ReaderStalled


@asynccontextmanager
async def writing(
    servicer_context: Any, timeout_s: float
) -> AsyncIterator[Callable[[object], Awaitable[None]]]:
    """Gives the write of a stream. Raises ReaderStalled where a write takes longer than `timeout_s`, and
    Cancelled where grpc could not write: it tells so of a reader who left before it cancels the call.

    One timer watches over all writes: a timeout of its own would be a good part of what a token costs.
    """
    loop = asyncio.get_running_loop()
    begun_s: float | None = None
    timer: asyncio.TimerHandle

    async def write(response: object) -> None:
        nonlocal begun_s
        begun_s = loop.time()
        try:
            await servicer_context.write(response)
        except grpc.aio.InternalError as error:
            raise Cancelled("The caller went away before the answer was complete.") from error
        begun_s = None

    def check() -> None:
        nonlocal timer
        now_s = loop.time()
        due_s = (now_s if begun_s is None else begun_s) + timeout_s
        if due_s <= now_s:
            stalled.reschedule(now_s)
        else:
            timer = loop.call_at(due_s, check)

    timer = loop.call_later(timeout_s, check)
    try:
        async with asyncio.timeout(None) as stalled:
            yield write
    except TimeoutError as error:
        if not stalled.expired():
            raise
        raise ReaderStalled(
            f"The reader took nothing for {timeout_s:g} s, so the stream was ended."
        ) from error
    finally:
        timer.cancel()
