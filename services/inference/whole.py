"""A generation put together, in one piece or in few, for callers who do not read along."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.inference.engine.port import Delta, EngineEvent, Finished, Started, TokenLogprob
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError


class Whole:
    """What a generation's events add up to. Bounded by the request's max_tokens."""

    def __init__(self, n: int) -> None:
        """`n`: the number of choices."""
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.time_to_first_token_s = 0.0
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._token_ids: list[list[int]] = [[] for _ in range(n)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(n)]

    def add(self, event: EngineEvent) -> None:
        match event:
            case Delta():
                self._texts[event.choice].append(event.text)
                self._token_ids[event.choice] += event.token_ids
                self._logprobs[event.choice] += event.logprobs
            case Started():
                self.started = event
            case Finished():
                self.finished = event

    def deltas(self) -> list[Delta]:
        """One for each choice that has anything, in order."""
        return [
            Delta(choice, "".join(texts), tuple(self._token_ids[choice]), tuple(self._logprobs[choice]))
            for choice, texts in enumerate(self._texts)
            if texts
        ]


async def gathered(
    events: AsyncGenerator[EngineEvent, None], n: int, gather_s: float, clock: Clock
) -> AsyncGenerator[EngineEvent, None]:
    """The same generation in fewer deltas: after the first one, `gather_s` lie between two at least, and the
    last come with the end, or before the error. `n`: the number of choices."""
    pending, sent_s = Whole(n), float("-inf")
    async with aclosing(events):
        try:
            async for event in events:
                pending.add(event)
                now_s = clock.monotonic()
                if isinstance(event, Delta) and now_s < sent_s + gather_s:
                    continue
                for delta in pending.deltas():
                    sent_s = now_s
                    yield delta
                pending = Whole(n)
                if not isinstance(event, Delta):
                    yield event
        except LlmosError:
            for delta in pending.deltas():
                yield delta
            raise
