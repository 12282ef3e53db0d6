"""Equal requests at the same time: one of them, the leader, is computed, and the others follow it live.

A follower gets each delta as the leader does, so its first token is no later than the leader's. Where the
leader fails or goes away, its followers are told so; one of them leads next.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

from services.gateway.generation import Delta, Finished, Started, TokenLogprob
from services.mesh.errors import ReplicaLost

_DELTA_BYTES, _TOKEN_BYTES, _ALTERNATIVE_BYTES = 200, 40, 160
"""What those take in memory, about; a test measures it."""


class Flight:
    """One answer on its way. The leader adds to it, followers read it from the beginning."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.deltas: list[Delta] = []
        self.is_over = False
        """Nothing is added any more: it is finished, or never will be."""
        self.is_too_large = False
        """There was no room for it. Its leader goes on alone, and so should its followers."""
        self.held_bytes = 0
        self._followers = 0
        self._changed = asyncio.Event()

    def add(self, event: Started | Delta | Finished) -> None:
        if isinstance(event, Delta):
            self.deltas.append(event)
            self.held_bytes += size_bytes(event)
        elif isinstance(event, Started):
            self.started = event
        else:
            self.finished = event
            self.is_over = True
        self._tell()

    def end(self) -> None:
        """Unless it is finished, it never will be."""
        self.is_over = True
        self._tell()

    async def follow(self) -> AsyncGenerator[Started | Delta | Finished, None]:
        """All events, as they come; without Finished at the end where the leader was lost."""
        told_started, place = False, 0
        self._followers += 1
        try:
            while True:
                changed = self._changed
                if not told_started and self.started is not None:
                    told_started = True
                    yield self.started
                while place < len(self.deltas):
                    place += 1
                    yield self.deltas[place - 1]
                if self.finished is not None:
                    yield self.finished
                if self.is_over and place == len(self.deltas):
                    return
                if changed is self._changed:
                    await changed.wait()
        finally:
            self._followers -= 1

    def _tell(self) -> None:
        if self._followers:
            self._changed.set()
            self._changed = asyncio.Event()


class Flights:
    """All answers on their way, by key. What they hold for followers is bounded together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._by_key: dict[bytes, Flight] = {}

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: bytes) -> Flight | None:
        return self._by_key.get(key)

    @contextmanager
    def lead(self, key: bytes) -> Iterator[Flight]:
        """A new flight, which others can follow where there is none yet. It is over at the block's end."""
        flight = Flight()
        self._by_key.setdefault(key, flight)
        try:
            yield flight
        finally:
            self._give_up(key, flight)

    def add(self, key: bytes, flight: Flight, event: Started | Delta | Finished) -> None:
        """As `Flight.add`; a flight for which there is no room is over."""
        if flight.is_over:
            return
        before_bytes = flight.held_bytes
        flight.add(event)
        self._held_bytes += flight.held_bytes - before_bytes
        if self._held_bytes > self._max_bytes:
            flight.is_too_large = True
            self._give_up(key, flight)

    def _give_up(self, key: bytes, flight: Flight) -> None:
        if self._by_key.get(key) is flight:
            del self._by_key[key]
        self._held_bytes -= flight.held_bytes
        flight.held_bytes = 0
        flight.end()


class Rest:
    """What is left of an answer for a caller who has its beginning already.

    The answer is computed a second time, and must begin as it did the first time.
    """

    def __init__(self, passed: Sequence[Delta], n: int) -> None:
        """`passed`: what the caller has."""
        self._seq = len(passed)
        self._texts = ["".join(delta.text for delta in passed if delta.choice_index == i) for i in range(n)]
        self._ids = [[id_ for d in passed if d.choice_index == i for id_ in d.token_ids] for i in range(n)]

    def of(self, delta: Delta) -> Delta | None:
        """The part that the caller lacks, numbered on from what it has. Raises ReplicaLost."""
        text, ids = self._texts[delta.choice_index], self._ids[delta.choice_index]
        chars, tokens = min(len(text), len(delta.text)), min(len(ids), len(delta.token_ids))
        if text[:chars] != delta.text[:chars] or ids[:tokens] != list(delta.token_ids[:tokens]):
            raise ReplicaLost("The request that this one shared an answer with was lost.")
        self._texts[delta.choice_index] = text[chars:]
        self._ids[delta.choice_index] = ids[tokens:]
        left = Delta(
            self._seq + 1,
            delta.choice_index,
            delta.text[chars:],
            delta.token_ids[tokens:],
            delta.logprobs[tokens:],
        )
        if not left.text and not left.token_ids:
            return None
        self._seq += 1
        return left


def size_bytes(delta: Delta) -> int:
    """What a delta takes in memory, about."""
    return (
        _DELTA_BYTES
        + 4 * len(delta.text)
        + _TOKEN_BYTES * len(delta.token_ids)
        + _ALTERNATIVE_BYTES * sum(map(_alternatives, delta.logprobs))
    )


def _alternatives(entry: TokenLogprob) -> int:
    return 1 + len(entry.top)
