"""The gateway's `InferencePort`: the fake that its tests use, and gRPC to a real inference service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.gateway.generation import (
    Delta,
    EngineStarted,
    Finished,
    FinishReason,
    Prompt,
    TokenCount,
    Usage,
    ValidPrompt,
)
from services.gateway.ports import InferencePort
from services.mesh import errors
from tests.framework.echo_replica import echo_replica
from tests.framework.gateway_fakes import FakeReplica, Gate, events_of, generation
from tests.framework.waiting import eventually

TIMEOUT_S = 5


@dataclass
class Subject:
    """An implementation, and what a test does to it."""

    port: InferencePort
    model: str
    lose: object
    running: object


@asynccontextmanager
async def fake(folder: Path, kind: str) -> AsyncIterator[Subject]:
    started = EngineStarted("rev-1", 7, "replica-0")
    end = Finished((FinishReason.STOP,), Usage(7, 2))
    gate = Gate()
    replica = {
        "whole": FakeReplica([started, Delta(1, 0, "a", (1,)), Delta(2, 0, "b", (2,)), end]),
        "hang": FakeReplica([started, Delta(1, 0, "a", (1,)), gate, errors.ReplicaLost("gone")]),
        "refuse": FakeReplica([errors.ModelNotFound("none")]),
    }[kind]

    async def lose() -> None:
        replica.healthy = False
        gate.open.set()

    yield Subject(replica, "echo-1", lose, lambda: replica.running)


@asynccontextmanager
async def over_grpc(
    folder: Path, kind: str, *, is_watched: bool = False, is_carried: bool = False
) -> AsyncIterator[Subject]:
    async with echo_replica(folder) as replica:
        if is_watched:
            await replica.watched()
        if is_carried:
            await replica.carried()
        yield Subject(
            replica.port,
            "none" if kind == "refuse" else replica.model,
            lambda: replica.server.drain(0),
            lambda: replica.engine.load().running,
        )


@asynccontextmanager
async def watched(folder: Path, kind: str) -> AsyncIterator[Subject]:
    """Deltas come in the stream of all."""
    async with over_grpc(folder, kind, is_watched=True) as subject:
        yield subject


@asynccontextmanager
async def carried(folder: Path, kind: str) -> AsyncIterator[Subject]:
    """What is not read along goes in the stream of all."""
    async with over_grpc(folder, kind, is_carried=True) as subject:
        yield subject


PROMPTS = {"whole": "a b", "hang": "[[hang_after=1]] a b c", "refuse": "a"}
each = pytest.mark.parametrize("make", [fake, over_grpc, watched], ids=["fake", "grpc", "watched"])
each_way = pytest.mark.parametrize(
    ("make", "whole"),
    [(fake, False), (over_grpc, False), (watched, False), (fake, True), (over_grpc, True), (carried, True)],
    ids=["fake", "grpc", "watched", "fake-whole", "grpc-whole", "carried"],
)


@each_way
async def test_an_answer_has_its_order(make: object, whole: bool, tmp_path: Path) -> None:
    async with make(tmp_path, "whole") as subject:  # type: ignore[operator]
        request = generation(model=subject.model, prompt=Prompt(text=PROMPTS["whole"]))
        events = await events_of(subject.port, request, whole=whole)
        assert isinstance(events[0], EngineStarted)
        assert events[0].replica == "replica-0"
        assert isinstance(events[-1], Finished)
        deltas = [event for event in events if isinstance(event, Delta)]
        assert [delta.seq for delta in deltas] == list(range(1, len(deltas) + 1))
        assert sum(len(delta.token_ids) for delta in deltas) <= events[-1].usage.completion_tokens
        assert len(events[-1].finish_reasons) == 1


@each
async def test_closing_ends_the_work(make: object, tmp_path: Path) -> None:
    async with make(tmp_path, "hang") as subject:  # type: ignore[operator]
        request = generation(model=subject.model, prompt=Prompt(text=PROMPTS["hang"]))
        async with aclosing(subject.port.generate("req_1", request)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    break
            assert subject.running() == 1
        await eventually(lambda: subject.running() == 0, timeout_s=TIMEOUT_S)


@each_way
async def test_who_gives_up_ends_the_work(make: object, whole: bool, tmp_path: Path) -> None:
    async with make(tmp_path, "hang") as subject:  # type: ignore[operator]
        request = generation(model=subject.model, prompt=Prompt(text=PROMPTS["hang"]))
        reading = asyncio.create_task(events_of(subject.port, request, whole=whole))
        await eventually(lambda: subject.running() == 1, timeout_s=TIMEOUT_S)
        reading.cancel()
        await eventually(lambda: subject.running() == 0, timeout_s=TIMEOUT_S)
        assert reading.cancelled()


@pytest.mark.parametrize("make", [fake, over_grpc, carried], ids=["fake", "grpc", "carried"])
async def test_a_replica_that_goes_away_takes_whole_answers_with_it(make: object, tmp_path: Path) -> None:
    async with make(tmp_path, "hang") as subject:  # type: ignore[operator]
        request = generation(model=subject.model, prompt=Prompt(text=PROMPTS["hang"]))
        reading = asyncio.create_task(subject.port.generate_whole("req_1", request))
        await eventually(lambda: subject.running() == 1, timeout_s=TIMEOUT_S)
        losing = asyncio.create_task(subject.lose())
        with pytest.raises(errors.LlmosError) as lost:
            await reading
        assert isinstance(lost.value, errors.ReplicaLost | errors.Draining)
        await losing
        assert not await subject.port.is_healthy()


@each
async def test_a_replica_that_goes_away_is_lost(make: object, tmp_path: Path) -> None:
    async with make(tmp_path, "hang") as subject:  # type: ignore[operator]
        assert await subject.port.is_healthy()
        request = generation(model=subject.model, prompt=Prompt(text=PROMPTS["hang"]))
        events = subject.port.generate("req_1", request)
        while not isinstance(await anext(events), Delta):
            pass
        losing = asyncio.create_task(subject.lose())
        with pytest.raises(errors.LlmosError) as lost:
            await anext(events)
        # It said why, or it did not.
        assert isinstance(lost.value, errors.ReplicaLost | errors.Draining)
        await losing
        assert not await subject.port.is_healthy()
        with pytest.raises(errors.ReplicaLost):
            await subject.port.list_models()


@each_way
async def test_a_refusal_keeps_its_class(make: object, whole: bool, tmp_path: Path) -> None:
    async with make(tmp_path, "refuse") as subject:  # type: ignore[operator]
        request = generation(model=subject.model, prompt=Prompt(text=PROMPTS["refuse"]))
        with pytest.raises(errors.ModelNotFound):
            await events_of(subject.port, request, whole=whole)


@each
async def test_models_and_counts(make: object, tmp_path: Path) -> None:
    async with make(tmp_path, "whole") as subject:  # type: ignore[operator]
        (model,) = await subject.port.list_models()
        assert model.id == subject.model
        assert model.ready
        count = await subject.port.count_tokens(ValidPrompt(subject.model, Prompt(text="a b")))
        assert isinstance(count, TokenCount)
        assert 0 < count.prompt_tokens <= count.context_tokens
