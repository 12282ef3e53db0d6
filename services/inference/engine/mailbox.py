"""Events of one request on their way to its reader.

Bounded without a limit of its own: deltas that the reader has not taken are merged, one for each choice, so
what is kept never exceeds the request's output, which max_tokens bounds. The writer never waits. What is
merged has a size: each hop of a slow reader's stream holds some messages, and they are not to be as large as
all that was generated meanwhile.

A reader who would rather have few deltas is not woken for each: that is most of what one costs. Nor is one
who has said where they may go directly.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field

from services.inference.engine.port import Delta, Direct, EngineEvent, Finished, Started, TokenLogprob
from services.mesh.clock import Clock, wait_at_most
from services.mesh.errors import LlmosError

MERGED_BYTES = 8 * 1024
"""About so much is merged into one delta, at most one of the engine's beyond it."""
_TOKEN_BYTES = 3
_ALTERNATIVE_BYTES = 24
"""On the wire, about."""


@dataclass(slots=True)
class _Pending:
    """Deltas of one choice, merged."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    size: int = 0
    """On the wire, about."""

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.size += len(delta.text) + _TOKEN_BYTES * len(delta.token_ids)
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs)
            self.size += sum(_ALTERNATIVE_BYTES * (1 + len(each.top)) for each in delta.logprobs)

    def merged(self, choice: int) -> Delta:
        return Delta(choice, "".join(self.text), tuple(self.token_ids), tuple(self.logprobs))


class Mailbox:
    """One writer, one reader, one loop."""

    def __init__(self, clock: Clock, *, gather_s: float = 0.0, direct: Direct | None = None) -> None:
        """`gather_s` as in `GenerationRequest`, `direct` as in `Engine.generate`."""
        self._clock = clock
        self._direct = direct
        self._reader_waits = False
        self._gather_s = gather_s
        self._gathering = False
        """The reader had a delta a short while ago, and waits for the next ones to be merged."""
        self._started: Started | None = None
        self._full: deque[Delta] = deque()
        """What will not grow any more, and goes before the rest."""
        self._deltas: dict[int, _Pending] = {}
        self._end: Finished | LlmosError | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the writer has said its last word."""
        return self._end is not None

    def put(self, event: EngineEvent) -> None:
        if isinstance(event, Started):
            self._started = event
        elif isinstance(event, Delta):
            if self._goes_directly(event):
                return
            pending = self._deltas.setdefault(event.choice, _Pending())
            pending.add(event)
            if pending.size >= MERGED_BYTES:
                del self._deltas[event.choice]
                self._full.append(pending.merged(event.choice))
            elif self._gathering:
                return
        elif self._end is None:
            self._end = event
        self._news.set()

    def fail(self, error: LlmosError) -> None:
        """The reader gets what is there already, then the error."""
        if self._end is None:
            self._end = error
        self._news.set()

    def _goes_directly(self, delta: Delta) -> bool:
        """Only while the reader waits, so that none overtakes what it was given or is about to be given."""
        if self._direct is None or not self._reader_waits or self._news.is_set():
            return False
        return self._direct(delta)

    async def get(self) -> EngineEvent:
        """The next event. Raises what the writer failed with."""
        while True:
            if self._started is not None:
                started, self._started = self._started, None
                return started
            if self._full:
                return self._full.popleft()
            if self._deltas and (self._end is not None or not self._gathering):
                choice = next(iter(self._deltas))
                delta = self._deltas.pop(choice).merged(choice)
                self._gathering = self._gather_s > 0 and not self._deltas
                return delta
            if isinstance(self._end, LlmosError):
                raise self._end
            if self._end is not None:
                return self._end
            self._news.clear()
            if self._gathering and self._gather_s < math.inf:
                await wait_at_most(self._clock, self._news, self._gather_s)
                self._gathering = False
            else:
                self._reader_waits = True
                try:
                    await self._news.wait()
                finally:
                    self._reader_waits = False
