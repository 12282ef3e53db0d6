"""The HTTP edge, as the real `openai` package sees it."""

from __future__ import annotations

import asyncio
import inspect
import json
import typing

import httpx
import openai
import pytest
from openai.types.chat import completion_create_params

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
from services.gateway.openai import chat as ours
from services.mesh.events import Edge, Outcome
from tests.framework.gateway_fakes import Bench, FakeReplica, Gate, answer
from tests.framework.gateway_http import KEY, serving
from tests.framework.waiting import eventually

HELLO = [{"role": "user", "content": "Hi"}]
TIMEOUT_S = 5


async def test_a_plain_answer() -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench) as http, http.client() as client:
        raw = await client.chat.completions.with_raw_response.create(model="echo-1", messages=HELLO)
        found = raw.parse()
    assert found.choices[0].message.content == "Hello world"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "stop"
    assert found.usage
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (7, 2, 9)
    assert found.usage.prompt_tokens_details
    assert found.usage.prompt_tokens_details.cached_tokens == 3
    assert found.model == "echo-1"
    assert found.system_fingerprint == "rev-1"
    request_id = raw.headers["x-request-id"]
    assert found.id == f"chatcmpl-{request_id.removeprefix('req_')}"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    ended = bench.audit.ended[0]
    assert (ended.facts.request_id, ended.facts.edge, ended.outcome) == (
        request_id,
        Edge.HTTP,
        Outcome.SUCCEEDED,
    )
    assert ended.facts.method == "/llmos.gateway.v1.GenerationService/Generate"


async def test_a_streamed_answer() -> None:
    bench = Bench([FakeReplica(answer("Hel", "", "lo ☃"))])
    async with serving(bench) as http, http.client() as client:
        stream = await client.chat.completions.create(
            model="echo-1", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello ☃"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.total_tokens == 10
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert bench.audit.ended[0].facts.method == "/llmos.gateway.v1.GenerationService/StreamGenerate"


async def test_the_bytes_of_a_stream() -> None:
    bench = Bench([FakeReplica(answer("Hi"))])
    body = {"model": "echo-1", "messages": HELLO, "stream": True}
    async with serving(bench) as http, httpx.AsyncClient() as client:
        response = await client.post(
            f"{http.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}
        )
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in response.headers
    events = response.text.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    parsed = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [chunk["choices"][0]["delta"] for chunk in parsed] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hi"},
        {},
    ]
    assert all("usage" not in chunk for chunk in parsed)


async def test_several_choices_and_logprobs() -> None:
    chosen = Alternative(5, b"\xe2", -0.5)
    logprobs = (TokenLogprob(chosen, (chosen, Alternative(6, b"b", float("-inf")))),)
    script = [
        EngineStarted("rev-1", 7, "replica-0"),
        Delta(1, 1, "B", (5,), logprobs),
        Delta(2, 0, "A", (6,), logprobs),
        Finished((FinishReason.STOP, FinishReason.LENGTH), Usage(7, 2)),
    ]
    bench = Bench([FakeReplica(script)])
    async with serving(bench) as http, http.client() as client:
        found = await client.chat.completions.create(
            model="echo-1", messages=HELLO, n=2, logprobs=True, top_logprobs=2
        )
        stream = await client.chat.completions.create(
            model="echo-1", messages=HELLO, n=2, logprobs=True, top_logprobs=2, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert [(c.index, c.message.content, c.finish_reason) for c in found.choices] == [
        (0, "A", "stop"),
        (1, "B", "length"),
    ]
    assert found.choices[0].logprobs
    assert found.choices[0].logprobs.content
    entry = found.choices[0].logprobs.content[0]
    assert (entry.token, entry.bytes, entry.logprob) == ("�", [0xE2], -0.5)
    assert entry.top_logprobs[1].logprob == -9999.0
    assert [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks[:2]] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    assert chunks[2].choices[0].logprobs
    assert chunks[2].choices[0].index == 1


OURS = {"top_k": 3, "min_p": 0.5, "repetition_penalty": 2, "ignore_eos": True, "stop_token_ids": [2]}


async def test_parameters_arrive() -> None:
    replica = FakeReplica()
    async with serving(Bench([replica])) as http, http.client() as client:
        await client.chat.completions.create(
            model="echo-1",
            messages=[
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d", "name": "eve"},
            ],
            temperature=0.5,
            top_p=0.25,
            presence_penalty=1,
            frequency_penalty=-1,
            logit_bias={"7": -100},
            seed=-1,
            max_completion_tokens=9,
            stop="x",
            user="person-1",
            metadata={"team": "blue"},
            extra_body=OURS,
        )
        await client.chat.completions.create(
            model="echo-1", messages=HELLO, max_tokens=3, stop=["a", "b"], seed=7
        )
    first, second = replica.requests
    assert [(m.role, m.parts, m.name) for m in first.prompt.messages] == [
        (Role.SYSTEM, ("Be brief.",), ""),
        (Role.USER, ("a", "b"), ""),
        (Role.ASSISTANT, ("c",), ""),
        (Role.USER, ("d",), "eve"),
    ]
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 3, 0.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 2)
    assert sampling.logit_bias == ((7, -100.0),)
    assert sampling.seed == 2**64 - 1
    assert (first.max_tokens, first.stop, first.ignore_eos, first.stop_token_ids) == (9, ("x",), True, (2,))
    assert (first.end_user, dict(first.labels)) == ("person-1", {"team": "blue"})
    assert (second.max_tokens, second.stop, second.sampling.seed) == (3, ("a", "b"), 7)


