"""Writing to a reader who may take nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from services.mesh.errors import ReaderStalled


@asynccontextmanager
async def writing(
    servicer_context: Any, timeout_s: float
) -> AsyncIterator[Callable[[object], Awaitable[None]]]:
    """Gives the write of a stream. Raises ReaderStalled where a write takes longer than `timeout_s`.

    One timer watches over all writes: a timeout of its own would be a good part of what a token costs.
    """
    loop = asyncio.get_running_loop()
    begun_s: float | None = None
    timer: asyncio.TimerHandle

    async def write(response: object) -> None:
        nonlocal begun_s
        begun_s = loop.time()
        await servicer_context.write(response)
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
