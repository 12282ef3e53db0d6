"""What the echo engine says, and the directives that it obeys. The rest stands in the contract suite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.inference.backends.echo import EchoConfig, EchoEngine, token_id
from services.inference.engine.port import Delta, FinishReason, GenerationRequest, Message, Prompt, Role
from services.mesh.clock import ManualClock, SystemClock
from services.mesh.errors import EngineFault, ReplicaLost, RequestInvalid
from tests.framework.engines import answer, begin, text_request


@pytest.fixture
async def engine() -> AsyncIterator[EchoEngine]:
    engine = EchoEngine(EchoConfig(directives=True, recovery_s=0.01), SystemClock())
    await engine.start()
    yield engine
    await engine.stop()


def say(text: str, **fields: object) -> GenerationRequest:
    return text_request("echo", text, **fields)


async def test_the_words_are_said_again(engine: EchoEngine) -> None:
    whole = await answer(engine, say("Grüße an  alle\n🦙s"))
    assert whole.texts[0] == "Grüße an  alle\n🦙s"
    assert len(whole.token_ids[0]) == 4
    assert whole.token_ids[0][0] == token_id("Grüße")
    assert whole.finished is not None
    assert whole.finished.reasons == (FinishReason.END_OF_SEQUENCE,)


async def test_the_last_word_of_the_user_is_said_again(engine: EchoEngine) -> None:
    messages = (
        Message(Role.SYSTEM, "Be brief."),
        Message(Role.USER, "first"),
        Message(Role.ASSISTANT, "first"),
        Message(Role.USER, "second one"),
    )
    request = GenerationRequest("req", "echo", Prompt(messages=messages))
    whole = await answer(engine, request)
    assert whole.texts[0] == "second one"
    assert whole.started is not None
    assert whole.started.prompt_tokens == 6


async def test_tokens_says_it_again_and_again(engine: EchoEngine) -> None:
    whole = await answer(engine, say("[[tokens=5]] ding dong"))
    assert whole.texts[0] == "ding dong ding dong ding"


async def test_fail_after(engine: EchoEngine) -> None:
    stream = engine.generate(say("[[fail_after=3]][[tokens=9]] a b c"))
    words: list[str] = []

    async def read() -> None:
        async for event in stream:
            words.extend([event.text] if isinstance(event, Delta) else [])

    with pytest.raises(EngineFault):
        await read()
    assert "".join(words) == "a b c"
    assert (await answer(engine, say("still here"))).finished


async def test_fail_percent_is_of_requests_by_their_ids(engine: EchoEngine) -> None:
    async def fails(number: int) -> bool:
        request = replace(say("[[fail_percent=30]] a"), request_id=f"request-{number}")
        try:
            await answer(engine, request)
        except EngineFault:
            return True
        return False

    first = [await fails(number) for number in range(200)]
    assert 30 <= sum(first) <= 90
    assert first == [await fails(number) for number in range(200)]


async def test_hang_holds_its_slot_until_it_is_closed(engine: EchoEngine) -> None:
    stream = await begin(engine, say("[[hang_after=1]] a b c"))
    rest = asyncio.ensure_future(anext(stream))
    await answer(engine, say("meanwhile"))
    assert not rest.done()
    assert engine.load().running == 1
    rest.cancel()
    await asyncio.gather(rest, return_exceptions=True)
    assert engine.load().running == 0


async def test_crash_takes_all_that_run(engine: EchoEngine) -> None:
    stream = await begin(engine, say("[[hang_after=1]] a b c"))
    with pytest.raises(ReplicaLost):
        await answer(engine, say("[[crash_after=2]] a b c"))
    with pytest.raises(ReplicaLost):
        await anext(stream)
    assert not engine.health().serving
    await engine.wait_healthy(5)
    assert engine.load().restarts == 1


async def test_delays_are_of_the_clock() -> None:
    clock = ManualClock()
    engine = EchoEngine(EchoConfig(directives=True), clock)
    await engine.start()
    whole = asyncio.ensure_future(answer(engine, say("[[first_ms=500]][[delay_ms=100]] a b c")))
    await clock.advance(0.7)
    assert not whole.done()
    await clock.advance(0.2)
    assert (await whole).texts[0] == "a b c"
    await engine.stop()


async def test_an_unknown_directive_is_refused(engine: EchoEngine) -> None:
    with pytest.raises(RequestInvalid, match="explode"):
        await answer(engine, say("[[explode]] please"))


async def test_directives_are_words_where_they_are_not_allowed() -> None:
    engine = EchoEngine(EchoConfig(), SystemClock())
    await engine.start()
    assert (await answer(engine, say("[[crash]] please"))).texts[0] == "[[crash]] please"
    await engine.stop()
