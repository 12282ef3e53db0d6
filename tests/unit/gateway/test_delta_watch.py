"""Deltas that come in one stream with those of others: no token is lost or doubled when it ends, when the
replica drains, when a reader does not keep up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from services.gateway.generation import Delta, EngineEvent, EngineStarted, Finished, Prompt
from services.gateway.replica import delta_watch
from services.gateway.replica.delta_watch import DeltaWatch, Inbox, WatchedDelta
from services.inference import servicer
from services.inference.backends.echo import EchoConfig
from services.mesh import errors
from services.mesh.clock import ManualClock
from tests.framework.echo_replica import EchoReplica, echo_replica
from tests.framework.gateway_fakes import generation
from tests.framework.waiting import eventually

STREAMS = 12


def whole(events: list[EngineEvent], text: str) -> bool:
    """Whether the answer is all there, each delta once and in order."""
    deltas = [event for event in events if isinstance(event, Delta)]
    assert isinstance(events[0], EngineStarted)
    assert isinstance(events[-1], Finished)
    assert [each.seq for each in deltas] == list(range(1, len(deltas) + 1))
    assert sum(len(each.token_ids) for each in deltas) == events[-1].usage.completion_tokens
    return "".join(each.text for each in deltas) == text


def words(count: int) -> str:
    return " ".join(f"w{number}" for number in range(count))


async def streams(replica: EchoReplica, text: str) -> list[asyncio.Task[list[EngineEvent]]]:
    """Streams that run, and have the beginning of their answers."""
    tasks = [asyncio.create_task(replica.events(text, f"req_{n}")) for n in range(STREAMS)]
    await eventually(lambda: replica.engine.load().running == STREAMS, timeout_s=5)
    return tasks


async def test_all_answers_are_whole(tmp_path: Path) -> None:
    async with echo_replica(tmp_path) as replica:
        await replica.watched()
        answers = await asyncio.gather(*(replica.events(words(80), f"req_{n}") for n in range(STREAMS)))
    assert all(whole(events, words(80)) for events in answers)


@pytest.mark.parametrize("run", range(5))
async def test_a_drain_ends_the_watch_and_loses_nothing(run: int, tmp_path: Path) -> None:
    async with echo_replica(tmp_path, config=EchoConfig(max_running=STREAMS, delay_s=0.002)) as replica:
        await replica.watched()
        tasks = await streams(replica, words(150))
        draining = asyncio.create_task(replica.server.drain(20))
        answers = await asyncio.gather(*tasks)
        assert not replica.port.is_watching
        await draining
    assert all(whole(events, words(150)) for events in answers)


async def test_a_watch_ends_before_its_deadline_and_another_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "WATCH_END_MARGIN_S", 9.9)
    monkeypatch.setattr(delta_watch, "OPEN_AGAIN_S", 0.0)
    async with echo_replica(
        tmp_path, config=EchoConfig(max_running=STREAMS, delay_s=0.002), max_call_s=10
    ) as replica:
        await replica.watched()
        tasks = await streams(replica, words(150))
        await eventually(lambda: not replica.port.is_watching, timeout_s=5)
        answers = await asyncio.gather(*tasks)
        await eventually(lambda: _watching(replica), timeout_s=5)
    assert all(whole(events, words(150)) for events in answers)


async def _watching(replica: EchoReplica) -> bool:
    await replica.events("a")
    return replica.port.is_watching


async def test_a_reader_who_does_not_keep_up_gets_the_rest_in_the_call(tmp_path: Path) -> None:
    text = " ".join("x" * 1000 for _ in range(400))
    async with echo_replica(tmp_path) as replica:
        await replica.watched()
        request = generation(model=replica.model, prompt=Prompt(text=text))
        events = []
        async with aclosing(replica.port.generate("req_slow", request)) as answer:
            events.append(await anext(answer))
            # Somebody else's answer comes meanwhile.
            assert whole(await replica.events(words(50)), words(50))
            events += [event async for event in answer]
    assert whole(events, text)
    merged = [event for event in events if isinstance(event, Delta) and len(event.text) > 4000]
    assert merged, "what was not read was merged at the replica"


class Source:
    """A replica of which only the watch is seen."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[list[WatchedDelta] | Exception] = asyncio.Queue()
        self.left: list[tuple[str, int]] = []
        self.opened: list[str] = []
        self.ended: list[str] = []
        self.connected = object()

    def connection(self) -> object:
        return self.connected

    async def watch(self, watch_id: str) -> AsyncGenerator[Sequence[WatchedDelta], None]:
        self.opened.append(watch_id)
        try:
            while True:
                message = await self.messages.get()
                if isinstance(message, Exception):
                    raise message
                yield message
        finally:
            self.ended.append(watch_id)

    async def unwatch(self, watch_id: str, number: int) -> None:
        self.left.append((watch_id, number))

    def say(self, seq: int, text: str = "x") -> None:
        self.messages.put_nowait([WatchedDelta(1, Delta(seq, 0, text, (seq,)), last=False)])


