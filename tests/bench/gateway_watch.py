"""WatchDeltas of the light echo: a step gives each stream that runs its next token, as an engine's does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from llmos.inference.v1 import inference_service_pb2 as pb


@dataclass(slots=True)
class _Running:
    """A stream that has tokens left."""

    deltas: Iterator[pb.GenerateResponse]
    ended: asyncio.Future[None]


class Watches:
    """By name."""

    def __init__(self) -> None:
        self._running: dict[str, dict[int, _Running]] = {}
        self._news = asyncio.Event()

    async def watch(self, watch_id: str) -> AsyncIterator[bytes]:
        """One message for each step."""
        running = self._running[watch_id] = {}
        yield b""
        try:
            while True:
                while not running:
                    self._news.clear()
                    await self._news.wait()
                step = pb.WatchDeltasResponse()
                for number, stream in tuple(running.items()):
                    found = next(stream.deltas, None)
                    if found is None:
                        step.deltas.add(number=number, last=True)
                        stream.ended.set_result(None)
                        del running[number]
                    else:
                        step.deltas.add(number=number, delta=found.delta)
                yield step.SerializeToString()
        finally:
            del self._running[watch_id]

    async def call(self, watched: pb.WatchedAs, said: Sequence[bytes]) -> AsyncIterator[bytes]:
        """What is left for the generation's own call."""
        started, *deltas, finished = map(pb.GenerateResponse.FromString, said)
        running = self._running.get(watched.watch_id)
        started.watched = running is not None
        yield started.SerializeToString()
        if running is None:
            for each in deltas:
                yield each.SerializeToString()
        else:
            ended = asyncio.get_running_loop().create_future()
            running[watched.number] = _Running(iter(deltas), ended)
            self._news.set()
            await ended
        finished.last_seq = len(deltas)
        yield finished.SerializeToString()
