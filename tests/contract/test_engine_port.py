"""The suite of the engine port: what each backend does, whatever it is made of.

Each subject (`tests.framework.engine_subjects`) says how to speak to it: a request that runs long, and how
its engine is lost.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from services.inference.engine.port import (
    Capability,
    Delta,
    Engine,
    EngineEvent,
    Finished,
    FinishReason,
    GenerationRequest,
    Message,
    Prompt,
    Role,
    Sampling,
)
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
from tests.framework.engine_subjects import KINDS, MAX_RUNNING, MAX_WAITING, TEXT, Subject
from tests.framework.engines import START_TIMEOUT_S, Answer, answer, begin, drain, gather_answers, idle
from tests.framework.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
    requests = [subject.short(), subject.short(), subject.short("something else entirely")]
    first, again, other = [(await answer(subject.engine, request)).tokens for request in requests]
    assert first == again
    assert first != other


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


async def test_what_is_taken_directly_is_not_yielded(subject: Subject) -> None:
    request = subject.short(n=2, max_tokens=6, ignore_eos=True)
    told, offered = Answer(), itertools.count(1)

    def direct(delta: Delta) -> bool:
        if takes := next(offered) % 3 > 0:
            told.add(delta)
        return takes

    async with aclosing(subject.engine.generate(request, direct)) as events:
        async for event in events:
            told.add(event)
    assert told.tokens == (await answer(subject.engine, request)).tokens
    assert next(offered) > 1


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


async def test_the_load_is_told(subject: Subject) -> None:
    load = subject.engine.load()
    assert (load.max_running, load.max_waiting) == (MAX_RUNNING, MAX_WAITING)
    assert load.waiting_tokens == load.kv_pages_used == 0
    running = [await begin(subject.engine, subject.long()) for _ in range(MAX_RUNNING)]
    waiting = asyncio.create_task(answer(subject.engine, subject.short()))
    await eventually(lambda: subject.engine.load().waiting == 1)
    load = subject.engine.load()
    assert load.running == MAX_RUNNING
    assert load.waiting_tokens >= 8
    assert MAX_RUNNING <= load.kv_pages_used <= load.kv_pages
    for stream in running:
        await stream.aclose()
    await waiting


SEEDED = Sampling(seed=7, temperature=0.9)


RESUMED: dict[str, dict[str, object]] = {
    "greedy": {},
    "seeded": {"sampling": SEEDED},
    "choices": {"sampling": SEEDED, "n": 2},
    "stopped": {},
}


@pytest.mark.parametrize("case", RESUMED)
async def test_r05_a_request_goes_on_after_what_was_delivered(subject: Subject, case: str) -> None:
    """At every cut, what comes is what is missing of the undisturbed run."""
    fields: dict[str, object] = {"max_tokens": 8, "ignore_eos": True, "logprobs": True} | RESUMED[case]
    if case == "stopped":
        free = (await answer(subject.engine, subject.short(**fields))).texts[0]
        fields["stop"] = (free[len(free) // 2 :][:4],)
    request = subject.short(**fields)
    whole, borders = await observed(subject.engine, request)
    assert whole.finished is not None
    for cut in range(len(whole.token_ids[0]) + 1):
        # The second choice is behind the first.
        taken = [max(0, cut - 2 * choice) for choice in range(request.n)]
        delivered = tuple(tuple(whole.token_ids[choice][:count]) for choice, count in enumerate(taken))
        rest = await answer(subject.engine, replace(request, delivered=delivered))
        assert rest.finished is not None
        assert rest.finished.reasons == whole.finished.reasons
        assert rest.finished.usage.prompt_tokens == whole.finished.usage.prompt_tokens
        assert rest.finished.usage.completion_tokens == whole.finished.usage.completion_tokens
        for choice, count in enumerate(taken):
            assert rest.token_ids.get(choice, []) == whole.token_ids[choice][count:]
            assert rest.logprobs.get(choice, []) == whole.logprobs[choice][count:]
            text = rest.texts.get(choice, "")
            assert whole.texts[choice].endswith(text)
            if count in borders[choice]:
                assert borders[choice][count] + text == whole.texts[choice]


async def test_what_was_delivered_must_fit_the_request(subject: Subject) -> None:
    for fields in (
        {"n": 2, "delivered": ((1,),)},
        {"n": 1, "delivered": ((1,), (1,))},
        {"max_tokens": 2, "delivered": ((1, 1, 1),)},
        {"delivered": ((2**32 - 1,),)},
    ):
        with pytest.raises(RequestInvalid) as refused:
            await answer(subject.engine, subject.short(**fields))
        assert [violation.field for violation in refused.value.violations] == ["delivered"]
    assert (await answer(subject.engine, subject.short(delivered=((),)))).finished


async def observed(engine: Engine, request: GenerationRequest) -> tuple[Answer, list[dict[int, str]]]:
    """The answer, and for each choice the text that its first so many tokens gave, where a delta ended."""
    whole = Answer()
    borders: list[dict[int, str]] = [{0: ""} for _ in range(request.n)]
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            whole.add(event)
            if isinstance(event, Delta):
                borders[event.choice][len(whole.token_ids[event.choice])] = whole.texts[event.choice]
    return whole, borders


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
