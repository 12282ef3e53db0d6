"""Deltas of many generations on their way in one stream.

A step of the engine gives all that run a delta at the same moment, and a message for each would cost far more
than the delta itself. So they go together, in the order in which they came, in the WatchDeltas call that the
generation's request names. What is kept is bounded: a generation whose delta has not been taken waits, and
what comes meanwhile is merged in its mailbox.

No delta is lost where the watch ends first: what nobody took goes the generation's own way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from services.inference.engine.port import Delta
from services.mesh.errors import AlreadyExists

MAX_DELTAS = 64
"""In one message: with merged deltas of 8 KiB still far below the largest message."""


@dataclass(slots=True)
class Entry:
    """What is to be said of one generation."""

    number: int
    seq: int = 0
    delta: Delta | None = None
    last: bool = False
    """The rest goes the generation's own way."""


class DeltaWatch:
    """One WatchDeltas call. Many writers, one reader, one loop."""

    def __init__(self) -> None:
        self._outbox: dict[tuple[int, int], Entry] = {}
        """By number and choice, in the order of arrival."""
        self._ways: dict[int, Way] = {}
        self._news = asyncio.Event()
        self._taken = asyncio.Event()
        """Of what is in the outbox now; whoever waits for room waits for it."""
        self._ending = False
        self._ended = False

    async def take(self) -> list[Entry]:
        """What there is to say, as soon as there is anything; nothing where the watch is to end."""
        while not self._outbox and not self._ending:
            self._news.clear()
            await self._news.wait()
        taken = {key: self._outbox[key] for key in islice(self._outbox, MAX_DELTAS)}
        for key in taken:
            del self._outbox[key]
        self._wake_writers()
        return list(taken.values())

    def end_soon(self) -> None:
        """The reader takes what there is, and leaves."""
        self._ending = True
        self._news.set()

    def end(self) -> None:
        """The reader has left. What is in the outbox is for its writers to take back."""
        self._ended = True
        self._wake_writers()

    def way(self, number: int, after_seq: int = 0) -> Way:
        """For the generation of that number, whose deltas are counted on from `after_seq`. Raises
        AlreadyExists where there is one."""
        if number in self._ways:
            raise AlreadyExists(f"Number {number} of this watch is taken.")
        way = self._ways[number] = Way(self, number, after_seq)
        return way

    def leave(self, number: int) -> None:
        """The generation's reader does not keep up, or it has ended long ago."""
        if way := self._ways.get(number):
            way.is_open = False

    @property
    def takes(self) -> bool:
        return not (self._ending or self._ended)

    def _wake_writers(self) -> None:
        self._taken.set()
        self._taken = asyncio.Event()

    # For the ways.

    def put(self, key: tuple[int, int], entry: Entry) -> None:
        self._outbox[key] = entry
        self._news.set()

    def forget(self, number: int) -> None:
        self._ways.pop(number, None)

    def waiting(self, number: int) -> list[Entry]:
        """Of the generation, what has not been taken."""
        return [entry for entry in self._outbox.values() if entry.number == number]

    def has_room(self, key: tuple[int, int]) -> bool:
        """Whether nothing of that key waits."""
        return key not in self._outbox

    async def room(self, key: tuple[int, int]) -> None:
        """Returns when nothing of that key waits, or the reader has left."""
        while key in self._outbox and not self._ended:
            await self._taken.wait()

    async def emptied(self, number: int) -> list[Entry]:
        """Returns when all of the generation has been taken, or with the rest where the reader has left."""
        while (left := self.waiting(number)) and not self._ended:
            await self._taken.wait()
        if left:
            self._outbox = {key: each for key, each in self._outbox.items() if each.number != number}
        return left


class Way:
    """How the deltas of one generation get into a watch. `close` it, whatever has happened."""

    def __init__(self, watch: DeltaWatch, number: int, after_seq: int) -> None:
        self._watch = watch
        self._number = number
        self._said_last = False
        self.seq = after_seq
        """The number of the last delta that went this way."""
        self.is_open = True

    def offer(self, delta: Delta) -> bool:
        """As a `Direct`: whether the delta goes this way at once."""
        key = (self._number, delta.choice)
        return self._watch.has_room(key) and self._take(key, delta)

    async def put(self, delta: Delta) -> bool:
        """Whether the delta goes this way; if not, neither does any other, and `left` is to be asked."""
        key = (self._number, delta.choice)
        await self._watch.room(key)
        return self._take(key, delta)

    def _take(self, key: tuple[int, int], delta: Delta) -> bool:
        if self._said_last or not (self.is_open and self._watch.takes):
            return False
        self.seq += 1
        self._watch.put(key, Entry(self._number, self.seq, delta))
        return True

    async def left(self) -> list[Entry]:
        """Ends the way, and waits until all has been taken. Returns what was not, where the reader has left:
        it goes before the rest, once."""
        self._say_last()
        left = await self._watch.emptied(self._number)
        return [entry for entry in left if entry.delta is not None]

    def close(self) -> None:
        self._say_last()
        self._watch.forget(self._number)

    def _say_last(self) -> None:
        if self._said_last:
            return
        self._said_last = True
        waiting = self._watch.waiting(self._number)
        if waiting:
            waiting[-1].last = True
        else:
            self._watch.put((self._number, -1), Entry(self._number, last=True))


class DeltaWatches:
    """The WatchDeltas calls, by name. As many as the server runs calls."""

    def __init__(self) -> None:
        self._watches: dict[str, DeltaWatch] = {}

    @contextmanager
    def open(self, watch_id: str) -> Iterator[DeltaWatch]:
        """Raises AlreadyExists where one has that name."""
        if watch_id in self._watches:
            raise AlreadyExists("There is a watch of that name.")
        watch = self._watches[watch_id] = DeltaWatch()
        try:
            yield watch
        finally:
            del self._watches[watch_id]
            watch.end()

    def get(self, watch_id: str) -> DeltaWatch | None:
        """One that takes deltas."""
        watch = self._watches.get(watch_id)
        return watch if watch is not None and watch.takes else None
