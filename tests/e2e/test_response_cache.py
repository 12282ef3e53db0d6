"""The response cache over real processes: both edges, two gateways and one Valkey, the audit, the guide."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from llmos.gateway.v1 import (
    generation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from llmos.logging.v1 import audit_service_pb2, audit_service_pb2_grpc

from deploy.dev.broker import Broker
from tests.conftest import MeshFactory
from tests.framework.guides import run
from tests.framework.mesh import MeshHarness
from tests.framework.valkey import ValkeyServer
from tests.framework.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "cache.md"
TIMEOUT_S = 10


class Caller:
    """Asks both edges of both gateways the same."""

    def __init__(self, mesh: MeshHarness, http: httpx.AsyncClient, model: str) -> None:
        self._mesh = mesh
        self._http = http
        self._model = model

    async def over_http(
        self, text: str, said: str = "", *, gateway: str = "gateway", **body: Any
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {self._mesh.admin_key}"}
        messages = [{"role": "user", "content": text}]
        return await self._http.post(
            f"{self._mesh.http_url(gateway)}/v1/chat/completions",
            headers=headers | ({"cache-control": said} if said else {}),
            json={"model": self._model, "messages": messages, "temperature": 0, **body},
        )

    async def over_grpc(
        self, text: str, said: str = "", *, gateway: str = "gateway"
    ) -> tuple[list[Any], dict[str, str]]:
        """The events and the trailing metadata."""
        spec = generation_pb2.GenerationSpec(model=self._model)
        message = spec.prompt.chat.messages.add(role=generation_pb2.ROLE_USER)
        message.content.add().text = text
        spec.sampling.temperature = 0
        metadata = [*self._mesh.bearer(), *([("cache-control", said)] if said else [])]
        stub = generation_service_pb2_grpc.GenerationServiceStub(self._mesh.channel(gateway))
        call = stub.StreamGenerate(
            generation_service_pb2.StreamGenerateRequest(spec=spec), metadata=metadata, timeout=TIMEOUT_S
        )
        events = [event async for event in call]
        return events, {key: str(value) for key, value in await call.trailing_metadata() or ()}


async def test_the_cache_on_both_edges_of_two_gateways(
    make_mesh: MeshFactory, broker: Broker, own_valkey: ValkeyServer
) -> None:
    mesh = make_mesh(broker)
    for name in ("gateway", "gateway-1"):
        mesh.configure(name, cache_max_bytes=2**20, redis_url=own_valkey.url)
    await mesh.start("auth", "logging", "inference", "gateway", "gateway-1")
    models = model_service_pb2_grpc.ModelServiceStub(mesh.channel())
    listed = await models.ListModels(model_service_pb2.ListModelsRequest(), metadata=mesh.bearer())
    model = listed.models[0].id
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
        caller = Caller(mesh, http, model)
        ids = await both_edges_tell_hit_from_miss(caller)
        await words_of_cache_control(caller)
        await the_audit_log_shows_hits(mesh, *ids)
        metrics = (await http.get(mesh.metrics_url("gateway-1"))).text
        assert re.search(
            r'^llmos_cache_requests_total\{.*llmos_cache_result="hit".*\} [1-9]', metrics, re.MULTILINE
        )
        await the_guide_does_what_it_says(mesh, model)
        await a_lost_valkey_is_no_error(caller, own_valkey)


async def both_edges_tell_hit_from_miss(caller: Caller) -> tuple[str, str]:
    """Returns the request ids of a miss and of a hit."""
    first = await caller.over_http("one two three")
    assert (first.status_code, first.headers["x-llmos-cache"]) == (200, "miss")
    assert "age" not in first.headers
    second = await caller.over_http("one two three", gateway="gateway-1")
    assert second.headers["x-llmos-cache"] == "hit"
    assert 0 <= int(second.headers["age"]) <= TIMEOUT_S
    assert second.json()["choices"] == first.json()["choices"]
    assert second.json()["usage"] == first.json()["usage"]

    streamed = await caller.over_http("one two three", stream=True)
    assert streamed.headers["x-llmos-cache"] == "hit"
    assert streamed.text.endswith("data: [DONE]\n\n")

    for gateway in ("gateway", "gateway-1"):
        events, trailers = await caller.over_grpc("one two three", gateway=gateway)
        assert trailers["x-llmos-cache"] == "hit"
        assert int(trailers["age"]) >= 0
        assert [event.WhichOneof("event") for event in events] == ["started", "delta", "finished"]
        assert events[1].delta.seq == 1
        assert events[1].delta.text == first.json()["choices"][0]["message"]["content"]
    _, trailers = await caller.over_grpc("four five")
    assert trailers["x-llmos-cache"] == "miss"
    return first.headers["x-request-id"], second.headers["x-request-id"]


async def words_of_cache_control(caller: Caller) -> None:
    for said, status in (("no-cache", "miss"), ("no-store", "bypass"), ("only-if-cached", "hit")):
        assert (await caller.over_http("one two three", said)).headers["x-llmos-cache"] == status
        assert (await caller.over_grpc("one two three", said))[1]["x-llmos-cache"] == status
    assert (await caller.over_http("one two three", temperature=1)).headers["x-llmos-cache"] == "bypass"
    refused = await caller.over_http("never asked", "only-if-cached")
    assert (refused.status_code, refused.json()["error"]["code"]) == (504, "not_cached")
    assert refused.headers["x-should-retry"] == "false"
    assert "only-if-cached" in refused.json()["error"]["message"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.over_grpc("never asked", "only-if-cached")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def the_audit_log_shows_hits(mesh: MeshHarness, miss_id: str, hit_id: str) -> None:
    stub = audit_service_pb2_grpc.AuditServiceStub(mesh.channel())

    async def outcome(request_id: str) -> Any:
        request = audit_service_pb2.SearchRequest(
            filter=audit_service_pb2.RequestFilter(request_id=request_id)
        )
        found = await stub.Search(request, metadata=mesh.bearer())
        return found.records[0].ended if found.records and found.records[0].HasField("ended") else None

    miss = await eventually(lambda: outcome(miss_id), timeout_s=30)
    hit = await eventually(lambda: outcome(hit_id), timeout_s=30)
    assert (miss.served_from_cache, hit.served_from_cache) == (False, True)
    assert miss.usage.completion_tokens > 0
    assert hit.usage.completion_tokens == hit.usage.prompt_tokens == 0
    assert hit.model_revision == miss.model_revision != ""


async def the_guide_does_what_it_says(mesh: MeshHarness, model: str) -> None:
    """Runs its commands as they stand, against this mesh."""
    asking, searching = re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    for written, here in (
        ("http://127.0.0.1:8080", mesh.http_url()),
        (".state/auth/admin-key", str(mesh.state.admin_key)),
        ("smollm2-135m-instruct", model),
    ):
        assert written in asking
        asking = asking.replace(written, here)
    said = await run(mesh, asking)
    found = re.findall(r"^x-llmos-cache: (\w+)", said, re.MULTILINE)
    assert found == ["miss", "hit", "miss", "bypass"], said
    assert re.search(r"^age: \d+", said, re.MULTILINE), said
    assert "HTTP/1.1 200" in said, said

    async def is_shown() -> bool:
        return "cached" in await run(mesh, searching)

    await eventually(is_shown, timeout_s=30)


async def a_lost_valkey_is_no_error(caller: Caller, valkey: ValkeyServer) -> None:
    valkey.kill()
    for _ in range(2):
        answered = await caller.over_http("one two three")
        assert (answered.status_code, answered.headers["x-llmos-cache"]) == (200, "miss")
    valkey.start()

    async def is_back() -> bool:
        return (await caller.over_http("one two three")).headers["x-llmos-cache"] == "hit"

    await eventually(is_back, timeout_s=20)
