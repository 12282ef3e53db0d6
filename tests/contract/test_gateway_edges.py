"""Both edges stand for one request: the same arrives below them, and is refused for the same reason."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import grpc
import httpx
import pytest
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc

from services.gateway.auditing import current_record
from services.gateway.generation import EngineStarted, ValidGeneration
from services.mesh import errors, status
from services.mesh.errors import LlmosError
from services.mesh.events import Outcome
from services.mesh.interceptors import Call, Rest
from tests.framework import gateway_grpc, gateway_http
from tests.framework.gateway_fakes import Bench, FakeReplica, Gate, Step, answer

Spec = dict[str, Any]
"""A request in the terms of the HTTP edge; `_message` says the same in protobuf."""
HELLO: Spec = {"model": "echo-1", "messages": [{"role": "user", "content": "Hi"}]}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed")


class Edge(Protocol):
    """One edge, with a caller on it."""

    async def generate(self, spec: Spec, *, stream: bool = False, key: str = gateway_http.KEY) -> str:
        """The answer's text. Raises LlmosError of the reason that the edge gave."""


class OverGrpc:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = generation_service_pb2_grpc.GenerationServiceStub(channel)

    async def generate(self, spec: Spec, *, stream: bool = False, key: str = gateway_http.KEY) -> str:
        metadata = (("authorization", f"Bearer {key}"),)
        try:
            if not stream:
                whole = await self._stub.Generate(
                    generation_service_pb2.GenerateRequest(spec=_message(spec)), metadata=metadata
                )
                return whole.choices[0].text
            request = generation_service_pb2.StreamGenerateRequest(spec=_message(spec))
            return "".join(
                [event.delta.text async for event in self._stub.StreamGenerate(request, metadata=metadata)]
            )
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from error


class OverHttp:
    def __init__(self, url: str) -> None:
        self._url = url

    async def generate(self, spec: Spec, *, stream: bool = False, key: str = gateway_http.KEY) -> str:
        async with httpx.AsyncClient(timeout=10) as client:
            response = await client.post(
                f"{self._url}/v1/chat/completions",
                json=spec | {"stream": stream},
                headers={"authorization": f"Bearer {key}"},
            )
        if not stream or response.status_code != 200:
            body = response.json()
            if "error" in body:
                raise _error(body["error"])
            return str(body["choices"][0]["message"]["content"])
        text = ""
        for line in response.text.split("\n\n"):
            data = line.removeprefix("data: ")
            if data in ("", "[DONE]"):
                continue
            chunk = httpx.Response(200, text=data).json()
            if "error" in chunk:
                raise _error(chunk["error"])
            text += chunk["choices"][0]["delta"].get("content", "")
        return text


def _error(error: dict[str, str]) -> LlmosError:
    known = {"invalid_api_key": "CREDENTIAL_INVALID"}
    return errors.BY_REASON[known.get(error["code"], error["code"].upper())](error["message"])


def _message(spec: Spec) -> generation_pb2.GenerationSpec:
    message = generation_pb2.GenerationSpec(model=spec["model"])
    for given in spec["messages"]:
        added = message.prompt.chat.messages.add(role="ROLE_" + given["role"].upper())
        added.content.add(text=given["content"])
        added.tool_call_id = given.get("tool_call_id", "")
    message.prompt.chat.SetInParent()
    for name in _SAMPLING:
        if name in spec:
            setattr(message.sampling, name, spec[name])
    for token, bias in spec.get("logit_bias", {}).items():
        message.sampling.logit_bias[int(token)] = bias
    if "max_tokens" in spec:
        message.max_tokens = spec["max_tokens"]
    message.stop.extend(spec.get("stop", ()))
    message.stop_token_ids.extend(spec.get("stop_token_ids", ()))
    message.n = spec.get("n", 0)
    message.logprobs = spec.get("logprobs", False)
    message.top_logprobs = spec.get("top_logprobs", 0)
    message.end_user = spec.get("user", "")
    message.labels.update(spec.get("metadata", {}))
    for tool in spec.get("tools", ()):
        message.tools.add(name=tool["function"]["name"])
    if "response_format" in spec:
        message.response_format.json_object.SetInParent()
    return message


