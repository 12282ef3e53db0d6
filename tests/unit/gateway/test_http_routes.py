"""Completions and responses, as bytes and as the `openai` package sees them."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from msgspec import json as strict_json
from openai.types import completion_create_params
from openai.types.responses import response_create_params

from services.gateway.generation import (
    Alternative,
    Delta,
    EngineStarted,
    Finished,
    FinishReason,
    Role,
    TokenLogprob,
    Usage,
)
from services.gateway.openai import chat, completions, responses
from services.gateway.openai.chat_answers import ChatCompletionChunk
from services.gateway.openai.completions_answers import Completion
from services.gateway.openai.responses_answers import Response
from services.mesh import errors
from services.mesh.events import Outcome
from tests.framework.gateway_fakes import Bench, FakeReplica, Step, answer
from tests.framework.gateway_http import KEY, HttpBench, serving

AUTH = {"authorization": f"Bearer {KEY}"}
STARTED = EngineStarted("rev-1", 7, "replica-0")
RESPONSE_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def logprobs(*tokens: bytes) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(Alternative(i, token, -0.5), (Alternative(i, token, -0.5), Alternative(99, b"z", -2)))
        for i, token in enumerate(tokens)
    )


async def post(http: HttpBench, path: str, body: dict[str, Any]) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.post(f"{http.url}{path}", json=body, headers=AUTH)


def events_of(text: str) -> list[tuple[str, Any]]:
    """(name, data) of each event; the text must be whole."""
    assert text.endswith("\n\n")
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        *names, data = event.split("\n")
        name = names[0].removeprefix("event: ") if names else ""
        payload = data.removeprefix("data: ")
        found.append((name, payload if payload == "[DONE]" else json.loads(payload)))
    return found


async def test_a_completion_goes_on_with_raw_text() -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench) as http, http.client() as client:
        found = await client.completions.create(model="echo-1", prompt=["Once"], max_tokens=5, user="u")
    (request,) = bench.replicas[0].requests
    assert (request.prompt.text, request.prompt.messages, request.max_tokens) == ("Once", (), 5)
    assert request.end_user == "u"
    assert (found.object, found.choices[0].text, found.choices[0].finish_reason) == (
        "text_completion",
        "Hello world",
        "stop",
    )
    assert found.id.startswith("cmpl-")
    assert found.usage
    assert found.usage.total_tokens == 9


async def test_a_streamed_completion_with_logprobs() -> None:
    """A character that two tokens share begins at one place, and moves the text on once."""
    script: list[Step] = [
        STARTED,
        Delta(1, 0, "a", (1,), logprobs(b"a")),
        Delta(2, 0, "", (2,), logprobs(b"\xe2\x98")),
        Delta(3, 0, "☃b", (3, 4), logprobs(b"\x83", b"b")),
        Finished((FinishReason.LENGTH,), Usage(7, 4)),
    ]
    bench = Bench([FakeReplica(script)])
    async with serving(bench) as http, http.client() as client:
        whole = await client.completions.create(model="echo-1", prompt="x", logprobs=2)
        stream = await client.completions.create(
            model="echo-1", prompt="x", logprobs=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert bench.replicas[0].requests[0].logprobs
    assert bench.replicas[0].requests[0].top_logprobs == 2
    found = whole.choices[0].logprobs
    assert found
    assert found.tokens == ["a", "�", "�", "b"]
    assert found.text_offset == [0, 1, 1, 2]
    assert found.token_logprobs == [-0.5] * 4
    assert found.top_logprobs
    assert found.top_logprobs[0] == {"a": -0.5, "z": -2.0}
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "a☃b"
    offsets = [c.choices[0].logprobs.text_offset for c in chunks[:-1] if c.choices[0].logprobs]
    assert [offset for each in offsets for offset in each or ()] == [0, 1, 1, 2]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.total_tokens == 11


async def test_a_response_echoes_what_it_was_asked() -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench) as http, http.client() as client:
        found = await client.responses.create(
            model="echo-1",
            instructions="Be brief.",
            input=[
                {"role": "user", "content": "a"},
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "b", "annotations": []}],
                },
                {"role": "developer", "content": [{"type": "input_text", "text": "c"}]},
            ],
            max_output_tokens=9,
            temperature=0.5,
            top_p=0.25,
            metadata={"team": "blue"},
            store=True,
            extra_body={"seed": 7, "stop": ["x"]},
        )
    (request,) = bench.replicas[0].requests
    assert [(m.role, m.parts) for m in request.prompt.messages] == [
        (Role.SYSTEM, ("Be brief.",)),
        (Role.USER, ("a",)),
        (Role.ASSISTANT, ("b",)),
        (Role.SYSTEM, ("c",)),
    ]
    assert (request.max_tokens, request.sampling.seed, request.stop) == (9, 7, ("x",))
    assert (found.status, found.output_text, found.store) == ("completed", "Hello world", False)
    assert (found.temperature, found.top_p, found.max_output_tokens) == (0.5, 0.25, 9)
    assert found.instructions == "Be brief."
    assert found.metadata == {"team": "blue"}
    assert found.usage
    assert (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens) == (7, 2, 9)
    assert found.usage.input_tokens_details.cached_tokens == 3


async def test_the_events_of_a_response_in_openais_order() -> None:
    bench = Bench([FakeReplica(answer("Hel", "lo"))])
    async with serving(bench) as http:
        response = await post(http, "/v1/responses", {"model": "echo-1", "input": "Hi", "stream": True})
    events = events_of(response.text)
    assert [name for name, _ in events] == RESPONSE_EVENTS
    assert all(data["type"] == name for name, data in events)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert [data["delta"] for name, data in events if name.endswith(".delta")] == ["Hel", "lo"]
    last = events[-1][1]["response"]
    assert last["output"] == [events[-2][1]["item"]]
    assert last["output"][0]["content"] == [events[-3][1]["part"]]
    assert last["output"][0]["content"][0]["text"] == events[-4][1]["text"] == "Hello"
    assert {data["item_id"] for _, data in events if "item_id" in data} == {last["output"][0]["id"]}
    first = events[0][1]["response"]
    assert (first["status"], first["usage"], first["output"]) == ("in_progress", None, [])
    strict_json.decode(json.dumps(last), type=Response)


async def test_a_response_that_was_cut_is_incomplete() -> None:
    bench = Bench([FakeReplica(answer("Hi", reason=FinishReason.LENGTH))])
    async with serving(bench) as http, http.client() as client:
        whole = await client.responses.create(model="echo-1", input="x", max_output_tokens=1)
        stream = await client.responses.create(model="echo-1", input="x", max_output_tokens=1, stream=True)
        types = [event.type async for event in stream]
    assert whole.status == "incomplete"
    assert whole.incomplete_details
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert types[-1] == "response.incomplete"


async def test_log_probabilities_of_a_response() -> None:
    script: list[Step] = [
        STARTED,
        Delta(1, 0, "a", (1,), logprobs(b"a")),
        Finished((FinishReason.STOP,), Usage(7, 1)),
    ]
    asked: dict[str, Any] = {"include": [responses.LOGPROBS], "top_logprobs": 2}
    async with serving(Bench([FakeReplica(script)])) as http:
        whole = (await post(http, "/v1/responses", {"model": "echo-1", "input": "x"} | asked)).json()
        streamed = await post(
            http, "/v1/responses", {"model": "echo-1", "input": "x", "stream": True} | asked
        )
    entries = whole["output"][0]["content"][0]["logprobs"]
    assert (entries[0]["token"], entries[0]["logprob"], len(entries[0]["top_logprobs"])) == ("a", -0.5, 2)
    events = dict(events_of(streamed.text))
    assert events["response.output_text.delta"]["logprobs"] == entries
    assert events["response.output_text.done"]["logprobs"] == entries


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_a_fault_in_the_middle_of_a_stream(path: str) -> None:
    bench = Bench([FakeReplica([STARTED, Delta(1, 0, "Hel", (1,)), errors.ReplicaLost("gone")])])
    key = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}.get(path, "input")
    value = [{"role": "user", "content": "x"}] if key == "messages" else "x"
    async with serving(bench) as http:
        response = await post(http, path, {"model": "echo-1", key: value, "stream": True})
    events = events_of(response.text)
    if path == "/v1/responses":
        assert [name for name, _ in events[-2:]] == ["error", "response.failed"]
        assert events[-2][1]["code"] == "replica_lost"
        failed = events[-1][1]["response"]
        assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
        assert failed["output"][0]["content"][0]["text"] == "Hel"
    else:
        assert events[-1][1]["error"]["code"] == "replica_lost"
    assert "[DONE]" not in response.text
    assert bench.audit.ended[0].outcome is Outcome.FAILED


async def test_the_chunks_have_the_documented_types() -> None:
    bench = Bench([FakeReplica(answer("a", "b"))])
    hello = {"model": "echo-1", "messages": [{"role": "user", "content": "x"}], "stream": True}
    raw = {"model": "echo-1", "prompt": "x", "stream": True}
    async with serving(bench) as http:
        chat = await post(http, "/v1/chat/completions", hello)
        older = await post(http, "/v1/completions", raw)
    for text, kind in ((chat.text, ChatCompletionChunk), (older.text, Completion)):
        chunks = [data for _, data in events_of(text) if data != "[DONE]"]
        assert chunks
        for chunk in chunks:
            strict_json.decode(json.dumps(chunk), type=kind)


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"prompt": ["a", "b"]}, "prompt"),
    ("completions", {"prompt": [1, 2]}, "prompt"),
    ("completions", {"prompt": [[1], [2]]}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": None}, "prompt"),
    ("completions", {"echo": True}, "echo"),
    ("completions", {"suffix": "x"}, "suffix"),
    ("completions", {"best_of": 3}, "best_of"),
    ("completions", {"logprobs": 21}, "logprobs"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"n": 9}, "n"),
    ("completions", {"stream_options": {}}, "stream_options"),
    ("completions", {"surprise": 1}, "surprise"),
    ("completions", {"temperature": 3}, "temperature"),
    ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
    ("responses", {"conversation": "c"}, "conversation"),
    ("responses", {"tools": [{"type": "web_search"}]}, "tools"),
    ("responses", {"background": True}, "background"),
    ("responses", {"reasoning": {"effort": "high"}}, "reasoning"),
    ("responses", {"truncation": "auto"}, "truncation"),
    ("responses", {"text": {"format": {"type": "json_object"}}}, "text.format"),
    ("responses", {"prompt": {"id": "p"}}, "prompt"),
    ("responses", {"include": ["x"]}, "include[0]"),
    ("responses", {"top_logprobs": 3}, "top_logprobs"),
    ("responses", {"max_output_tokens": 0}, "max_output_tokens"),
    ("responses", {"input": []}, "input"),
    ("responses", {"input": 5}, "input"),
    ("responses", {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}]},
     "input[0].type"),
    ("responses", {"input": [IMAGE]}, "input[0].content[0].type"),
    ("responses", {"input": [{"role": "alien", "content": "x"}]}, "input[0].role"),
    ("responses", {"input": [{"role": "user", "content": "x", "mood": 1}]}, "input[0].mood"),
    ("responses", {"input": [{"role": "user", "content": []}], "instructions": "i"}, "input[0]"),
    ("responses", {"instructions": "x" * 1_100_000}, "instructions"),
    ("responses", {"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include"),
    ("responses", {"metadata": {"k": "v" * 300}}, "metadata[k]"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "extra", "param"), REFUSALS)
async def test_refused_parameters_are_named(route: str, extra: dict[str, Any], param: str) -> None:
    bench = Bench([FakeReplica()])
    body = {"model": "echo-1", ("prompt" if route == "completions" else "input"): "x"} | extra
    async with serving(bench) as http, http.client() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.post(f"/{route}", cast_to=httpx.Response, body=body)
    assert (refused.value.param or "").startswith(param)
    assert not bench.replicas[0].requests
    assert [event.outcome for event in bench.audit.ended] == [Outcome.REJECTED]


async def test_harmless_parameters_pass() -> None:
    async with serving(Bench([FakeReplica()])) as http, http.client() as client:
        await client.completions.create(
            model="echo-1", prompt="x", echo=False, suffix="", best_of=1, n=1, logprobs=None
        )
        await client.responses.create(
            model="echo-1",
            input="x",
            background=False,
            include=["reasoning.encrypted_content"],
            max_tool_calls=3,
            parallel_tool_calls=True,
            prompt_cache_key="k",
            reasoning={"effort": "none"},
            safety_identifier="p",
            service_tier="auto",
            store=True,
            text={"format": {"type": "text"}},
            tool_choice="auto",
            tools=[],
            truncation="disabled",
        )


def test_every_parameter_of_the_client_is_decided() -> None:
    """A new version of the client with a new parameter makes this fail, not a caller's answer wrong."""
    for params, ours in (
        (completion_create_params.CompletionCreateParamsBase, completions.CompletionRequest),
        (response_create_params.ResponseCreateParamsBase, responses.ResponsesRequest),
    ):
        known = set(typing.get_type_hints(params)) | {"stream"}
        assert known <= set(ours.__struct_fields__)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_no_response_is_stored(method: str) -> None:
    async with serving(Bench([FakeReplica()])) as http, http.client() as client:
        call = client.responses.retrieve if method == "GET" else client.responses.delete
        with pytest.raises(openai.NotFoundError, match="stores none"):
            await call("resp_1")


async def test_embeddings_are_refused_as_on_grpc() -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench) as http:
        refused = await post(http, "/v1/embeddings", {"model": "echo-1", "input": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (501, "not_implemented")
    assert refused.headers["x-should-retry"] == "false"
    assert bench.audit.ended[0].facts.method == "/llmos.gateway.v1.EmbeddingService/Embed"


def test_the_guide_names_every_parameter() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "callers.md").read_text()
    for kind in (chat.ChatRequest, completions.CompletionRequest, responses.ResponsesRequest):
        missing = [name for name in kind.__struct_fields__ if f"`{name}" not in guide]
        assert not missing, kind
