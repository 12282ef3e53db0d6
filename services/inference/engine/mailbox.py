"""Events of one request on their way to its reader.

Bounded without a limit of its own: deltas that the reader has not taken are merged, one for each choice, so
what is kept never exceeds the request's output, which max_tokens bounds. The writer never waits.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from services.inference.engine.port import Delta, EngineEvent, Finished, Started, TokenLogprob
from services.mesh.errors import LlmosError


@dataclass(slots=True)
class _Pending:
    """Deltas of one choice, merged."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Mailbox:
    """One writer, one reader, one loop."""

    def __init__(self) -> None:
        self._started: Started | None = None
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
            pending = self._deltas.setdefault(event.choice, _Pending())
            pending.text.append(event.text)
            pending.token_ids.extend(event.token_ids)
            pending.logprobs.extend(event.logprobs)
        elif self._end is None:
            self._end = event
        self._news.set()

    def fail(self, error: LlmosError) -> None:
        """The reader gets what is there already, then the error."""
        if self._end is None:
            self._end = error
        self._news.set()

    async def get(self) -> EngineEvent:
        """The next event. Raises what the writer failed with."""
        while True:
            if self._started is not None:
                started, self._started = self._started, None
                return started
            if self._deltas:
                choice = next(iter(self._deltas))
                pending = self._deltas.pop(choice)
                return Delta(choice, "".join(pending.text), tuple(pending.token_ids), tuple(pending.logprobs))
            if isinstance(self._end, LlmosError):
                raise self._end
            if self._end is not None:
                return self._end
            self._news.clear()
            await self._news.wait()
