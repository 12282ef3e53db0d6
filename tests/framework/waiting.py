"""Waiting for a condition, with a deadline; never for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.02


async def eventually(probe: Callable[[], T | Awaitable[T]], *, timeout_s: float = 10.0, what: str = "") -> T:
    """Calls `probe` until what it returns is true, and returns that.

    An AssertionError that it raises means `not yet`. After `timeout_s` the last one is raised, or one that
    says `what` did not come true.
    """
    deadline = time.monotonic() + timeout_s
    failure: AssertionError | None = None
    while True:
        try:
            result = probe()
            value: T = await result if inspect.isawaitable(result) else result
            failure = None
            if value:
                return value
        except AssertionError as error:
            failure = error
        if time.monotonic() > deadline:
            raise failure or AssertionError(
                f"not within {timeout_s:.0f} s: {what or getattr(probe, '__name__', probe)}"
            )
        await asyncio.sleep(POLL_S)