@asynccontextmanager
async def edge_of(kind: str, bench: Bench, folder: Path, **options: float) -> AsyncIterator[Edge]:
    if kind == "grpc":
        async with gateway_grpc.serving(bench, folder, **options) as channel:
            yield OverGrpc(channel)
    else:
        async with gateway_http.serving(bench, **options) as http:  # type: ignore[arg-type]
            yield OverHttp(http.url)


both = pytest.mark.parametrize("kind", ["grpc", "http"])


@both
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer(kind: str, stream: bool, tmp_path: Path) -> None:
    bench = Bench([FakeReplica(answer("Hel", "lo"))])
    async with edge_of(kind, bench, tmp_path) as edge:
        assert await edge.generate(HELLO, stream=stream) == "Hello"
    (ended,) = bench.audit.ended
    method = "StreamGenerate" if stream else "Generate"
    assert ended.facts.method == f"/llmos.gateway.v1.GenerationService/{method}"
    assert ended.facts.edge.name == kind.upper()
    assert ended.outcome is Outcome.SUCCEEDED


async def test_the_same_request_arrives(tmp_path: Path) -> None:
    spec = HELLO | {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "seed": 99,
        "logit_bias": {"3": 1.5, "2": -1},
        "max_tokens": 12,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "logprobs": True,
        "top_logprobs": 3,
        "user": "u",
        "metadata": {"k": "v"},
    }
    seen: list[ValidGeneration] = []
    for kind in ("grpc", "http"):
        replica = FakeReplica()
        async with edge_of(kind, Bench([replica]), tmp_path) as edge:
            await edge.generate(spec)
        seen += replica.requests
    assert seen[0] == seen[1]


TOOL_MESSAGE = {"role": "tool", "content": "x", "tool_call_id": "1"}
HOSTILE: list[tuple[str, Spec, type[LlmosError]]] = [
    ("temperature", {"temperature": 2.5}, errors.RequestInvalid),
    ("infinite", {"temperature": 1e300}, errors.RequestInvalid),
    ("negative top_p", {"top_p": -0.1}, errors.RequestInvalid),
    ("zero top_p", {"top_p": 0}, errors.RequestInvalid),
    ("huge top_k", {"top_k": 2_000_000}, errors.RequestInvalid),
    ("huge n", {"n": 1_000_000_000}, errors.RequestInvalid),
    ("100,000 stops", {"stop": ["x"] * 100_000}, errors.RequestInvalid),
    ("long stop", {"stop": ["x" * 300]}, errors.RequestInvalid),
    ("empty stop", {"stop": [""]}, errors.RequestInvalid),
    ("many stop ids", {"stop_token_ids": [1] * 65}, errors.RequestInvalid),
    ("many biases", {"logit_bias": {str(i): 1 for i in range(2000)}}, errors.RequestInvalid),
    ("wild bias", {"logit_bias": {"1": 1e9}}, errors.RequestInvalid),
    ("no tokens", {"max_tokens": 0}, errors.RequestInvalid),
    ("too many tokens", {"max_tokens": 100_000}, errors.RequestInvalid),
    ("top_logprobs alone", {"top_logprobs": 2}, errors.RequestInvalid),
    ("many logprobs", {"logprobs": True, "top_logprobs": 1000}, errors.RequestInvalid),
    ("no model", {"model": ""}, errors.RequestInvalid),
    ("long model", {"model": "m" * 200}, errors.RequestInvalid),
    ("unknown model", {"model": "other"}, errors.ModelNotFound),
    ("no messages", {"messages": []}, errors.RequestInvalid),
    ("5,000 messages", {"messages": HELLO["messages"] * 5000}, errors.RequestInvalid),
    ("long text", {"messages": [{"role": "user", "content": "x" * 1_100_000}]}, errors.RequestInvalid),
    ("long user", {"user": "u" * 200}, errors.RequestInvalid),
    ("many labels", {"metadata": {str(i): "" for i in range(17)}}, errors.RequestInvalid),
    ("tool role", {"messages": [TOOL_MESSAGE]}, errors.NotImplementedYet),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}, errors.NotImplementedYet),
    ("json", {"response_format": {"type": "json_object"}}, errors.NotImplementedYet),
]  # fmt: skip


