"""Calls to one replica that need no stream of their own: they go in one that lasts, and so do their answers.

What begins at once goes in one message; where many are under way, so does what begins within SPACING_S. A
call that nobody waits for any more is given up there. Where no such stream is open, or a request is long, a
call of its own does the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextvars import Context
from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from services.mesh.clock import Clock
from services.mesh.deadlines import Deadlines
from services.mesh.errors import DeadlineExceeded, LlmosError, ReplicaLost

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)

OPEN_AGAIN_S = 1.0
"""The shortest time between two attempts to open a stream."""
CALL_BYTES = 32 * 1024
"""A longer one would hold up the others."""
MESSAGE_BYTES = 128 * 1024
SPACING_S = 0.006
"""Between two messages, while BUSY_CALLS or more are under way: a message costs both sides more than a call
in it."""
BUSY_CALLS = 4
MAX_CALLS = 256
MAX_CANCELLED = 4096
"""In one message."""
_FRAME_BYTES = 128
"""Of a call, besides its request and its metadata."""


class CarriedCall(Struct, frozen=True):
    """A call that begins."""

    number: int
    request: bytes
    metadata: Mapping[str, str | bytes]
    """What a call of its own would have."""
    timeout_s: float
    size_bytes: int
    """In a message, at most."""


class Said(Struct, Generic[Answer_co], frozen=True):
    """A message of the replica."""

    answers: Sequence[tuple[int, Answer_co | LlmosError]]
    """By the number of their call."""
    is_retired: bool
    """It takes no more calls."""
    max_request_bytes: int
    """The longest message that it takes; with the first."""


class CarryStream(Protocol[Answer_co]):
    """The stream. Iterate it; after the first message, `write`."""

    def __aiter__(self) -> AsyncIterator[Said[Answer_co]]:
        """Raises LlmosError."""

    async def write(self, calls: Sequence[CarriedCall], cancelled: Sequence[int]) -> None:
        """Raises LlmosError where the stream has ended."""

    async def done_writing(self) -> None:
        """No more calls come."""

    def cancel(self) -> None:
        """Ends it, and the work of what it carries."""


class CarrySource(Protocol[Answer_co]):
    """The replica."""

    def connection(self) -> object:
        """What calls that begin now go by; another one where certificates were replaced."""

    def carry(self) -> CarryStream[Answer_co]:
        """Opens a stream."""


class Carrier(Generic[Answer]):
    """One stream, from its opening to its end."""

    def __init__(self, source: CarrySource[Answer], clock: Clock) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._written_s = float("-inf")
        self.connection = source.connection()
        self.is_open = False
        """It takes calls."""
        self._stream = source.carry()
        self._max_message_bytes = 0
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Answer | LlmosError]] = {}
        self._deadlines: Deadlines[int] = Deadlines(self._expire)
        self._unsent: deque[CarriedCall] = deque()
        self._cancelled: list[int] = []
        self._news = asyncio.Event()
        self.is_retired = False
        """It ends with the last of its calls."""
        self.running = asyncio.create_task(self._run(), name="carrier", context=Context())

    async def ask(
        self, request: bytes, metadata: Mapping[str, str | bytes], timeout_s: float
    ) -> Answer | None:
        """The answer; None where the call cannot go this way: it is too long, or the stream has just ended.
        Raises what the replica raised, ReplicaLost where the stream ends first, and DeadlineExceeded."""
        size_bytes = _FRAME_BYTES + len(request) + sum(map(len, metadata.values()))
        if not self.is_open or size_bytes > min(CALL_BYTES, self._max_message_bytes):
            return None
        self._number = number = self._number + 1
        call = CarriedCall(number, request, metadata, timeout_s, size_bytes)
        waiting: asyncio.Future[Answer | LlmosError] = self._loop.create_future()
        self._waiting[number] = waiting
        self._unsent.append(call)
        self._news.set()
        # The replica says so first, if it can still say anything.
        self._deadlines.begin(number, timeout_s)
        try:
            answer = await waiting
        finally:
            self._deadlines.end(number)
            if self._waiting.pop(number, None) is not None:
                self._give_up(call)
        if isinstance(answer, LlmosError):
            raise answer
        return answer

    def _expire(self, number: int) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(DeadlineExceeded("The deadline passed before the answer was complete."))

    def _give_up(self, call: CarriedCall) -> None:
        if call in self._unsent:
            self._unsent.remove(call)
        else:
            self._cancelled.append(call.number)
        self._news.set()

    def retire(self) -> None:
        """Takes no more calls; ends with the last of those that it has, which may yet be given up."""
        self.is_open = False
        self.is_retired = True
        self._news.set()

    async def _run(self) -> None:
        """Hands out what comes, until the stream ends."""
        writing: asyncio.Task[None] | None = None
        try:
            async for said in self._stream:
                if writing is None:
                    self._max_message_bytes = min(MESSAGE_BYTES, said.max_request_bytes)
                    self.is_open = not self.is_retired
                    writing = asyncio.create_task(self._write())
                for number, answer in said.answers:
                    self._answered(number, answer)
                if said.is_retired:
                    self.retire()
        except LlmosError as error:
            logger.debug("a stream that carried calls ended: %s", error)
        finally:
            self.is_open = False
            self._deadlines.close()
            if writing is not None:
                writing.cancel()
            self._stream.cancel()
            while self._waiting:
                number, _ = next(iter(self._waiting.items()))
                self._answered(number, ReplicaLost("The replica that served the request was lost."))

    def _answered(self, number: int, answer: Answer | LlmosError) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
        if self.is_retired and not self._waiting:
            self._news.set()

    async def _write(self) -> None:
        """Sends what begins, together with what has begun while the last message was sent."""
        try:
            while self._waiting or self._cancelled or not self.is_retired:
                if self._unsent or self._cancelled:
                    await self._space()
                    cancelled, self._cancelled = (
                        self._cancelled[:MAX_CANCELLED],
                        self._cancelled[MAX_CANCELLED:],
                    )
                    calls = self._next_calls()
                    # What did not fit goes at once.
                    self._written_s = float("-inf") if self._unsent else self._clock.monotonic()
                    await self._stream.write(calls, cancelled)
                else:
                    self._news.clear()
                    await self._news.wait()
            await self._stream.done_writing()
        except LlmosError as error:
            logger.debug("a stream that carried calls takes no more: %s", error)
            self._stream.cancel()

    async def _space(self) -> None:
        """Waits for others that begin, where the last message has only just gone."""
        wait_s = self._written_s + SPACING_S - self._clock.monotonic()
        if wait_s > 0 and len(self._waiting) >= BUSY_CALLS:
            await self._clock.sleep(wait_s)

    def _next_calls(self) -> list[CarriedCall]:
        calls: list[CarriedCall] = []
        size_bytes = 0
        while self._unsent and len(calls) < MAX_CALLS:
            size_bytes += self._unsent[0].size_bytes
            if calls and size_bytes > self._max_message_bytes:
                break
            calls.append(self._unsent.popleft())
        return calls


class Carriers(Generic[Answer]):
    """The stream of one replica: opened when there is a use for it, and again where it has ended."""

    def __init__(self, source: CarrySource[Answer], clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self._carrier: Carrier[Answer] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._tried_s = float("-inf")

    @property
    def is_open(self) -> bool:
        return self._carrier is not None and self._carrier.is_open

    def carrier(self) -> Carrier[Answer] | None:
        """For a call that begins now; None where no stream is open yet."""
        carrier = self._carrier
        if carrier is not None and carrier.connection is not self._source.connection():
            # The old connection is closed some time, and what is under way then is lost.
            carrier.retire()
            carrier = self._carrier = None
        if carrier is not None and carrier.is_open:
            return carrier
        if carrier is None or carrier.running.done() or carrier.is_retired:
            now_s = self._clock.monotonic()
            if now_s - self._tried_s >= OPEN_AGAIN_S:
                self._tried_s = now_s
                self._carrier = Carrier(self._source, self._clock)
                self._tasks.add(self._carrier.running)
                self._carrier.running.add_done_callback(self._tasks.discard)
        return None

    async def close(self) -> None:
        """What runs is lost."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
