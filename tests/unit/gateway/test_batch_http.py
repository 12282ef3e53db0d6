"""Files and batches over HTTP, as the official package sees them and as it does not send them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import openai
import pytest

from services.gateway.http_protocol import HttpLimits
from services.mesh.events import Outcome
from tests.framework.batches import line
from tests.framework.gateway_fakes import KEY, Bench, FakeReplica
from tests.framework.gateway_http import LIMITS, HttpBench, serving
from tests.framework.gateway_jobs import JobBench

AUTH = {"authorization": f"Bearer {KEY}"}
INPUT = line("a") + line("b")


@pytest.fixture
async def http() -> AsyncIterator[HttpBench]:
    async with serving(Bench([FakeReplica()])) as found:
        yield found


async def test_a_file_from_upload_to_delete(http: HttpBench) -> None:
    async with http.client() as client:
        made = await client.files.create(
            file=("in put.jsonl", INPUT),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 7200},
        )
        assert (made.object, made.bytes, made.filename) == ("file", len(INPUT), "in put.jsonl")
        assert (made.purpose, made.status) == ("batch", "processed")
        assert made.expires_at is not None
        assert abs(made.expires_at - made.created_at - 7200) <= 1
        assert await client.files.retrieve(made.id) == made
        assert (await client.files.content(made.id)).content == INPUT
        other = await client.files.create(file=b"", purpose="batch")
        assert [file.id async for file in client.files.list(limit=1, order="asc")] == [made.id, other.id]
        assert (await client.files.list(purpose="batch_output")).data == []
        assert (await client.files.list(purpose="vision")).data == []
        gone = await client.files.delete(made.id)
        assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                await call(made.id)
    outcomes = [event.outcome for event in http.bench.audit.ended]
    assert (len(outcomes), outcomes.count(Outcome.SUCCEEDED)) == (12, 9), outcomes


async def test_a_batch_taken_looked_at_listed_and_cancelled(http: HttpBench) -> None:
    async with http.client() as client:
        file = await client.files.create(file=("in.jsonl", INPUT), purpose="batch")
        made = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"team": "blue"},
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert (made.object, made.status, made.input_file_id) == ("batch", "validating", file.id)
        assert (made.endpoint, made.completion_window) == ("/v1/chat/completions", "24h")
        assert made.metadata == {"team": "blue"}
        assert made.expires_at == made.created_at + 86_400
        assert await client.batches.retrieve(made.id) == made
        assert [batch.id async for batch in client.batches.list(limit=1)] == [made.id]
        assert (await client.batches.cancel(made.id)).status == "cancelling"
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve("batch_none")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"other": 1}, "other"),
    ],
)
async def test_a_batch_that_is_wrong(http: HttpBench, change: dict[str, object], param: str) -> None:
    async with http.client() as client:
        file = await client.files.create(file=("in.jsonl", INPUT), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"} | change
    async with httpx.AsyncClient() as plain:
        response = await plain.post(f"{http.url}/v1/batches", json=body, headers=AUTH)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


PURPOSE = ("purpose", (None, b"batch"))
FILE = ("file", ("a.jsonl", INPUT))


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ([FILE], "purpose"),
        ([PURPOSE], "file"),
        ([("purpose", (None, b"fine-tune")), FILE], "purpose"),
        ([FILE, ("purpose", (None, b"fine-tune"))], "purpose"),
        ([PURPOSE, FILE, FILE], "file"),
        ([PURPOSE, ("other", (None, b"1")), FILE], "other"),
        ([PURPOSE, FILE, ("expires_after[anchor]", (None, b"now"))], "expires_after.anchor"),
        (
            [
                PURPOSE,
                FILE,
                ("expires_after[anchor]", (None, b"created_at")),
                ("expires_after[seconds]", (None, b"10")),
            ],
            "expires_after.seconds",
        ),
        ([("purpose", (None, b"x" * 300)), FILE], "purpose"),
    ],
)
async def test_a_form_that_is_wrong_leaves_no_file(
    http: HttpBench, form: list[tuple[str, tuple[str | None, bytes]]], param: str
) -> None:
    async with httpx.AsyncClient(headers=AUTH) as plain:
        response = await plain.post(f"{http.url}/v1/files", files=form)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
        assert (await plain.get(f"{http.url}/v1/files")).json()["data"] == []


async def test_fields_may_come_after_the_file(http: HttpBench) -> None:
    fields = [
        FILE,
        ("expires_after[seconds]", (None, b"3600")),
        ("expires_after[anchor]", (None, b"created_at")),
        PURPOSE,
    ]
    async with httpx.AsyncClient(headers=AUTH) as plain:
        made = (await plain.post(f"{http.url}/v1/files", files=fields)).json()
        assert abs(made["expires_at"] - made["created_at"] - 3600) <= 1
        assert (await plain.get(f"{http.url}/v1/files/{made['id']}/content")).content == INPUT


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"content-type": "application/json"}, b"{}", 415),
        ({"content-type": "multipart/form-data"}, b"x", 415),
        ({"content-type": "multipart/form-data; boundary=x", "content-encoding": "gzip"}, b"x", 415),
        ({"content-type": "multipart/form-data; boundary=x"}, b"nothing of a form", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n" + b"a" * 9000, 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x--\r\n", 400),
    ],
)
async def test_a_body_that_is_no_form(
    http: HttpBench, headers: dict[str, str], content: bytes, status: int
) -> None:
    async with httpx.AsyncClient(headers=AUTH) as plain:
        response = await plain.post(f"{http.url}/v1/files", content=content, headers=headers)
    assert response.status_code == status, response.text


async def test_a_file_that_is_too_large_is_refused_in_a_sentence() -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench, jobs=JobBench(bench, files_max_bytes=100_000)) as http, http.client() as client:
        await client.files.create(file=bytes(100_000), purpose="batch")
        for size in (100_001, 180_000, 2_000_000):
            with pytest.raises(openai.APIStatusError) as caught:
                await client.files.create(file=bytes(size), purpose="batch")
            assert caught.value.status_code == 413
        assert len((await client.files.list()).data) == 1


async def test_r21_an_upload_may_be_slow_once_the_caller_is_known_and_not_before() -> None:
    limits: HttpLimits = replace(LIMITS, receive_timeout_s=0.4)
    bench = Bench([FakeReplica()])
    form = httpx.Request("POST", "http://x", files=[PURPOSE, FILE])
    content = form.read()

    async def slowly() -> AsyncIterator[bytes]:
        for at in range(0, len(content), 100):
            yield content[at : at + 100]
            await asyncio.sleep(0.12)

    headers = {"content-type": form.headers["content-type"], "content-length": str(len(content))}

    async def status(http: HttpBench, credential: dict[str, str]) -> int | None:
        """None where the connection was cut off before the caller had sent all and read the answer."""
        async with httpx.AsyncClient(headers=headers | credential) as plain:
            try:
                return (await plain.post(f"{http.url}/v1/files", content=slowly())).status_code
            except httpx.TransportError:
                return None

    async with serving(bench, limits=limits) as http:
        assert await status(http, AUTH) == 200
        assert await status(http, {}) in (401, None)
    bench = Bench([FakeReplica()])
    jobs = JobBench(bench, files_upload_timeout_s=0.3)
    async with serving(bench, limits=limits, jobs=jobs) as http:
        assert await status(http, AUTH) in (408, None)
    assert jobs.blobs.held == {}


async def test_a_file_that_is_damaged_is_not_taken_for_whole() -> None:
    bench = Bench([FakeReplica()])
    jobs = JobBench(bench)
    async with serving(bench, jobs=jobs) as http, http.client() as client:
        made = await client.files.create(file=bytes(3 * 1024 * 1024), purpose="batch")
        ((place, stored),) = jobs.blobs.held.items()
        jobs.blobs.held[place] = stored[:-100] + bytes([stored[-100] ^ 1]) + stored[-99:]
        async with httpx.AsyncClient(headers=AUTH) as plain:
            with pytest.raises(httpx.RemoteProtocolError):
                await plain.get(f"{http.url}/v1/files/{made.id}/content")
            jobs.blobs.held[place] = stored[:500] + bytes([stored[500] ^ 1]) + stored[501:]
            response = await plain.get(f"{http.url}/v1/files/{made.id}/content")
            assert (response.status_code, response.json()["error"]["code"]) == (500, "data_corrupt")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "order=up", "other=1", "after=%ff", "limit=1&limit=2"]
)
async def test_a_query_that_is_wrong(http: HttpBench, query: str) -> None:
    async with httpx.AsyncClient(headers=AUTH) as plain:
        response = await plain.get(f"{http.url}/v1/files?{query}")
    assert response.status_code == 400, response.text


async def test_without_a_key_of_the_deployment_there_are_no_files() -> None:
    from services.gateway.jobs.seals import NoSeals

    bench = Bench([FakeReplica()])
    async with serving(bench, jobs=JobBench(bench, seals=NoSeals())) as http, http.client() as client:
        with pytest.raises(openai.UnprocessableEntityError, match="payload key"):
            await client.files.create(file=INPUT, purpose="batch")
    assert json.dumps([event.error_reason for event in bench.audit.ended]) == '["STATE_CONFLICT"]'