@both
@pytest.mark.parametrize(("change", "error"), [pytest.param(*row[1:], id=row[0]) for row in HOSTILE])
async def test_r16_hostile_parameters_get_the_same_verdict(
    kind: str, change: Spec, error: type[LlmosError], tmp_path: Path
) -> None:
    bench = Bench([FakeReplica()])
    async with edge_of(kind, bench, tmp_path) as edge:
        with pytest.raises(error):
            await edge.generate(HELLO | change)
        with pytest.raises(error):
            await edge.generate(HELLO | change, stream=True)
    assert not bench.replicas[0].requests
    assert [(event.outcome, event.error_reason) for event in bench.audit.ended] == [
        (Outcome.REJECTED, error.reason)
    ] * 2


STARTED = EngineStarted("rev-1", 7, "replica-0")
FAULTS: list[tuple[list[Step], type[LlmosError]]] = [
    ([errors.ContextLengthExceeded("x")], errors.ContextLengthExceeded),
    ([errors.Overloaded("x")], errors.Overloaded),
    ([errors.ReplicaLost("x")], errors.ReplicaLost),
    ([STARTED, errors.EngineFault("x")], errors.EngineFault),
    ([STARTED, errors.ReplicaLost("x")], errors.ReplicaLost),
]


@both
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("script", "error"), FAULTS)
async def test_faults_get_the_same_reason(
    kind: str, stream: bool, script: list[Step], error: type[LlmosError], tmp_path: Path
) -> None:
    bench = Bench([FakeReplica(script)])
    async with edge_of(kind, bench, tmp_path) as edge:
        with pytest.raises(error):
            await edge.generate(HELLO, stream=stream)
    assert [event.error_reason for event in bench.audit.ended] == [error.reason]


@both
@pytest.mark.parametrize(
    ("key", "error", "outcomes"),
    [("bad", errors.CredentialInvalid, 0), ("nobody-key", errors.ScopeMissing, 1)],
)
async def test_credentials_get_the_same_verdict(
    kind: str, key: str, error: type[LlmosError], outcomes: int, tmp_path: Path
) -> None:
    bench = Bench([FakeReplica()])
    async with edge_of(kind, bench, tmp_path) as edge:
        with pytest.raises(error):
            await edge.generate(HELLO, key=key)
    assert len(bench.audit.ended) == outcomes


@both
@pytest.mark.parametrize("stream", [False, True])
async def test_r01_the_servers_cap_holds_on_both(kind: str, stream: bool, tmp_path: Path) -> None:
    bench = Bench([FakeReplica([STARTED, Gate()])])
    async with edge_of(kind, bench, tmp_path, max_call_s=0.3) as edge:
        with pytest.raises(errors.DeadlineExceeded):
            await edge.generate(HELLO, stream=stream)
    assert [event.error_reason for event in bench.audit.ended] == ["DEADLINE_EXCEEDED"]
    assert bench.replicas[0].closed == 1


@both
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refused", [False, True])
async def test_what_the_use_case_says_beside_the_answer_is_sent(
    kind: str, stream: bool, refused: bool, tmp_path: Path
) -> None:
    """`response_metadata`: headers on HTTP, trailing metadata on gRPC, of answers and of errors."""
    bench = Bench([FakeReplica([errors.Overloaded("x")] if refused else answer("Hi"))])

    async def link(call: Call, rest: Rest) -> None:
        current_record().response_metadata["x-test-left"] = "7"
        await rest(call)

    bench.extra_link = link
    if kind == "http":
        async with gateway_http.serving(bench) as http, httpx.AsyncClient() as client:
            headers = {"authorization": f"Bearer {gateway_http.KEY}"}
            url = f"{http.url}/v1/chat/completions"
            response = await client.post(url, json=HELLO | {"stream": stream}, headers=headers)
        assert response.headers["x-test-left"] == "7"
        return
    async with gateway_grpc.serving(bench, tmp_path) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        request: Any
        if stream:
            request = generation_service_pb2.StreamGenerateRequest(spec=_message(HELLO))
            events = stub.StreamGenerate(request, metadata=gateway_grpc.AUTH)
            with suppress(grpc.aio.AioRpcError):
                _ = [event async for event in events]
            trailers = await events.trailing_metadata()
        else:
            request = generation_service_pb2.GenerateRequest(spec=_message(HELLO))
            whole = stub.Generate(request, metadata=gateway_grpc.AUTH)
            trailers = await whole.trailing_metadata()
        assert dict(trailers)["x-test-left"] == "7"
