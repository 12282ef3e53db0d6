"""The gRPC edge over fakes: what is sent, what is not offered yet, and callers that leave."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from llmos.common.v1 import finish_reason_pb2
from llmos.gateway.v1 import (
    generation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    task_service_pb2,
)

from services.gateway.generation import Capability, Delta, EngineStarted, FinishReason, Role
from services.mesh import errors, status
from services.mesh.actions import ACTIONS
from services.mesh.events import Outcome
from tests.framework.gateway_fakes import Bench, FakeReplica, Gate
from tests.framework.gateway_grpc import AUTH, serving
from tests.framework.waiting import eventually

TIMEOUT_S = 5
STARTED = EngineStarted("rev-1", 7, "replica-0")


def spec(**changes: object) -> generation_pb2.GenerationSpec:
    found = generation_pb2.GenerationSpec(model="echo-1")
    found.prompt.text = "Hi"
    found.MergeFrom(generation_pb2.GenerationSpec(**changes))  # type: ignore[arg-type]
    return found


def test_the_numbers_of_the_enums_are_those_of_the_protos() -> None:
    for ours, prefix, theirs in (
        (Role, "ROLE_", generation_pb2.Role),
        (FinishReason, "FINISH_REASON_", finish_reason_pb2.FinishReason),
        (Capability, "MODEL_CAPABILITY_", model_service_pb2.ModelCapability),
    ):
        for member in ours:
            assert theirs.Value(prefix + member.name) == member.value


async def test_a_stream_holds_the_request_id_the_seed_and_the_tokens(tmp_path: Path) -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench, tmp_path) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        call = stub.StreamGenerate(generation_service_pb2.StreamGenerateRequest(spec=spec()), metadata=AUTH)
        events = [event async for event in call]
        headers = dict(await call.initial_metadata())
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta", "finished"]
    assert events[0].started.request_id == headers["x-request-id"] == bench.audit.ended[0].facts.request_id
    assert events[0].started.seed < 2**63
    assert [(event.delta.seq, list(event.delta.token_ids)) for event in events[1:3]] == [
        (1, [100]),
        (2, [101]),
    ]
    assert events[3].finished.choices[0].finish_reason == finish_reason_pb2.FINISH_REASON_STOP
    assert events[3].finished.usage.cached_prompt_tokens == 3


async def test_models_and_counting(tmp_path: Path) -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench, tmp_path) as channel:
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        listed = await models.ListModels(model_service_pb2.ListModelsRequest(), metadata=AUTH)
        got = await models.GetModel(model_service_pb2.GetModelRequest(id="echo-1"), metadata=AUTH)
        request = generation_service_pb2.CountTokensRequest(model="echo-1", prompt=spec().prompt)
        generation = generation_service_pb2_grpc.GenerationServiceStub(channel)
        count = await generation.CountTokens(request, metadata=AUTH)
    assert [model.id for model in listed.models] == [got.model.id] == ["echo-1"]
    assert got.model.ready
    assert got.model.capabilities == [1, 2]
    assert (count.prompt_tokens, count.context_tokens) == (7, 4096)
    assert [event.outcome for event in bench.audit.ended] == [Outcome.SUCCEEDED] * 3
    assert len(bench.audit.started) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("idempotency_key", "k"),
    ],
)
async def test_what_is_not_offered_is_named(field: str, value: object, tmp_path: Path) -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench, tmp_path) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        request = generation_service_pb2.GenerateRequest(spec=spec(), **{field: value})  # type: ignore[arg-type]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(request, metadata=AUTH)
        stream = stub.StreamGenerate(
            generation_service_pb2.StreamGenerateRequest(spec=spec(), resumable=True), metadata=AUTH
        )
        with pytest.raises(grpc.aio.AioRpcError) as in_stream:
            await stream.read()
    for error, name in ((raised.value, field), (in_stream.value, "resumable")):
        found = status.from_rpc_error(error)
        assert isinstance(found, errors.NotImplementedYet)
        assert [violation.field for violation in found.violations] == [name]
    assert not bench.replicas[0].requests


async def test_every_method_is_listed_and_what_is_not_there_yet_says_so(tmp_path: Path) -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench, tmp_path) as channel:
        for method, action in ACTIONS.items():
            pending = method.endswith(("ResumeGenerate", "CancelGenerate"))
            if (action.scopes and not pending) or "PolicyService" in method:
                continue
            # Field 1 of the two that are validated first is an id.
            body = b"\n\x01x" if pending else b""
            call = channel.unary_stream(method)(body, metadata=AUTH)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call.read()
            found = status.from_rpc_error(raised.value)
            assert isinstance(found, errors.NotImplementedYet), method
            assert found.hint
            with pytest.raises(grpc.aio.AioRpcError) as anonymous:
                await channel.unary_stream(method)(body).read()
            assert isinstance(status.from_rpc_error(anonymous.value), errors.CredentialMissing)
    assert {event.error_reason for event in bench.audit.ended} == {"NOT_IMPLEMENTED"}
    assert not bench.audit.started
    listed = {name.rpartition("/")[2] for name in ACTIONS}
    for service in task_service_pb2.DESCRIPTOR.services_by_name.values():
        assert {method.name for method in service.methods} <= listed


async def test_broken_bytes_are_refused_and_not_even_read_for_strangers(tmp_path: Path) -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench, tmp_path) as channel:
        for name in ("Generate", "StreamGenerate"):
            call = channel.unary_stream(f"/llmos.gateway.v1.GenerationService/{name}")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(b"\xff\xff", metadata=AUTH).read()
            assert isinstance(status.from_rpc_error(raised.value), errors.RequestInvalid)
            with pytest.raises(grpc.aio.AioRpcError) as anonymous:
                await call(b"\xff\xff").read()
            assert isinstance(status.from_rpc_error(anonymous.value), errors.CredentialMissing)
    assert [event.error_reason for event in bench.audit.ended] == ["REQUEST_INVALID"] * 2


async def test_r02_cancelled_streams_leave_nothing_running(tmp_path: Path) -> None:
    gate = Gate()
    bench = Bench([FakeReplica([STARTED, Delta(1, 0, "a", (1,)), gate])], max_concurrent=64)
    async with serving(bench, tmp_path) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        calls = [
            stub.StreamGenerate(generation_service_pb2.StreamGenerateRequest(spec=spec()), metadata=AUTH)
            for _ in range(20)
        ]
        for call in calls:
            assert (await call.read()).HasField("started")
            assert (await call.read()).HasField("delta")
            call.cancel()
        await eventually(lambda: len(bench.audit.ended) == 20, timeout_s=TIMEOUT_S)
        assert bench.admission.running == 0
    assert {(event.outcome, event.error_reason) for event in bench.audit.ended} == {
        (Outcome.CANCELLED, "CANCELLED")
    }
    assert bench.replicas[0].closed == 20


async def test_r01_a_callers_deadline(tmp_path: Path) -> None:
    bench = Bench([FakeReplica([Gate()])])
    async with serving(bench, tmp_path) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        begun_s = asyncio.get_running_loop().time()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(
                generation_service_pb2.GenerateRequest(spec=spec()), metadata=AUTH, timeout=0.5
            )
        assert asyncio.get_running_loop().time() - begun_s < 0.7
        await eventually(lambda: bench.audit.ended, timeout_s=TIMEOUT_S)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (bench.audit.ended[0].outcome, bench.audit.ended[0].error_reason) == (
        Outcome.CANCELLED,
        "DEADLINE_EXCEEDED",
    )
    assert bench.replicas[0].closed == 1
