"""The suite of the engine port: what each backend does, whatever it is made of.

Each subject says how to speak to it: a request that runs long, and how its engine is lost.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pytest
import pytest_asyncio

from services.inference.backends.echo import EchoConfig, EchoEngine
from services.inference.backends.embedded import EmbeddedEngine
from services.inference.engine.port import (
    Capability,
    Engine,
    EngineEvent,
    Finished,
    FinishReason,
    GenerationRequest,
    Load,
    Message,
    Prompt,
    Role,
)
from services.mesh.clock import SystemClock
from services.mesh.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    ModelNotFound,
    NoReplica,
    Overloaded,
    ReplicaLost,
    RequestInvalid,
)
from tests.framework import engines
from tests.framework.engines import START_TIMEOUT_S, answer, begin, drain, gather_answers, text_request
from tests.framework.models import TINY_MODEL_ID, make_tiny_model
from tests.framework.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_RUNNING = 2
MAX_WAITING = 2
TEXT = "one two three four five six seven eight"


class Subject(Protocol):
    """A backend, and how a test speaks to it."""

    engine: Engine
    model: str

    def short(self, text: str = TEXT, **fields: object) -> GenerationRequest:
        """Ends by itself or by max_tokens, with several tokens."""

    def long(self) -> GenerationRequest:
        """Runs for many seconds."""

    async def lose(self) -> None:
        """Takes the engine away, and does not wait until it is back."""


@dataclass
class Echo:
    engine: Engine
    model: str = "echo"

    @classmethod
    async def make(cls, folder: Path) -> Echo:
        config = EchoConfig(MAX_RUNNING, MAX_WAITING, directives=True, recovery_s=0.1)
        return cls(EchoEngine(config, SystemClock()))

    def short(self, text: str = TEXT, **fields: object) -> GenerationRequest:
        return text_request(self.model, text, **fields)

    def long(self) -> GenerationRequest:
        return self.short("[[tokens=4000]] [[delay_ms=10]] a long story")

    async def lose(self) -> None:
        with suppress(ReplicaLost):
            await answer(self.engine, self.short("[[crash]]"))


@dataclass
class Embedded:
    engine: EmbeddedEngine
    model: str = TINY_MODEL_ID

    @classmethod
    async def make(cls, folder: Path) -> Embedded:
        model = await asyncio.to_thread(make_tiny_model, folder / "model")
        engine = engines.embedded_engine(
            model, TINY_MODEL_ID, max_running=MAX_RUNNING, max_waiting=MAX_WAITING
        )
        return cls(engine)

    def short(self, text: str = TEXT, **fields: object) -> GenerationRequest:
        return text_request(self.model, text, **({"max_tokens": 12} | fields))

    def long(self) -> GenerationRequest:
        return self.short(max_tokens=4000, ignore_eos=True)

    async def lose(self) -> None:
        engines.signal_child(self.engine, signal.SIGKILL)


KINDS = {"echo": Echo, "embedded": Embedded}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(kind: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Subject]:
    subject = await KINDS[kind].make(tmp_path_factory.mktemp(kind))
    await subject.engine.start()
    yield subject
    await subject.engine.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def subject(shared: Subject) -> Subject:
    """The module's engine, serving and idle."""
    await shared.engine.wait_healthy(START_TIMEOUT_S)
    await eventually(lambda: idle(shared.engine), what="the engine is idle")
    return shared


def idle(engine: Engine) -> bool:
    return replace(engine.load(), restarts=0) == Load(0, 0)


async def test_the_model_is_described(subject: Subject) -> None:
    (model,) = subject.engine.models()
    assert model.id == subject.model
    assert model.ready
    assert model.revision
    assert model.numerics_id
    assert model.context_tokens > 1000
    assert set(model.capabilities) == {Capability.GENERATE, Capability.CHAT}
    assert subject.engine.health().serving


async def test_a_stream_has_a_beginning_its_tokens_and_an_end(subject: Subject) -> None:
    whole = await answer(subject.engine, subject.short())
    (model,) = subject.engine.models()
    assert whole.started is not None
    assert whole.finished is not None
    assert (whole.started.model_revision, whole.started.numerics_id) == (model.revision, model.numerics_id)
    assert whole.finished.usage.prompt_tokens == whole.started.prompt_tokens > 0
    assert whole.finished.usage.completion_tokens == len(whole.token_ids[0]) > 1
    assert whole.texts[0]


async def test_a_conversation_is_answered(subject: Subject) -> None:
    prompt = Prompt(messages=(Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "What is red?")))
    whole = await answer(subject.engine, replace(subject.short(), prompt=prompt))
    assert whole.texts[0]


