"""A generation put together, for callers who do not read along."""

from __future__ import annotations

from services.inference.engine.port import Delta, EngineEvent, Finished, Started, TokenLogprob


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
