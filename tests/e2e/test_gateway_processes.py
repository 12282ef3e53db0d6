"""The gateway as a real process between real auth and inference (echo); no broker, which must not matter."""

from __future__ import annotations

import asyncio
import ssl

import grpc
import httpx
import openai
import pytest
from llmos.gateway.v1 import (
    generation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

from services.auth.credentials.keys import new_api_key
from services.mesh import errors, status
from tests.conftest import MeshFactory
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

SERVICES = ("auth", "inference", "gateway")
TIMEOUT_S = 10
HELLO = [{"role": "user", "content": "one two three"}]


def spec(model: str, text: str = "one two three") -> generation_pb2.GenerationSpec:
    found = generation_pb2.GenerationSpec(model=model)
    found.prompt.text = text
    return found


async def model_of(mesh: MeshHarness) -> str:
    stub = model_service_pb2_grpc.ModelServiceStub(mesh.channel())
    listed = await stub.ListModels(model_service_pb2.ListModelsRequest(), metadata=mesh.bearer())
    return listed.models[0].id


def http_client(mesh: MeshHarness, key: str | None = None) -> openai.AsyncOpenAI:
    verify: ssl.SSLContext | bool = True
    if mesh.authority is not None:
        verify = ssl.create_default_context(cafile=str(mesh.authority.ca_file))
        verify.load_cert_chain(mesh.authority.folder / "client.crt", mesh.authority.folder / "client.key")
    return openai.AsyncOpenAI(
        base_url=f"{mesh.http_url()}/v1",
        api_key=key or mesh.admin_key,
        max_retries=0,
        timeout=TIMEOUT_S,
        http_client=httpx.AsyncClient(verify=verify),
    )


@pytest.mark.parametrize("tls", [False, True])
async def test_both_edges_answer_and_refuse(make_mesh: MeshFactory, tls: bool) -> None:
    mesh = make_mesh(None, tls=tls)
    await mesh.start(*SERVICES)
    model = await model_of(mesh)
    stub = generation_service_pb2_grpc.GenerationServiceStub(mesh.channel())
    whole = await stub.Generate(
        generation_service_pb2.GenerateRequest(spec=spec(model)), metadata=mesh.bearer()
    )
    async with http_client(mesh) as client:
        plain = await client.chat.completions.create(model=model, messages=HELLO)  # type: ignore[arg-type]
        stream = await client.chat.completions.create(model=model, messages=HELLO, stream=True)  # type: ignore[arg-type]
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert whole.choices[0].text
    assert text == plain.choices[0].message.content != ""

    with pytest.raises(grpc.aio.AioRpcError) as anonymous:
        await stub.Generate(generation_service_pb2.GenerateRequest(spec=spec(model)))
    assert isinstance(status.from_rpc_error(anonymous.value), errors.CredentialMissing)
    async with http_client(mesh, "llmos_wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    if tls:
        verify = ssl.create_default_context(cafile=str(mesh.authority.ca_file))  # type: ignore[union-attr]
        async with httpx.AsyncClient(verify=verify) as bare:
            with pytest.raises(httpx.TransportError):
                await bare.get(f"{mesh.http_url()}/healthz")
    assert await mesh.stop("gateway") == 0


async def test_r25_while_auth_is_away_known_keys_work(make_mesh: MeshFactory) -> None:
    mesh = make_mesh(None)
    await mesh.start(*SERVICES)
    model = await model_of(mesh)
    mesh.kill("auth")
    async with http_client(mesh) as client:
        found = await client.chat.completions.create(model=model, messages=HELLO)  # type: ignore[arg-type]
    assert found.choices[0].message.content
    unknown = new_api_key()
    async with http_client(mesh, unknown) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            await client.models.list()
    assert refused.value.code == "dependency_unavailable"


async def test_r08_a_replica_that_dies_is_told_and_found_again(make_mesh: MeshFactory) -> None:
    mesh = make_mesh(None)
    await mesh.start(*SERVICES)
    model = await model_of(mesh)
    stub = generation_service_pb2_grpc.GenerationServiceStub(mesh.channel())
    request = generation_service_pb2.StreamGenerateRequest(spec=spec(model, "[[hang_after=1]] a b c"))
    running = stub.StreamGenerate(request, metadata=mesh.bearer(), timeout=TIMEOUT_S)
    assert (await running.read()).HasField("started")
    assert (await running.read()).HasField("delta")
    mesh.kill("inference")
    with pytest.raises(grpc.aio.AioRpcError) as lost:
        await asyncio.wait_for(running.read(), 1)
    assert isinstance(status.from_rpc_error(lost.value), errors.ReplicaLost)
    plain = generation_service_pb2.GenerateRequest(spec=spec(model))
    with pytest.raises(grpc.aio.AioRpcError) as nobody:
        await stub.Generate(plain, metadata=mesh.bearer(), timeout=TIMEOUT_S)
    found = status.from_rpc_error(nobody.value)
    assert isinstance(found, errors.NoReplica | errors.ReplicaLost)
    assert found.retry_after_s
    await mesh.start("inference")

    async def answers() -> bool:
        try:
            await stub.Generate(plain, metadata=mesh.bearer(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return True

    await eventually(answers, timeout_s=5, what="new requests succeed")


async def test_a_second_replica_takes_over(make_mesh: MeshFactory) -> None:
    mesh = make_mesh(None, replicas=("inference", "inference-1"))
    await mesh.start("auth", "inference", "inference-1", "gateway")
    model = await model_of(mesh)
    stub = generation_service_pb2_grpc.GenerationServiceStub(mesh.channel())
    plain = generation_service_pb2.GenerateRequest(spec=spec(model))
    # A replica may come up before it has auth's keys; then the gateway asks it again.
    await eventually(lambda: mesh.log("gateway").count(" serves") == 2, timeout_s=TIMEOUT_S)
    mesh.kill("inference")
    for _ in range(20):
        await stub.Generate(plain, metadata=mesh.bearer(), timeout=TIMEOUT_S)


async def test_r07_a_drain_lets_streams_of_both_edges_finish(make_mesh: MeshFactory) -> None:
    mesh = make_mesh(None)
    await mesh.start(*SERVICES)
    model = await model_of(mesh)
    stub = generation_service_pb2_grpc.GenerationServiceStub(mesh.channel())
    prompt = "[[tokens=10]][[delay_ms=150]] slowly"
    call = stub.StreamGenerate(
        generation_service_pb2.StreamGenerateRequest(spec=spec(model, prompt)), metadata=mesh.bearer()
    )
    async with http_client(mesh) as client:
        messages = [{"role": "user", "content": prompt}]
        stream = await client.chat.completions.create(model=model, messages=messages, stream=True)  # type: ignore[call-overload]
        events = aiter(call)
        assert (await anext(events)).HasField("started")
        stopping = asyncio.create_task(mesh.stop("gateway"))
        rest = [event async for event in events]
        chunks = [chunk async for chunk in stream]
        assert rest[-1].HasField("finished")
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert await asyncio.wait_for(stopping, 20) == 0
