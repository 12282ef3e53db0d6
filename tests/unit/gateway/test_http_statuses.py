"""What the HTTP edge refuses for the form of a request alone, who may call it from a page, and deadlines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import httpx
import pytest

from services.gateway.settings import GatewaySettings
from services.mesh.events import Outcome
from tests.framework.gateway_fakes import Bench, FakeReplica, Gate
from tests.framework.gateway_http import KEY, MAX_BODY_BYTES, serving

AUTH = {"authorization": f"Bearer {KEY}"}
BODY = json.dumps({"model": "echo-1", "messages": [{"role": "user", "content": "Hi"}]}).encode()
CHAT = "/v1/chat/completions"
PAGE = "https://chat.example"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 200),
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ('Application/JSON;charset="UTF-8"', 200),
        ("application/vnd.api+json", 200),
        ("application/json; charset=utf-16", 415),
        ("application/jsonp", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
async def test_the_type_of_a_body(content_type: str | None, status: int) -> None:
    bench = Bench([FakeReplica()])
    headers = AUTH if content_type is None else AUTH | {"content-type": content_type}
    async with serving(bench) as http, httpx.AsyncClient(base_url=http.url) as client:
        response = await client.post(CHAT, content=BODY, headers=headers)
    assert response.status_code == status
    assert [event.outcome for event in bench.audit.ended] == [
        Outcome.SUCCEEDED if status == 200 else Outcome.REJECTED
    ]
    if status != 200:
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert "content-type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br", 415), ("identity", 200)])
async def test_a_compressed_body_is_not_read(encoding: str, status: int) -> None:
    bench = Bench([FakeReplica()])
    body = gzip.compress(BODY) if encoding == "gzip" else BODY
    headers = AUTH | {"content-type": "application/json", "content-encoding": encoding}
    async with serving(bench) as http, httpx.AsyncClient(base_url=http.url) as client:
        response = await client.post(CHAT, content=body, headers=headers)
        assert response.status_code == status
        # The connection goes on: what was sent has been read.
        assert (await client.get("/v1/models", headers=AUTH)).status_code == 200
    if status == 415:
        assert "compressed" in response.json()["error"]["message"]


async def test_a_body_that_is_too_large_is_413_whatever_its_type() -> None:
    async with serving(Bench([FakeReplica()])) as http, httpx.AsyncClient(base_url=http.url) as client:
        response = await client.post("/v1/responses", content=b"x" * (MAX_BODY_BYTES + 1), headers=AUTH)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "message_too_large")


async def test_a_method_that_a_route_does_not_take_names_those_that_it_does() -> None:
    async with serving(Bench([FakeReplica()])) as http, httpx.AsyncClient(base_url=http.url) as client:
        for path, allowed in (
            (CHAT, "POST"),
            ("/v1/models", "GET, HEAD"),
            ("/v1/responses/x", "DELETE, GET"),
        ):
            response = await client.patch(path, headers=AUTH)
            assert response.status_code == 405
            assert set(allowed.split(", ")) <= set(response.headers["allow"].split(", "))
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "9" * 10, "1, 2", "\u0663"])
async def test_a_timeout_that_is_none_is_refused_by_name(value: str) -> None:
    bench = Bench([FakeReplica()])
    headers = {**AUTH, "x-request-timeout-ms": value.encode()}
    async with serving(bench) as http, httpx.AsyncClient(base_url=http.url) as client:
        response = await client.post(CHAT, content=BODY, headers=headers)  # type: ignore[arg-type]
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout-ms")
    assert not bench.replicas[0].requests
    assert [event.outcome for event in bench.audit.ended] == [Outcome.REJECTED]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
async def test_r01_a_callers_timeout_ends_the_work(path: str) -> None:
    bench = Bench([FakeReplica([Gate()])])
    body = {"model": "echo-1", "messages": [{"role": "user", "content": "Hi"}]}
    if path != CHAT:
        body = {"model": "echo-1", "prompt" if "completions" in path else "input": "Hi"}
    headers = AUTH | {"x-request-timeout-ms": "200"}
    async with serving(bench) as http, httpx.AsyncClient(base_url=http.url) as client:
        response = await client.post(path, json=body, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert bench.replicas[0].closed == 1
    assert bench.audit.ended[0].error_reason == "DEADLINE_EXCEEDED"


async def test_no_page_may_call_unless_it_is_allowed() -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    async with serving(Bench([FakeReplica()])) as http, httpx.AsyncClient(base_url=http.url) as client:
        assert (await client.options(CHAT, headers=asked)).status_code == 405
        response = await client.get("/v1/models", headers=AUTH | {"origin": PAGE})
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [{PAGE}, {"*"}, {"https://other.example"}])
async def test_pages_that_are_allowed(origins: set[str]) -> None:
    """A preflight needs no credential; a browser's own credentials are never allowed."""
    preflight = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, x-stainless-os",
    }
    allowed = "https://other.example" not in origins
    said = None if not allowed else PAGE if PAGE in origins else "*"
    bench = Bench([FakeReplica()])
    async with (
        serving(bench, cors_origins=frozenset(origins)) as http,
        httpx.AsyncClient(base_url=http.url) as client,
    ):
        asked = await client.options(CHAT, headers=preflight)
        assert asked.status_code == (204 if allowed else 403)
        assert not bench.audit.ended
        answers = [
            asked,
            await client.post(CHAT, content=BODY, headers=AUTH | {"origin": PAGE}),
            await client.post(CHAT, content=BODY, headers={"origin": PAGE}),
            await client.get("/nowhere", headers={"origin": PAGE}),
        ]
        without = await client.post(CHAT, content=BODY, headers=AUTH)
    assert [answer.status_code for answer in answers[1:]] == [200, 401, 404]
    for answer in answers:
        assert answer.headers.get("access-control-allow-origin") == said
        assert "access-control-allow-credentials" not in answer.headers
    assert "access-control-allow-origin" not in without.headers
    if allowed:
        assert "authorization" in asked.headers["access-control-allow-headers"]
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "x-request-id" in answers[1].headers["access-control-expose-headers"]
        assert answers[1].headers.get("vary") == ("origin" if PAGE in origins else None)


@pytest.mark.parametrize(
    "origin", ["chat.example", "https://chat.example/", "https://a b", "ftp://x", "null"]
)
def test_an_origin_that_is_none_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ValueError, match="is not an origin"):
        GatewaySettings(http_cors_origins=(origin,), service_secret_file=Path("secret"))
