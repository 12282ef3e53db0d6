"""Calls of many in one stream of both directions, and their answers as they come.

A unary call costs each side a third of a millisecond of grpc.aio, whatever it says; in a stream that is
there already, a tenth of that, since what comes at once goes in one message. Each of them passes the whole
chain, as a call of its own would: so it has its own credentials, deadline, place and trace, and fails alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context
from functools import partial
from typing import Generic, TypeVar

from msgspec import Struct

from services.mesh.context import RequestContext
from services.mesh.errors import Cancelled, LlmosError, RequestInvalid
from services.mesh.interceptors import Call, Chain, new_request_id

Answer = TypeVar("Answer")

MAX_ANSWERS = 64
"""In one message."""
MESSAGE_BYTES = 256 * 1024
"""A message is full that has so many; one answer alone may have more."""
UNTAKEN_BYTES = 1024 * 1024
"""Where answers of so many bytes wait for their reader, no more calls are read."""


class Carried(Struct, frozen=True):
    """A call that begins."""

    number: int
    metadata: Mapping[str, str | bytes]
    timeout_s: float


class Answered(Struct, Generic[Answer], frozen=True):
    """How one ended: with an answer, or an error."""

    number: int
    request_id: str
    answer: Answer | None
    size_bytes: int = 0
    error: LlmosError | None = None


class Carrier(Generic[Answer]):
    """What runs in one stream, and what is to be said in it. One loop; one reader takes."""

    def __init__(self, chain: Chain, method: str, source_address: str) -> None:
        """`method`: what a carried call would be called as one of its own."""
        self._chain = chain
        self._method = method
        self._source_address = source_address
        self._running: dict[int, asyncio.Task[None]] = {}
        self._answers: list[Answered[Answer]] = []
        self._untaken_bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._retired = False
        self._said_retired = False
        self._ended = False
        self._failed: LlmosError | None = None

    def take_retired(self) -> bool:
        """Whether the caller is to be told that no more calls are taken: once."""
        is_due = self._retired and not self._said_retired
        self._said_retired = self._retired
        return is_due

    def begin(self, carried: Carried, serve: Callable[[], Awaitable[tuple[Answer, int]]]) -> None:
        """Serves a call in the chain; `serve` gives its answer, and how long that is in bytes. Raises
        RequestInvalid where the number is taken."""
        if carried.number in self._running:
            raise RequestInvalid(f"The call {carried.number} runs already.")
        task = asyncio.create_task(self._serve(carried, serve), context=Context())
        self._running[carried.number] = task
        task.add_done_callback(partial(self._forget, carried.number))

    def _forget(self, number: int, task: asyncio.Task[None]) -> None:
        # Not in the task: one that is cancelled at once does nothing at all.
        del self._running[number]
        self._news.set()

    async def _serve(self, carried: Carried, serve: Callable[[], Awaitable[tuple[Answer, int]]]) -> None:
        context = RequestContext(new_request_id(), self._method, self._source_address)
        answer: Answer | None = None
        size_bytes = 0
        failed: LlmosError | None = None

        async def body(call: Call) -> None:
            nonlocal answer, size_bytes
            answer, size_bytes = await serve()

        try:
            await self._chain.run(Call(context, carried.metadata, carried.timeout_s), body)
        except LlmosError as error:
            failed = error
        except asyncio.CancelledError:
            # By its caller, who does not wait for it; or from within, and then somebody does.
            failed = Cancelled("The call was cancelled.")
        self._answers.append(Answered(carried.number, context.request_id, answer, size_bytes, failed))
        self._untaken_bytes += size_bytes
        if self._untaken_bytes > UNTAKEN_BYTES:
            self._room.clear()
        self._news.set()

    def cancel(self, number: int) -> None:
        """Nobody waits for that one any more; it may have ended."""
        if task := self._running.get(number):
            task.cancel()

    async def room(self) -> None:
        """Returns when there is room for the answers of more calls."""
        await self._room.wait()

    def retire(self) -> None:
        """The caller is to begin no more calls here."""
        self._retired = True
        self._news.set()

    def no_more(self, failed: LlmosError | None = None) -> None:
        """The caller begins no more; or what it sent could not be understood."""
        self._ended = True
        self._failed = failed
        self._news.set()

    async def take(self) -> list[Answered[Answer]] | None:
        """What is to be said now: answers, or none where there is only `take_retired`. None when all
        has been said. Raises what `no_more` was told."""
        while True:
            if self._failed is not None:
                raise self._failed
            if self._answers:
                return self._taken()
            if self._retired and not self._said_retired:
                return []
            if self._ended and not self._running:
                return None
            self._news.clear()
            await self._news.wait()

    def _taken(self) -> list[Answered[Answer]]:
        size_bytes = count = 0
        for each in self._answers[:MAX_ANSWERS]:
            if count and size_bytes + each.size_bytes > MESSAGE_BYTES:
                break
            size_bytes += each.size_bytes
            count += 1
        taken, self._answers = self._answers[:count], self._answers[count:]
        self._untaken_bytes -= size_bytes
        if self._untaken_bytes <= UNTAKEN_BYTES:
            self._room.set()
        return taken

    async def close(self) -> None:
        """The stream has ended: so does the work."""
        tasks = tuple(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
