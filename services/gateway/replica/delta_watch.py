"""Deltas of all generations at one replica, which come in one stream.

Each generation has an inbox while it runs. Its own call begins it, says how it ended, and takes over
where the watch ends or its reader does not keep up; so a caller who stalls is held back by gRPC, and holds
up nobody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import Context
from typing import NamedTuple, Protocol

from services.gateway.generation import Delta
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError
from services.mesh.randomness import random_bytes

logger = logging.getLogger(__name__)

OPEN_AGAIN_S = 1.0
"""The shortest time between two attempts to open a watch."""
UNREAD_BYTES = 32 * 1024
"""Where more lies unread, the rest comes in the generation's own call."""
MAX_UNREAD_BYTES = 1024 * 1024
"""What comes beyond that before the replica has heard of it is dropped, and the generation lost."""
_DELTA_BYTES = 64
"""Of a delta, besides its text and ids."""
_LOGPROB_BYTES = 64


class WatchedDelta(NamedTuple):
    """What a watch says of one generation."""

    number: int
    delta: Delta | None
    last: bool
    """The rest comes in the generation's own call."""


class DeltaSource(Protocol):
    """The replica."""

    def connection(self) -> object:
        """What calls that begin now go by; another one where certificates were replaced."""

    def watch(self, watch_id: str) -> AsyncGenerator[Sequence[WatchedDelta], None]:
        """What comes at once, in its order; nothing at first, to say that it is open. Raises LlmosError."""

    async def unwatch(self, watch_id: str, number: int) -> None:
        """Has the rest of a generation come in its own call. Raises LlmosError."""


class Inbox:
    """The deltas of one generation, unread. Iterate it: it ends where the rest comes in the call."""

    def __init__(self, watch: _Watch, number: int) -> None:
        self.watch_id = watch.id
        self.number = number
        self._watch = watch
        self._deltas: deque[Delta] = deque()
        self._unread_bytes = 0
        self._ended = False
        self._left = False
        self._waiting: asyncio.Future[None] | None = None

    def put(self, delta: Delta | None, last: bool) -> None:
        if delta is not None and self._unread_bytes <= MAX_UNREAD_BYTES:
            self._deltas.append(delta)
            self._unread_bytes += _size(delta)
            if self._unread_bytes > UNREAD_BYTES and not (self._left or last):
                self._left = True
                self._watch.leave(self.number)
        if last:
            self._ended = True
        self._wake()

    def end(self) -> None:
        """No more will come this way."""
        self._ended = True
        self._wake()

    def close(self) -> None:
        """Nobody reads it any more."""
        self._watch.forget(self.number)

    def __aiter__(self) -> Inbox:
        return self

    async def __anext__(self) -> Delta:
        while not self._deltas:
            if self._ended:
                raise StopAsyncIteration
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        delta = self._deltas.popleft()
        self._unread_bytes -= _size(delta)
        return delta

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def _size(delta: Delta) -> int:
    size = _DELTA_BYTES + len(delta.text) + 4 * len(delta.token_ids)
    for each in delta.logprobs:
        size += _LOGPROB_BYTES * (1 + len(each.top))
    return size


class _Watch:
    """One watch, from its opening to its end."""

    def __init__(self, source: DeltaSource) -> None:
        self.id = random_bytes(16).hex()
        self.connection = source.connection()
        self.is_open = False
        self._source = source
        self._inboxes: dict[int, Inbox] = {}
        self._number = 0
        self._is_retired = False
        self._leaving: set[asyncio.Task[None]] = set()
        self.reading = asyncio.create_task(self._read(), name="delta-watch", context=Context())

    def retire(self) -> None:
        """Ends with the last of its generations: what is under way to them arrives."""
        self._is_retired = True
        if not self._inboxes:
            self.reading.cancel()

    async def _read(self) -> None:
        """Hands out what comes, until the watch ends."""
        try:
            async with aclosing(self._source.watch(self.id)) as messages:
                async for message in messages:
                    self.is_open = True
                    for number, delta, last in message:
                        inbox = self._inboxes.get(number)
                        if inbox is not None:
                            inbox.put(delta, last)
        except LlmosError as error:
            logger.debug("a watch of deltas ended: %s", error)
        finally:
            self.is_open = False
            for inbox in self._inboxes.values():
                inbox.end()

    def inbox(self) -> Inbox:
        self._number += 1
        inbox = self._inboxes[self._number] = Inbox(self, self._number)
        return inbox

    def forget(self, number: int) -> None:
        self._inboxes.pop(number, None)
        if self._is_retired and not self._inboxes:
            self.reading.cancel()

    def leave(self, number: int) -> None:
        task = asyncio.create_task(self._leave(number), context=Context())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, number: int) -> None:
        try:
            await self._source.unwatch(self.id, number)
        except LlmosError as error:
            logger.debug("a generation stays in its watch: %s", error)


class DeltaWatch:
    """The watch of one replica: opened when there is a use for it, and again where it has ended."""

    def __init__(self, source: DeltaSource, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self._watch: _Watch | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._tried_s = float("-inf")

    @property
    def is_open(self) -> bool:
        return self._watch is not None and self._watch.is_open

    def inbox(self) -> Inbox | None:
        """For a generation that begins now; None where no watch is open yet."""
        watch = self._watch
        if watch is not None and watch.connection is not self._source.connection():
            # The old connection is closed some time, and what is under way then is lost.
            watch.retire()
            watch = self._watch = None
        if watch is not None and watch.is_open:
            return watch.inbox()
        if watch is None or watch.reading.done():
            now_s = self._clock.monotonic()
            if now_s - self._tried_s >= OPEN_AGAIN_S:
                self._tried_s = now_s
                self._watch = _Watch(self._source)
                self._tasks.add(self._watch.reading)
                self._watch.reading.add_done_callback(self._tasks.discard)
        return None

    async def close(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
