"""The response cache as the use case sees it: what a request may take from it, and what it leaves there."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from services.gateway.auditing import RequestRecord
from services.gateway.cache import directives, entries
from services.gateway.cache.directives import Directives
from services.gateway.cache.entries import KeptAnswer
from services.gateway.cache.flights import Flight, Flights, Rest
from services.gateway.cache.keys import answer_key, has_one_answer
from services.gateway.cache.ports import Engines, ResponseCache
from services.gateway.folding import Fold
from services.gateway.generation import Delta, Event, Finished, Moved, Started, Usage, ValidGeneration
from services.mesh.clock import Clock
from services.mesh.errors import NotCached

STATUS_KEY, AGE_KEY = "x-llmos-cache", "age"
WHOLE = b"whole"
"""After the key: the name of a flight that brings nothing before its end."""
MAX_LEADERS = 3
"""A request whose leaders were lost so often is computed by itself."""


@dataclass(slots=True)
class Counts:
    """What became of the requests since the start."""

    hits: int = 0
    misses: int = 0
    bypasses: int = 0


class AnswerCache:
    """Answers from the cache what it can, and lets equal requests share one generation."""

    def __init__(
        self, kept: ResponseCache | None, engines: Engines, clock: Clock, *, max_flight_bytes: int
    ) -> None:
        """`kept` None: there is no cache. `max_flight_bytes` bounds all answers on their way together."""
        self._kept = kept
        self._engines = engines
        self._clock = clock
        self._flights = Flights(max_flight_bytes)
        self.counts = Counts()

    @property
    def held_bytes(self) -> int:
        """In memory, answers on their way included."""
        return (self._kept.held_bytes if self._kept else 0) + self._flights.held_bytes

    def passes(self, record: RequestRecord, request: ValidGeneration) -> bool:
        """Whether the request passes the cache by: it costs next to nothing then. Raises NotCached."""
        wanted = directives.parse(record.cache_control)
        if self._kept is not None and not wanted.no_store and has_one_answer(request):
            return False
        if wanted.only_if_cached:
            raise _not_cached()
        if self._kept is not None:
            self.counts.bypasses += 1
            record.response_metadata[STATUS_KEY] = "bypass"
        return True

    async def stream(
        self,
        record: RequestRecord,
        request: ValidGeneration,
        generated: AsyncGenerator[Event, None],
        *,
        whole: bool,
    ) -> AsyncGenerator[Event, None]:
        """The answer: a kept one, one that is being made for an equal request, or else `generated`.

        `whole`: nobody reads along, so that what is generated comes in one piece. Who reads along follows no
        such leader."""
        wanted = directives.parse(record.cache_control)
        key = answer_key(record.identity.tenant_id, request)
        passed: list[Delta] = []
        async with aclosing(generated):
            if not wanted.no_cache:
                stored = self._stored(key, record, request, wanted, passed, whole=whole)
                async with aclosing(stored) as events:
                    async for event in events:
                        yield event
                if record.is_complete:
                    return
            if wanted.only_if_cached:
                raise _not_cached()
            self.counts.misses += 1
            record.response_metadata[STATUS_KEY] = "miss"
            record.response_metadata.pop(AGE_KEY, None)
            led = self._lead(key, record, request, generated, passed, whole=whole)
            async with aclosing(led) as events:
                async for event in events:
                    yield event

    async def _stored(
        self,
        key: bytes,
        record: RequestRecord,
        request: ValidGeneration,
        wanted: Directives,
        passed: list[Delta],
        *,
        whole: bool,
    ) -> AsyncGenerator[Event, None]:
        """A kept answer, or the one that a leader gets. Where no leader gets to its end, `passed` has what
        the caller has seen of it."""
        for _ in range(1 + MAX_LEADERS):
            kept = await self._find(key, request.model, wanted)
            flight = kept.as_flight() if kept else self._flights.get(key)
            if flight is None and whole:
                flight = self._flights.get(key + WHOLE)
            if flight is None or (kept is None and wanted.only_if_cached):
                return
            age_s = self._age_s(kept) if kept else 0.0
            async with aclosing(self._followed(flight, age_s, record, request, passed)) as events:
                async for event in events:
                    yield event
            if record.is_complete or flight.is_too_large:
                return

    async def _find(self, key: bytes, model: str, wanted: Directives) -> KeptAnswer | None:
        value = await self._kept.get(key) if self._kept else None
        kept = entries.decode(value) if value else None
        if kept is None:
            return None
        if wanted.max_age_s is not None and self._age_s(kept) > wanted.max_age_s:
            return None
        return kept if self._engines.computes(model, kept.model_revision, kept.numerics_id) else None

    async def _followed(
        self,
        flight: Flight,
        age_s: float,
        record: RequestRecord,
        request: ValidGeneration,
        passed: list[Delta],
    ) -> AsyncGenerator[Event, None]:
        """What the flight brings, beyond what was passed before."""
        rest, revision = Rest(passed, request.n), ""
        async with aclosing(flight.follow()) as events:
            async for event in events:
                if isinstance(event, Delta):
                    left = rest.of(event)
                    if left is not None:
                        self._first_token(record)
                        passed.append(left)
                        yield left
                elif isinstance(event, Finished):
                    yield self._ended(record, event, revision)
                else:
                    revision = event.model_revision
                    if not record.is_committed:
                        await self._begin(record, age_s)
                        yield Started(record.request_id, request.model, revision, request.sampling.seed)

    async def _lead(
        self,
        key: bytes,
        record: RequestRecord,
        request: ValidGeneration,
        generated: AsyncGenerator[Event, None],
        passed: list[Delta],
        *,
        whole: bool,
    ) -> AsyncGenerator[Event, None]:
        rest = Rest(passed, request.n) if passed else None
        has_started = record.is_committed
        name = key + WHOLE if whole else key
        with self._flights.lead(name) as flight:
            async for event in generated:
                if isinstance(event, Moved):
                    yield event
                    continue
                self._flights.add(name, flight, event)
                if isinstance(event, Finished):
                    await self._keep(key, record, request, flight)
                    yield event
                elif isinstance(event, Started):
                    if not has_started:
                        yield event
                elif rest is None:
                    yield event
                elif (left := rest.of(event)) is not None:
                    yield left

    async def _keep(
        self, key: bytes, record: RequestRecord, request: ValidGeneration, flight: Flight
    ) -> None:
        """Only a whole answer of an engine that is one of those that serve."""
        if self._kept is None or flight.started is None or flight.finished is None:
            return
        fold = Fold(request.n)
        for delta in flight.deltas:
            fold.add(delta)
        kept = KeptAnswer(
            self._clock.now().timestamp(),
            flight.started.model_revision,
            record.numerics_id,
            fold.choices(flight.finished.finish_reasons),
            flight.finished.usage,
        )
        await self._kept.put(key, entries.encode(kept))

    async def _begin(self, record: RequestRecord, age_s: float) -> None:
        """The intent, as for every answer, and what the answer says of itself."""
        record.response_metadata[STATUS_KEY] = "hit"
        record.response_metadata[AGE_KEY] = str(int(age_s))
        record.begin()
        await record.committed()

    def _first_token(self, record: RequestRecord) -> None:
        if record.time_to_first_token_s is None:
            record.time_to_first_token_s = self._clock.monotonic() - record.received_s

    def _ended(self, record: RequestRecord, finished: Finished, revision: str) -> Finished:
        """The answer says what it holds; the record says that no engine computed it for this request."""
        self.counts.hits += 1
        record.usage = Usage()
        record.finish_reasons = finished.finish_reasons
        record.model_revision = revision
        record.served_from_cache = True
        record.complete()
        return finished

    def _age_s(self, kept: KeptAnswer) -> float:
        return max(0.0, self._clock.now().timestamp() - kept.stored_at_s)


def _not_cached() -> NotCached:
    return NotCached("The request allows only a stored answer (`only-if-cached`), and there is none.")