async def test_a_repeated_request_has_the_same_tokens(subject: Subject) -> None:
    first, again, other = await gather_answers_one_by_one(
        subject.engine, [subject.short(), subject.short(), subject.short("something else entirely")]
    )
    assert first == again
    assert first != other


async def gather_answers_one_by_one(
    engine: Engine, requests: list[GenerationRequest]
) -> list[list[list[int]]]:
    return [(await answer(engine, request)).tokens for request in requests]


async def test_max_tokens_ends_a_choice(subject: Subject) -> None:
    whole = await answer(subject.engine, subject.short(max_tokens=3, ignore_eos=True))
    assert len(whole.token_ids[0]) == 3
    assert whole.finished is not None
    assert whole.finished.reasons == (FinishReason.LENGTH,)


async def test_a_stop_string_ends_a_choice_and_is_not_part_of_it(subject: Subject) -> None:
    free = (await answer(subject.engine, subject.short(ignore_eos=True, max_tokens=8))).texts[0]
    middle = len(free) // 2
    stop = free[middle - 1 : middle + 2]
    whole = await answer(subject.engine, subject.short(ignore_eos=True, max_tokens=8, stop=(stop, "\0\0")))
    assert whole.finished is not None
    assert whole.finished.reasons == (FinishReason.STOP,)
    assert whole.texts[0] == free[: free.find(stop)]


async def test_a_stop_token_ends_a_choice(subject: Subject) -> None:
    free = await answer(subject.engine, subject.short(ignore_eos=True))
    third = free.token_ids[0][2]
    whole = await answer(subject.engine, subject.short(ignore_eos=True, stop_token_ids=(third,)))
    assert whole.finished is not None
    assert whole.finished.reasons == (FinishReason.STOP,)
    assert whole.token_ids[0] == free.token_ids[0][: free.token_ids[0].index(third) + 1]


async def test_each_choice_is_complete(subject: Subject) -> None:
    whole = await answer(subject.engine, subject.short(n=2, max_tokens=4, ignore_eos=True))
    assert whole.finished is not None
    assert sorted(whole.token_ids) == [0, 1]
    assert len(whole.finished.reasons) == 2
    assert whole.finished.usage.completion_tokens == sum(map(len, whole.tokens)) == 8


async def test_logprobs_come_one_for_each_token(subject: Subject) -> None:
    whole = await answer(subject.engine, subject.short(logprobs=True, top_logprobs=1))
    assert [entry.chosen.token_id for entry in whole.logprobs[0]] == whole.token_ids[0]
    assert all(entry.chosen.logprob <= 0 for entry in whole.logprobs[0])
    # Greedy, so what was chosen is what was most probable.
    assert all(entry.top == (entry.chosen,) for entry in whole.logprobs[0])


async def test_counting_agrees_with_generating(subject: Subject) -> None:
    whole = await answer(subject.engine, subject.short())
    count = await subject.engine.count_tokens(subject.model, Prompt(text=TEXT))
    assert whole.started is not None
    assert count.prompt_tokens == whole.started.prompt_tokens
    assert count.context_tokens == subject.engine.models()[0].context_tokens


async def test_bad_requests_are_refused_by_name(subject: Subject) -> None:
    context_tokens = subject.engine.models()[0].context_tokens
    with pytest.raises(ModelNotFound):
        await answer(subject.engine, replace(subject.short(), model="another"))
    with pytest.raises(ModelNotFound):
        await subject.engine.count_tokens("another", Prompt(text=TEXT))
    with pytest.raises(ContextLengthExceeded):
        await answer(subject.engine, subject.short("word " * (context_tokens + 1), max_tokens=None))
    with pytest.raises(ContextLengthExceeded):
        await answer(subject.engine, subject.short(max_tokens=4096, text="word " * (context_tokens - 100)))
    with pytest.raises(RequestInvalid) as choices:
        await answer(subject.engine, subject.short(n=MAX_RUNNING + 1))
    assert [violation.field for violation in choices.value.violations] == ["spec.n"]
    with pytest.raises(RequestInvalid) as length:
        await answer(subject.engine, subject.short(max_tokens=1_000_000))
    assert [violation.field for violation in length.value.violations] == ["spec.max_tokens"]


async def test_r11_what_is_too_much_is_refused_at_once(subject: Subject) -> None:
    running = [await begin(subject.engine, subject.long()) for _ in range(MAX_RUNNING)]
    waiting = [asyncio.create_task(answer(subject.engine, subject.short())) for _ in range(MAX_WAITING)]
    await eventually(
        lambda: (subject.engine.load().running, subject.engine.load().waiting) == (MAX_RUNNING, MAX_WAITING)
    )
    for _ in range(5):
        with pytest.raises(Overloaded) as refused:
            async with asyncio.timeout(0.5):
                await answer(subject.engine, subject.short())
        assert refused.value.retryable
        assert refused.value.retry_after_s
    for stream in running:
        await stream.aclose()
    for task in waiting:
        assert (await task).finished


