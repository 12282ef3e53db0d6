"""Callers that have no file of ours: gRPC by reflection, and curl."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from deploy.dev.broker import Broker
from tests.conftest import MeshFactory
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

SERVICE = "llmos.gateway.v1.GenerationService"


def sync_channel(mesh: MeshHarness) -> grpc.Channel:
    if mesh.authority is None:
        return grpc.insecure_channel(mesh.target())
    certs = mesh.authority.folder
    credentials = grpc.ssl_channel_credentials(
        *((certs / name).read_bytes() for name in ("ca.crt", "client.key", "client.crt"))
    )
    return grpc.secure_channel(mesh.target(), credentials)


def stream_by_reflection(channel: grpc.Channel, metadata: list[tuple[str, str]]) -> list[Any]:
    """A stream's responses, by nothing but what the server says of itself."""
    database = ProtoReflectionDescriptorDatabase(channel)
    assert SERVICE in database.get_services()
    pool = DescriptorPool(database)
    method = pool.FindServiceByName(SERVICE).FindMethodByName("StreamGenerate")
    request = GetMessageClass(method.input_type)()
    request.spec.model = "echo"
    request.spec.prompt.text = "three little words"
    call = channel.unary_stream(
        f"/{SERVICE}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    return list(call(request, metadata=metadata, timeout=20))


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "mtls"])
async def test_reflection_is_enough_to_stream(make_mesh: MeshFactory, broker: Broker, tls: bool) -> None:
    mesh = make_mesh(broker, tls=tls)
    await mesh.start("auth", "inference", "gateway")
    with sync_channel(mesh) as channel:
        responses = await eventually(
            lambda: answered(channel, mesh.bearer()), timeout_s=20, what="the replica is found"
        )
        kinds = [response.WhichOneof("event") for response in responses]
        assert kinds[0] == "started"
        assert kinds[-1] == "finished"
        assert "".join(response.delta.text for response in responses).split() == ["three", "little", "words"]
        with pytest.raises(grpc.RpcError) as refused:
            await asyncio.to_thread(stream_by_reflection, channel, [])
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "authorization: Bearer" in refused.value.details()


async def answered(channel: grpc.Channel, metadata: list[tuple[str, str]]) -> list[Any]:
    try:
        return await asyncio.to_thread(stream_by_reflection, channel, metadata)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise AssertionError(error.details()) from error
        raise


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on PATH")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "mtls"])
async def test_curl_gets_an_answer_a_stream_and_a_refusal(
    make_mesh: MeshFactory, broker: Broker, tls: bool
) -> None:
    mesh = make_mesh(broker, tls=tls)
    await mesh.start("auth", "inference", "gateway")
    body = {"model": "echo", "messages": [{"role": "user", "content": "hello there"}]}
    key = f"Authorization: Bearer {mesh.admin_key}"

    async def answer() -> dict[str, Any]:
        found = json.loads(await curl(mesh, "-H", key, "-d", json.dumps(body)))
        assert "choices" in found, found
        return found

    found = await eventually(answer, timeout_s=20, what="the replica is found")
    assert found["choices"][0]["message"]["content"].strip() == "hello there"
    streamed = await curl(mesh, "-N", "-H", key, "-d", json.dumps(body | {"stream": True}))
    assert streamed.rstrip().endswith("data: [DONE]")
    refused = json.loads(await curl(mesh, "-d", json.dumps(body)))
    assert "Bearer" in refused["error"]["message"]
    if tls:
        assert await curl(mesh, "-H", key, "-d", json.dumps(body), certificate=False, code=None) == ""


async def curl(mesh: MeshHarness, *args: str, certificate: bool = True, code: int | None = 0) -> str:
    """What curl prints; `code` None: it has to fail."""
    command = ["curl", "-s", f"{mesh.http_url()}/v1/chat/completions", "-H", "Content-Type: application/json"]
    if mesh.authority:
        certs = mesh.authority.folder
        command += ["--cacert", str(certs / "ca.crt")]
        if certificate:
            command += ["--cert", str(certs / "client.crt"), "--key", str(certs / "client.key")]
    process = await asyncio.create_subprocess_exec(*command, *args, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == code if code is not None else process.returncode != 0
    return out.decode()