async def test_a_seed_is_assigned_and_differs() -> None:
    replica = FakeReplica()
    async with serving(Bench([replica])) as http, http.client() as client:
        for _ in range(2):
            await client.chat.completions.create(model="echo-1", messages=HELLO)
    seeds = {request.sampling.seed for request in replica.requests}
    assert len(seeds) == 2
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_harmless_parameters_pass() -> None:
    async with serving(Bench([FakeReplica()])) as http, http.client() as client:
        await client.chat.completions.create(
            model="echo-1",
            messages=HELLO,
            store=True,
            service_tier="auto",
            parallel_tool_calls=True,
            prompt_cache_key="x",
            safety_identifier="p",
            response_format={"type": "text"},
            tool_choice="none",
            modalities=["text"],
            reasoning_effort="none",
            tools=[],
            n=1,
            logprobs=False,
        )


def test_every_parameter_of_the_client_is_decided() -> None:
    """A new version of the client with a new parameter makes this fail, not a caller's answer wrong."""
    known = set(typing.get_type_hints(completion_create_params.CompletionCreateParamsBase)) | {"stream"}
    assert known <= set(ours.ChatRequest.__struct_fields__)
    assert set(ours.REFUSED) | ours.TOLERATED <= set(inspect.get_annotations(ours.ChatRequest))


async def test_models() -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench) as http, http.client() as client:
        assert [model.id async for model in client.models.list()] == ["echo-1"]
        assert (await client.models.retrieve("echo-1")).owned_by == "llmos"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("a/b")
    assert [event.outcome for event in bench.audit.ended] == [
        Outcome.SUCCEEDED,
        Outcome.SUCCEEDED,
        Outcome.REJECTED,
    ]


async def test_health() -> None:
    async with serving(Bench([FakeReplica()])) as http, httpx.AsyncClient(base_url=http.url) as client:
        assert (await client.get("/healthz")).status_code == 200
        waiting = await client.get("/readyz")
        assert (waiting.status_code, waiting.json()["waiting_for"]) == (503, ["start"])
        await http.health.started()
        assert (await client.get("/readyz")).status_code == 200
        await http.health.drain()
        assert (await client.get("/readyz")).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_r02_a_caller_that_leaves_ends_the_work(stream: bool) -> None:
    gate = Gate()
    script = [EngineStarted("rev-1", 7, "r"), Delta(1, 0, "Hel", (1,)), gate]
    bench = Bench([FakeReplica(script)])
    body = {"model": "echo-1", "messages": HELLO, "stream": stream}
    async with serving(bench) as http, http.client() as client:
        call = asyncio.create_task(client.post("/chat/completions", cast_to=httpx.Response, body=body))
        await asyncio.wait_for(gate.reached.wait(), TIMEOUT_S)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await client.close()
        await eventually(lambda: bench.audit.ended, timeout_s=TIMEOUT_S)
        assert len(http.running) == 0
    ended = bench.audit.ended[0]
    assert (ended.outcome, ended.error_reason, ended.usage.completion_tokens) == (
        Outcome.CANCELLED,
        "CANCELLED",
        # What comes in one piece is counted when it has come.
        1 if stream else 0,
    )
    assert bench.replicas[0].closed == 1
    assert bench.admission.running == 0


async def test_r01_the_servers_cap_holds_without_a_deadline() -> None:
    gate = Gate()
    bench = Bench([FakeReplica([gate])])
    async with serving(bench, max_call_s=0.3) as http, http.client() as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model="echo-1", messages=HELLO)
    assert raised.value.status_code == 504
    assert bench.audit.ended[0].error_reason == "DEADLINE_EXCEEDED"
    assert bench.replicas[0].closed == 1


async def test_a_drain_lets_streams_finish_and_cuts_off_the_rest() -> None:
    gate = Gate()
    bench = Bench([FakeReplica([EngineStarted("rev-1", 7, "r"), gate, *answer("Hi")[1:]])])
    async with serving(bench) as http, http.client() as client:
        stream = await client.chat.completions.create(model="echo-1", messages=HELLO, stream=True)
        await asyncio.wait_for(gate.reached.wait(), TIMEOUT_S)
        draining = asyncio.create_task(http.server.drain(TIMEOUT_S))
        gate.open.set()
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        await asyncio.wait_for(draining, TIMEOUT_S)
        assert text == "Hi"
        with pytest.raises(openai.APIConnectionError):
            await client.models.list()

    gate = Gate()
    bench = Bench([FakeReplica([EngineStarted("rev-1", 7, "r"), gate])])
    async with serving(bench) as http, http.client() as client:
        stream = await client.chat.completions.create(model="echo-1", messages=HELLO, stream=True)
        await asyncio.wait_for(gate.reached.wait(), TIMEOUT_S)
        await asyncio.wait_for(http.server.drain(0), TIMEOUT_S)
        with pytest.raises(openai.APIError) as raised:
            _ = [chunk async for chunk in stream]
    assert raised.value.code == "draining"
    assert (bench.audit.ended[0].outcome, bench.audit.ended[0].error_reason) == (Outcome.FAILED, "DRAINING")