async def test_r02_closing_a_stream_frees_its_slot(subject: Subject) -> None:
    running = [await begin(subject.engine, subject.long()) for _ in range(MAX_RUNNING)]
    next_one = asyncio.create_task(answer(subject.engine, subject.short()))
    await eventually(lambda: subject.engine.load().waiting == 1)
    await running[0].aclose()
    async with asyncio.timeout(5):
        assert (await next_one).finished
    await running[1].aclose()
    await eventually(lambda: idle(subject.engine), timeout_s=5)


async def test_r02_cancelling_the_reader_ends_the_work(subject: Subject) -> None:
    for _ in range(10):
        begun = asyncio.Event()

        async def read(begun: asyncio.Event = begun) -> None:
            async with aclosing(subject.engine.generate(subject.long())) as events:
                async for _ in events:
                    begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await eventually(lambda: idle(subject.engine), timeout_s=5)


async def test_a_waiting_request_can_be_given_up(subject: Subject) -> None:
    running = [await begin(subject.engine, subject.long()) for _ in range(MAX_RUNNING)]
    waiting = asyncio.create_task(answer(subject.engine, subject.short()))
    await eventually(lambda: subject.engine.load().waiting == 1)
    waiting.cancel()
    await eventually(lambda: subject.engine.load().waiting == 0)
    for stream in running:
        await stream.aclose()


async def test_r12_a_request_whose_deadline_passed_is_not_started(subject: Subject) -> None:
    running = [await begin(subject.engine, subject.long()) for _ in range(MAX_RUNNING)]
    events: list[EngineEvent] = []

    async def read() -> None:
        async with aclosing(subject.engine.generate(subject.short(timeout_s=0.1))) as stream:
            events.extend([event async for event in stream])

    with pytest.raises(DeadlineExceeded):
        await read()
    assert not events
    for stream in running:
        await stream.aclose()


async def test_r01_a_running_request_ends_at_its_deadline(subject: Subject) -> None:
    with pytest.raises(DeadlineExceeded):
        await answer(subject.engine, replace(subject.long(), timeout_s=0.3))
    await eventually(lambda: idle(subject.engine), timeout_s=1)


async def test_r04_deltas_merge_while_the_reader_lags(subject: Subject) -> None:
    request = subject.short(ignore_eos=True, max_tokens=200)
    prompt = await answer(subject.engine, request)
    events = await begin(subject.engine, request)
    await eventually(lambda: idle(subject.engine), timeout_s=30)
    rest = [event async for event in events]
    assert len(rest) == 2  # one delta for all that was left, and the end
    assert isinstance(rest[1], Finished)
    assert rest[1] == prompt.finished


async def test_r09_loss_of_the_engine_is_told_and_mended(subject: Subject) -> None:
    before = await answer(subject.engine, subject.short())
    restarts = subject.engine.load().restarts
    running = asyncio.create_task(drain(await begin(subject.engine, subject.long())))
    await subject.lose()
    with pytest.raises(ReplicaLost) as lost:
        async with asyncio.timeout(5):
            await running
    assert lost.value.retryable
    if not subject.engine.health().serving:
        assert not subject.engine.models()[0].ready
        with pytest.raises(NoReplica):
            await answer(subject.engine, subject.short())
    await subject.engine.wait_healthy(START_TIMEOUT_S)
    assert subject.engine.load().restarts == restarts + 1
    assert (await answer(subject.engine, subject.short())).tokens == before.tokens


async def test_many_at_once_are_each_as_if_alone(subject: Subject) -> None:
    requests = [subject.short(f"{TEXT} {number}") for number in range(MAX_RUNNING + MAX_WAITING)]
    alone = [(await answer(subject.engine, request)).tokens for request in requests]
    together = [whole.tokens for whole in await gather_answers(subject.engine, requests)]
    assert together == alone


async def test_stopping_ends_what_runs_and_can_be_repeated(kind: str, tmp_path: Path) -> None:
    subject: Subject = await KINDS[kind].make(tmp_path)
    await subject.engine.start()
    await subject.engine.wait_healthy(START_TIMEOUT_S)
    running = asyncio.create_task(drain(await begin(subject.engine, subject.long())))
    await asyncio.sleep(0)
    await subject.engine.stop()
    await subject.engine.stop()
    with pytest.raises(Draining):
        await running
    assert not subject.engine.health().serving
    with pytest.raises(NoReplica):
        await answer(subject.engine, subject.short())
