"""Calls that go in one stream with others: each gets its own answer, once, or an error that says why,
whatever becomes of the stream, of the replica, or of those who wait."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from services.gateway.generation import Delta, EngineEvent, Finished, Prompt
from services.gateway.replica import carrier as carriers
from services.gateway.replica.carrier import CarriedCall, Carrier, Carriers, Said
from services.inference import servicer
from services.inference.backends.echo import EchoConfig
from services.inference.servicer import CARRY_S
from services.mesh import context, errors
from services.mesh.clock import Clock, ManualClock, SystemClock
from services.mesh.context import RequestContext
from services.mesh.errors import LlmosError
from tests.framework.echo_replica import EchoReplica, echo_replica
from tests.framework.gateway_fakes import events_of, generation
from tests.framework.waiting import eventually

CALLS = 12
ROOM = EchoConfig(max_running=64, directives=True)
LONG = "[[delay_ms=2]][[tokens=80]] word"


def text(events: list[EngineEvent]) -> str:
    assert isinstance(events[-1], Finished)
    return "".join(event.text for event in events if isinstance(event, Delta))


async def begin(
    replica: EchoReplica, prompt: str, count: int = CALLS, besides: int = 0
) -> list[asyncio.Task[list[EngineEvent]]]:
    """Calls that run at the replica, `besides` others."""
    tasks = [asyncio.create_task(until(math.inf, replica, prompt)) for _ in range(count)]
    await eventually(lambda: replica.engine.load().running == besides + count, timeout_s=5)
    return tasks


async def test_each_call_gets_its_own_answer(tmp_path: Path) -> None:
    async with echo_replica(tmp_path) as replica:
        await replica.carried()
        answers = await asyncio.gather(
            *(replica.events(f"[[delay_ms={n % 3}]] a {n}", f"req_{n}", whole=True) for n in range(40))
        )
        assert [text(events) for events in answers] == [f"a {n}" for n in range(40)]
        assert len(replica.running) == 1, "the stream itself"


async def test_one_that_fails_fails_alone(tmp_path: Path) -> None:
    async with echo_replica(tmp_path, config=ROOM) as replica:
        await replica.carried()
        others = await begin(replica, LONG)
        with pytest.raises(errors.EngineFault):
            await replica.events("[[fail]] a", whole=True)
        assert len({text(events) for events in await asyncio.gather(*others)}) == 1
        assert replica.port.is_carrying


@pytest.mark.parametrize("run", range(3))
async def test_a_drain_waits_for_what_is_carried_and_loses_nothing(run: int, tmp_path: Path) -> None:
    async with echo_replica(tmp_path, config=ROOM) as replica:
        await replica.carried()
        tasks = await begin(replica, LONG)
        draining = asyncio.create_task(replica.server.drain(20))
        answers = await asyncio.gather(*tasks)
        await draining
        assert len(replica.running) == 0
        assert not replica.port.is_carrying
    assert {len(text(events).split()) for events in answers} == {80}


async def test_a_stream_that_is_old_ends_with_its_calls_and_another_is_opened(tmp_path: Path) -> None:
    clock = ManualClock()
    async with echo_replica(tmp_path, config=ROOM, clock=clock, max_call_s=600) as replica:
        await replica.carried()
        hanging = await begin(replica, "[[hang_after=1]] a b", 2)
        await clock.advance(carriers.SPACING_S)
        tasks = await begin(replica, f"[[first_ms={(CARRY_S + 100) * 1000:.0f}]] word", CALLS, besides=2)
        await clock.advance(CARRY_S)
        await eventually(lambda: not replica.port.is_carrying, timeout_s=5)
        assert not any(task.done() for task in tasks)
        await clock.advance(100)
        assert {text(events) for events in await asyncio.gather(*tasks)} == {"word"}
        # The old stream is there for as long as somebody may give up what runs in it.
        hanging[0].cancel()
        await eventually(lambda: replica.engine.load().running == 1, timeout_s=5)
        await eventually(lambda: _carrying(replica), timeout_s=5)
        assert len(replica.running) == 3, "the old stream with its call, and the new one"
        hanging[1].cancel()
        await eventually(lambda: len(replica.running) == 1, timeout_s=5)
        assert text(await replica.events("a b", whole=True)) == "a b"


async def _carrying(replica: EchoReplica) -> bool:
    await replica.events("a", whole=True)
    return replica.port.is_carrying


async def test_a_long_request_goes_in_a_call_of_its_own(tmp_path: Path) -> None:
    long = "x" * carriers.CALL_BYTES
    async with echo_replica(tmp_path) as replica:
        await replica.carried()
        assert text(await replica.events(long, whole=True)) == long
        assert replica.port.is_carrying


async def test_an_answer_that_is_too_long_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "MAX_ANSWER_BYTES", 1000)
    async with echo_replica(tmp_path) as replica:
        await replica.carried()
        with pytest.raises(errors.MessageTooLarge):
            await replica.events("x" * 2000, whole=True)
        assert text(await replica.events("a", whole=True)) == "a"
        assert replica.port.is_carrying


async def test_a_call_has_its_own_deadline(tmp_path: Path) -> None:
    async with echo_replica(tmp_path) as replica:
        await replica.carried()
        with pytest.raises(errors.DeadlineExceeded):
            await until(SystemClock().monotonic() + 0.2, replica, "[[hang]] a")
        await eventually(lambda: replica.engine.load().running == 0, timeout_s=5)
        assert replica.port.is_carrying


async def until(deadline_s: float, replica: EchoReplica, prompt: str) -> list[EngineEvent]:
    token = context.enter(RequestContext("req_1", "/x/Y", deadline_s=deadline_s))
    try:
        return await replica.events(prompt, whole=True)
    finally:
        context.leave(token)


async def test_whoever_gives_up_at_random_hurts_nobody(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with echo_replica(tmp_path, config=ROOM) as replica:
        await replica.carried()

        async def one(number: int) -> None:
            prompt = f"[[delay_ms={rng.randrange(4)}]] a b c {number}"
            asking = asyncio.create_task(replica.events(prompt, f"req_{number}", whole=True))
            for _ in range(rng.choice((0, 0, 1, 2, 5, 200))):
                await asyncio.sleep(0)
            if rng.random() < 0.5:
                asking.cancel()
                await asyncio.wait([asking])
                if asking.cancelled():
                    return
            assert text(await asking) == f"a b c {number}", seed

        for first in range(0, 400, 40):
            await asyncio.gather(*(one(first + n) for n in range(40)))
        await eventually(lambda: replica.engine.load().running == 0, timeout_s=5, what=f"seed {seed}")
        assert replica.port.is_carrying, seed
        assert text(await replica.events("a", whole=True)) == "a"


class Stream:
    """A stream of which the replica's side is the test."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Said[str] | LlmosError | None] = asyncio.Queue()
        self.written: list[tuple[list[CarriedCall], list[int]]] = []
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.is_done_writing = False
        self.is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[Said[str]]:
        while (message := await self.messages.get()) is not None:
            if isinstance(message, LlmosError):
                raise message
            yield message

    async def write(self, calls: Sequence[CarriedCall], cancelled: Sequence[int]) -> None:
        self.written.append((list(calls), list(cancelled)))
        await self.may_write.wait()

    async def done_writing(self) -> None:
        self.is_done_writing = True
        self.messages.put_nowait(None)

    def cancel(self) -> None:
        self.is_cancelled = True

    def say(self, *answers: tuple[int, str | LlmosError], retired: bool = False) -> None:
        self.messages.put_nowait(Said(answers, retired, 2**20))

    @property
    def calls(self) -> list[int]:
        return [call.number for calls, _ in self.written for call in calls]

    @property
    def cancelled(self) -> list[int]:
        return [number for _, numbers in self.written for number in numbers]


