"""What the HTTP edge refuses, and how its errors look to the real `openai` package."""

from __future__ import annotations

import httpx
import openai
import pytest

from services.gateway.generation import (
    Delta,
    EngineStarted,
)
from services.mesh import errors
from services.mesh.events import Outcome
from tests.framework.gateway_fakes import Bench, FakeReplica
from tests.framework.gateway_http import KEY, serving

HELLO = [{"role": "user", "content": "Hi"}]
NOT_YET = errors.NotImplementedYet("x", metadata={"field": "spec.n"})


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 1_000_000_000}, "n"),
        ({"n": 2**40}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ["x"] * 100_000}, "stop"),
        ({"stop": "x" * 300}, "stop[0]"),
        ({"logit_bias": {"1": 101}}, "logit_bias[1]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"surprise": 1}, "surprise"),
        ({"model": ""}, "model"),
        ({"metadata": {"k": "v" * 300}}, "metadata[k]"),
    ],
)  # fmt: skip
async def test_refused_parameters_are_named(extra: dict[str, object], param: str) -> None:
    bench = Bench([FakeReplica()])
    body = {"model": "echo-1", "messages": HELLO} | extra
    async with serving(bench) as http, http.client() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.post("/chat/completions", cast_to=httpx.Response, body=body)
    assert isinstance(refused.value.body, dict)
    assert set(refused.value.body) == {"message", "type", "param", "code"}
    assert refused.value.body["type"] == "invalid_request_error"
    # Rules that hold for several fields together name none of them.
    assert (refused.value.body["param"] or "").startswith(
        param if param not in ("top_logprobs", "messages[0]") else ""
    )
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert not bench.replicas[0].requests
    assert [event.outcome for event in bench.audit.ended] == [Outcome.REJECTED]
    assert not bench.audit.started


@pytest.mark.parametrize(
    ("error", "kind", "code", "should_retry"),
    [
        (errors.ContextLengthExceeded("x"), openai.BadRequestError, "context_length_exceeded", "false"),
        (errors.ModelNotFound("x"), openai.NotFoundError, "model_not_found", "false"),
        (errors.Overloaded("x"), openai.RateLimitError, "overloaded", "true"),
        (errors.BudgetExhausted("x"), openai.RateLimitError, "insufficient_quota", "false"),
        (errors.IdempotencyMismatch("x"), openai.UnprocessableEntityError, "idempotency_mismatch", "false"),
        (errors.EngineFault("x"), openai.InternalServerError, "engine_fault", "false"),
        (errors.ReplicaLost("x"), openai.InternalServerError, "replica_lost", "true"),
        (errors.DeadlineExceeded("x"), openai.InternalServerError, "deadline_exceeded", "false"),
        (NOT_YET, openai.BadRequestError, "not_implemented", "false"),
    ],
)  # fmt: skip
async def test_errors_are_the_clients_classes(
    error: errors.LlmosError, kind: type[openai.APIStatusError], code: str, should_retry: str
) -> None:
    bench = Bench([FakeReplica([error])])
    async with serving(bench) as http, http.client() as client:
        with pytest.raises(kind) as raised:
            await client.chat.completions.create(model="echo-1", messages=HELLO)
    assert raised.value.code == code
    headers = raised.value.response.headers
    assert headers["x-should-retry"] == should_retry
    assert headers["x-request-id"] == bench.audit.ended[0].facts.request_id
    if error.retryable:
        assert int(headers["retry-after-ms"]) == 1000
        assert int(headers["retry-after"]) == 1


async def test_an_internal_error_says_nothing_of_our_insides() -> None:
    async with (
        serving(Bench([FakeReplica([errors.Internal("secret detail")])])) as http,
        http.client() as client,
    ):
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model="echo-1", messages=HELLO)
    assert "secret detail" not in str(raised.value)


async def test_an_error_in_the_middle_of_a_stream() -> None:
    script = [EngineStarted("rev-1", 7, "r"), Delta(1, 0, "Hel", (1,)), errors.EngineFault("broken")]
    bench = Bench([FakeReplica(script)])
    async with serving(bench) as http, http.client() as client:
        stream = await client.chat.completions.create(model="echo-1", messages=HELLO, stream=True)
        first, second = await anext(stream), await anext(stream)
        with pytest.raises(openai.APIError) as raised:
            await anext(stream)
    assert (first.choices[0].delta.role, second.choices[0].delta.content) == ("assistant", "Hel")
    assert raised.value.code == "engine_fault"
    assert bench.audit.ended[0].outcome is Outcome.FAILED


async def test_credentials() -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench) as http:
        with pytest.raises(openai.AuthenticationError) as wrong:
            await http.client("wrong").chat.completions.create(model="echo-1", messages=HELLO)
        with pytest.raises(openai.PermissionDeniedError):
            await http.client("nobody-key").chat.completions.create(model="echo-1", messages=HELLO)
        async with httpx.AsyncClient() as client:
            missing = await client.get(f"{http.url}/v1/models")
            header = ("authorization", f"Bearer {KEY}")
            doubled = await client.get(f"{http.url}/v1/models", headers=[header, header])
            assert doubled.status_code == 401
    assert wrong.value.response.headers["www-authenticate"] == "Bearer"
    assert wrong.value.code == missing.json()["error"]["code"] == "invalid_api_key"
    assert missing.status_code == 401
    assert [event.error_reason for event in bench.audit.ended] == ["SCOPE_MISSING"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/echo-1", 405),
        ("POST", "/healthz", 405),
    ],
)
async def test_what_http_refuses_has_the_form_of_an_error(method: str, path: str, status: int) -> None:
    async with serving(Bench([FakeReplica()])) as http, httpx.AsyncClient() as client:
        response = await client.request(method, http.url + path, headers={"authorization": f"Bearer {KEY}"})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
