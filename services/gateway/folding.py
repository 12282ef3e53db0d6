"""Puts a stream's events together into the whole answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.gateway.generation import (
    Choice,
    Delta,
    Event,
    Finished,
    FinishReason,
    Generation,
    Moved,
    Started,
    TokenLogprob,
)
from services.mesh.errors import Internal


@dataclass(slots=True)
class Fold:
    """The answer so far. Bounded by max_tokens."""

    n: int
    started: Started | None = None
    finished: Finished | None = None
    texts: list[list[str]] = field(init=False)
    token_ids: list[list[int]] = field(init=False)
    logprobs: list[list[TokenLogprob]] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = [[] for _ in range(self.n)]
        self.token_ids = [[] for _ in range(self.n)]
        self.logprobs = [[] for _ in range(self.n)]

    def add(self, event: Event) -> None:
        match event:
            case Delta():
                self.texts[event.choice_index].append(event.text)
                self.token_ids[event.choice_index].extend(event.token_ids)
                self.logprobs[event.choice_index].extend(event.logprobs)
            case Started():
                self.started = event
            case Finished():
                self.finished = event
            case Moved():
                pass

    def choices(self, finish_reasons: tuple[FinishReason, ...]) -> tuple[Choice, ...]:
        return tuple(
            Choice(
                index=index,
                text="".join(self.texts[index]),
                token_ids=tuple(self.token_ids[index]),
                finish_reason=reason,
                logprobs=tuple(self.logprobs[index]),
            )
            for index, reason in enumerate(finish_reasons)
        )

    def result(self) -> Generation:
        if self.started is None or self.finished is None:
            raise Internal("a stream ended without Finished")
        return Generation(
            started=self.started,
            choices=self.choices(self.finished.finish_reasons),
            usage=self.finished.usage,
        )


def folded(started: Started, deltas: Sequence[Delta], finished: Finished) -> Generation:
    """The answer that came in one piece."""
    if len(deltas) == len(finished.finish_reasons) == 1:
        # As nearly all are.
        (delta,), (reason,) = deltas, finished.finish_reasons
        choice = Choice(0, delta.text, tuple(delta.token_ids), reason, tuple(delta.logprobs))
        return Generation(started, (choice,), finished.usage)
    fold = Fold(len(finished.finish_reasons), started, finished)
    for delta in deltas:
        fold.add(delta)
    return fold.result()