class Source:
    """A replica that gives a new stream each time."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.connected = object()

    def connection(self) -> object:
        return self.connected

    def carry(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]


async def opened(source: Source, clock: Clock) -> tuple[Carriers[str], Carrier[str], Stream]:
    shared: Carriers[str] = Carriers(source, clock)
    assert shared.carrier() is None, "there is none yet"
    source.streams[-1].say()
    await eventually(lambda: shared.is_open)
    carrier = shared.carrier()
    assert carrier is not None
    return shared, carrier, source.streams[-1]


def ask(carrier: Carrier[str], request: bytes = b"x") -> asyncio.Task[str | None]:
    return asyncio.create_task(carrier.ask(request, {}, 60))


async def test_what_begins_at_once_goes_in_one_message() -> None:
    clock = ManualClock()
    shared, carrier, stream = await opened(Source(), clock)
    stream.may_write.clear()
    asking = [ask(carrier)]
    await eventually(lambda: stream.calls == [1])
    asking += [ask(carrier) for _ in range(5)]
    await clock.advance(carriers.SPACING_S)
    stream.may_write.set()
    await eventually(lambda: stream.calls == [1, 2, 3, 4, 5, 6])
    assert len(stream.written) == 2
    stream.say(*((number, f"answer {number}") for number in (6, 5, 4, 3, 2, 1)))
    assert await asyncio.gather(*asking) == [f"answer {number}" for number in range(1, 7)]
    await shared.close()


async def test_what_begins_soon_after_goes_with_others_where_many_are_under_way() -> None:
    clock = ManualClock()
    shared, carrier, stream = await opened(Source(), clock)
    asking = []
    for number in range(1, carriers.BUSY_CALLS):
        asking.append(ask(carrier))
        await eventually(lambda number=number: stream.calls == list(range(1, number + 1)))
    assert len(stream.written) == carriers.BUSY_CALLS - 1, "few go each by itself, at once"
    asking += [ask(carrier), ask(carrier)]
    await clock.advance(carriers.SPACING_S / 2)
    asking.append(ask(carrier))
    await eventually(lambda: clock.sleepers == 1)
    assert len(stream.written) == carriers.BUSY_CALLS - 1
    await clock.advance(carriers.SPACING_S / 2)
    await eventually(lambda: len(stream.written) == carriers.BUSY_CALLS)
    assert len(stream.written[-1][0]) == 3
    await clock.advance(1)
    ask(carrier)
    await eventually(
        lambda: len(stream.written) == carriers.BUSY_CALLS + 1, what="after a pause it goes at once"
    )
    await shared.close()
    await asyncio.wait(asking)


async def test_a_message_is_bounded() -> None:
    shared, carrier, stream = await opened(Source(), ManualClock())
    request = b"x" * (carriers.CALL_BYTES - 1000)
    asking = [ask(carrier, request) for _ in range(10)]
    await eventually(lambda: len(stream.calls) == 10)
    sizes = [sum(call.size_bytes for call in calls) for calls, _ in stream.written]
    assert max(sizes) <= carriers.MESSAGE_BYTES
    assert len(sizes) < 10
    await shared.close()
    with pytest.raises(errors.ReplicaLost):
        await asking[0]
    await asyncio.wait(asking)


async def test_who_gives_up_before_it_was_sent_sends_nothing() -> None:
    shared, carrier, stream = await opened(Source(), ManualClock())
    stream.may_write.clear()
    first = ask(carrier)
    await eventually(lambda: stream.calls == [1])
    second, third = ask(carrier), ask(carrier)
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    await asyncio.wait([first, second])
    stream.may_write.set()
    await eventually(lambda: stream.calls == [1, 3] and stream.cancelled == [1])
    stream.say((1, "too late"), (3, "yes"))
    assert await third == "yes"
    await shared.close()


async def test_all_that_is_not_answered_is_lost_with_the_stream() -> None:
    source, clock = Source(), ManualClock()
    shared, carrier, stream = await opened(source, clock)
    answered, failed, lost = ask(carrier), ask(carrier), ask(carrier)
    await eventually(lambda: stream.calls == [1, 2, 3])
    stream.say((1, "yes"), (2, errors.EngineFault("no")))
    stream.messages.put_nowait(errors.DependencyUnavailable("gone"))
    assert await answered == "yes"
    with pytest.raises(errors.EngineFault):
        await failed
    with pytest.raises(errors.ReplicaLost):
        await lost
    assert not shared.is_open
    assert await carrier.ask(b"x", {}, 60) is None, "it goes another way"
    assert shared.carrier() is None
    assert len(source.streams) == 1, "not again at once"
    await clock.advance(carriers.OPEN_AGAIN_S)
    assert shared.carrier() is None
    assert len(source.streams) == 2
    await shared.close()


async def test_a_new_connection_has_a_stream_of_its_own() -> None:
    """The old one lasts as long as its calls do."""
    source, clock = Source(), ManualClock()
    shared, carrier, old = await opened(source, clock)
    asking = ask(carrier)
    await eventually(lambda: old.calls == [1])
    source.connected = object()
    await clock.advance(carriers.OPEN_AGAIN_S)
    assert shared.carrier() is None, "none on this connection yet"
    assert len(source.streams) == 2
    assert not old.is_done_writing
    old.say((1, "yes"))
    assert await asking == "yes"
    await eventually(lambda: old.is_done_writing and old.is_cancelled)
    await shared.close()


async def test_a_replica_that_knows_no_such_call_is_asked_in_the_old_way() -> None:
    source, clock = Source(), ManualClock()
    shared: Carriers[str] = Carriers(source, clock)
    for count in (1, 2):
        assert shared.carrier() is None
        source.streams[-1].messages.put_nowait(errors.NotImplementedYet("what?"))
        await eventually(lambda count=count: source.streams[count - 1].is_cancelled)
        assert not shared.is_open
        await clock.advance(carriers.OPEN_AGAIN_S)
    await shared.close()


async def test_a_request_goes_without_what_the_gateway_alone_knows(tmp_path: Path) -> None:
    """The streamed and the whole answer of one request are one another's."""
    async with echo_replica(tmp_path) as replica:
        await replica.carried()
        request = generation(model=replica.model, prompt=Prompt(text="a b c"), n=2, end_user="bob")
        whole = await events_of(replica.port, request, whole=True)
        streamed = [event async for event in replica.port.generate("req_1", request)]
    ends = [event for event in (*whole, *streamed) if isinstance(event, Finished)]
    assert ends[0] == ends[1]
    for choice in range(2):
        texts = [
            "".join(
                event.text for event in events if isinstance(event, Delta) and event.choice_index == choice
            )
            for events in (whole, streamed)
        ]
        assert texts[0] == texts[1] == "a b c"


async def test_each_that_waits_too_long_ends_at_its_own_time() -> None:
    shared, carrier, stream = await opened(Source(), ManualClock())
    patient, order = ask(carrier), []

    async def one(timeout_s: float) -> None:
        with pytest.raises(errors.DeadlineExceeded):
            await carrier.ask(b"x", {}, timeout_s)
        order.append(timeout_s)

    await asyncio.wait_for(asyncio.gather(*map(one, (0.3, 0.1, 0.2))), 10)
    assert order == [0.1, 0.2, 0.3]
    stream.say((1, "yes"))
    assert await patient == "yes"
    await shared.close()