async def opened(source: Source, clock: ManualClock) -> tuple[DeltaWatch, Inbox]:
    watch = DeltaWatch(source, clock)
    assert watch.inbox() is None, "there is none yet"
    source.messages.put_nowait([])
    await eventually(lambda: watch.is_open)
    inbox = watch.inbox()
    assert inbox is not None
    return watch, inbox


async def test_an_inbox_is_bounded_and_its_replica_hears_of_it() -> None:
    source = Source()
    watch, inbox = await opened(source, ManualClock())
    for seq in range(1, 201):
        source.say(seq, "x" * 10_000)
    source.messages.put_nowait([WatchedDelta(1, None, last=True)])
    await eventually(lambda: source.left and source.messages.empty())
    assert source.left == [(source.opened[0], 1)]
    kept = [each.seq async for each in inbox]
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) * 10_000 <= delta_watch.MAX_UNREAD_BYTES + 20_000
    await watch.close()


async def test_an_inbox_ends_where_its_watch_ends() -> None:
    source, clock = Source(), ManualClock()
    watch, inbox = await opened(source, clock)
    reading = asyncio.ensure_future(anext(inbox))
    source.say(1)
    assert (await reading).seq == 1
    ended = asyncio.ensure_future(anext(inbox))
    source.messages.put_nowait(errors.Draining("bye"))
    with pytest.raises(StopAsyncIteration):
        await ended
    assert not watch.is_open
    assert watch.inbox() is None
    assert len(source.opened) == 1, "not again at once"
    await clock.advance(delta_watch.OPEN_AGAIN_S)
    assert watch.inbox() is None
    await eventually(lambda: len(source.opened) == 2)
    await watch.close()


async def test_a_new_connection_has_a_watch_of_its_own(tmp_path: Path) -> None:
    """The old one lasts as long as a generation needs it."""
    source, clock = Source(), ManualClock()
    watch, inbox = await opened(source, clock)
    source.connected = object()
    await clock.advance(delta_watch.OPEN_AGAIN_S)
    assert watch.inbox() is None, "none on this connection yet"
    await eventually(lambda: len(source.opened) == 2)
    assert not source.ended
    source.say(1)
    assert (await anext(inbox)).seq == 1
    inbox.close()
    await eventually(lambda: source.ended == source.opened[:1])
    await watch.close()
    assert source.ended == source.opened


async def test_what_the_watch_lost_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last deltas were on their way when the watch broke."""
    put = Inbox.put

    def losing(self: Inbox, delta: Delta | None, last: bool) -> None:
        if delta is not None and delta.seq == 5:
            self.end()
        elif delta is not None and delta.seq < 5:
            put(self, delta, last)

    monkeypatch.setattr(Inbox, "put", losing)
    async with echo_replica(tmp_path) as replica:
        await replica.watched()
        with pytest.raises(errors.ReplicaLost):
            await replica.events("[[delay_ms=5]] a b c d e f g")
