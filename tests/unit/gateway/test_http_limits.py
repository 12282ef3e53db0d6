"""What a connection may cost: its head, its body, its time, its number, and a reader that does not read."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest

from services.gateway.generation import Delta, EngineStarted, Finished, FinishReason, Usage
from services.mesh.events import Outcome
from tests.framework.gateway_fakes import Bench, FakeReplica, Gate, Step
from tests.framework.gateway_http import KEY, LIMITS, MAX_BODY_BYTES, HttpBench, serving
from tests.framework.waiting import eventually

TIMEOUT_S = 10
AUTH = {"authorization": f"Bearer {KEY}"}
BODY = {"model": "echo-1", "messages": [{"role": "user", "content": "Hi"}]}


@asynccontextmanager
async def connection(http: HttpBench) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def refusal(reader: asyncio.StreamReader) -> tuple[int, dict[str, object]]:
    """The status and the error that the connection ends with."""
    data = await asyncio.wait_for(reader.read(), TIMEOUT_S)
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


async def test_r14_a_head_that_dribbles_in_is_cut_off_and_others_are_unhurt() -> None:
    bench = Bench([FakeReplica()])
    async with (
        serving(bench, limits=replace(LIMITS, receive_timeout_s=0.5)) as http,
        connection(http) as (reader, writer),
    ):
        ended = asyncio.create_task(refusal(reader))
        begun_s = time.monotonic()
        for byte in b"GET /v1/models HT":
            # What comes after the end resets the connection, and the answer with it.
            if time.monotonic() - begun_s > 0.4:
                break
            writer.write(bytes([byte]))
            await writer.drain()
            async with http.client() as client:
                await client.models.list()
        assert (await ended)[0] == 408


async def test_r14_a_body_that_does_not_come_is_cut_off_and_recorded() -> None:
    bench = Bench([FakeReplica()])
    async with (
        serving(bench, limits=replace(LIMITS, receive_timeout_s=0.3)) as http,
        connection(http) as (reader, writer),
    ):
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        writer.write((head + "content-length: 100\r\n\r\n{").encode())
        assert (await refusal(reader))[0] == 408
        await eventually(lambda: bench.audit.ended, timeout_s=TIMEOUT_S)
    assert bench.audit.ended[0].outcome is Outcome.CANCELLED


async def test_r14_a_long_answer_outlives_the_receive_deadline() -> None:
    gate = Gate()
    script = [EngineStarted("rev-1", 1, "r"), gate, Finished((FinishReason.STOP,), Usage())]
    bench = Bench([FakeReplica(script)])
    limits = replace(LIMITS, receive_timeout_s=0.2, idle_timeout_s=1)
    async with serving(bench, limits=limits) as http, httpx.AsyncClient() as client:
        url = f"{http.url}/v1/chat/completions"
        call = asyncio.create_task(client.post(url, json=BODY | {"stream": True}, headers=AUTH))
        await asyncio.wait_for(gate.reached.wait(), TIMEOUT_S)
        # Longer than every deadline of an idle or receiving connection.
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 1.3)
        gate.open.set()
        response = await asyncio.wait_for(call, TIMEOUT_S)
    assert response.text.endswith("data: [DONE]\n\n")


async def test_a_head_has_a_size() -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench) as http:
        for head in (
            b"GET / HTTP/1.1\r\nx: " + b"a" * 20_000,  # never ends
            b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: xxxxxxxx\r\n" % i for i in range(2000)) + b"\r\n",
        ):
            async with connection(http) as (reader, writer):
                writer.write(head)
                status, error = await refusal(reader)
                assert status == 431
                assert error["type"] == "invalid_request_error"
        async with httpx.AsyncClient() as client:
            ok = await client.get(f"{http.url}/v1/models", headers=AUTH | {"x": "a" * 15_000})
        assert ok.status_code == 200


async def test_broken_http_gets_an_error_of_our_form() -> None:
    async with serving(Bench([FakeReplica()])) as http:
        for garbage in (
            b"\x16\x03\x01\x02\x00",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        ):
            async with connection(http) as (reader, writer):
                writer.write(garbage)
                assert (await refusal(reader))[0] == 400


@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 10 * 1024 * 1024])
@pytest.mark.parametrize("chunked", [False, True])
async def test_r16_a_body_has_a_size_and_its_sender_gets_the_answer(size: int, chunked: bool) -> None:
    bench = Bench([FakeReplica()])

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(0, size, 65_536):
            yield b"x" * 65_536

    async with serving(bench) as http, httpx.AsyncClient() as client:
        response = await client.post(
            f"{http.url}/v1/chat/completions", content=parts() if chunked else b"x" * size, headers=AUTH
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "message_too_large"
        again = await client.post(f"{http.url}/v1/chat/completions", json=BODY, headers=AUTH)
        assert again.status_code == 200
    assert [event.outcome for event in bench.audit.ended] == [Outcome.REJECTED, Outcome.SUCCEEDED]


async def test_a_body_beyond_all_measure_is_not_even_read() -> None:
    async with serving(Bench([FakeReplica()])) as http, connection(http) as (reader, writer):
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        writer.write((head + "content-length: 100000000000\r\n\r\n").encode())
        assert (await refusal(reader))[0] == 413


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 10_000 + b"]" * 10_000,
        b'{"model":"m","messages":' + b"[" * 100_000,
        b'{"tools":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b',"model":"echo-1","messages":[]}',
        b'{"zzz":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        b'{"model": NaN}',
        b'{"temperature": 1e999}',
        b'{"model": "\\ud800"}',
        b'\xff\xfe{"model"',
        b"",
        b"null",
        b'{"model":"echo-1","messages":[],"n":' + b"9" * 5000 + b"}",
        b'{"model":"echo-1","messages":[{"role":"user","content":"\\u0000"}],"stop":"\\u0000"} x',
    ],
)
async def test_r16_hostile_json_is_refused_quickly(body: bytes) -> None:
    bench = Bench([FakeReplica()])
    async with serving(bench) as http, httpx.AsyncClient() as client:
        await client.get(f"{http.url}/healthz")
        begun_s = time.monotonic()
        response = await client.post(f"{http.url}/v1/chat/completions", content=body, headers=AUTH)
        elapsed_s = time.monotonic() - begun_s
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert elapsed_s < 0.5  # 0.1 on an idle machine
    assert not bench.replicas[0].requests
    assert [event.error_reason for event in bench.audit.ended] in (["REQUEST_INVALID"], ["NOT_IMPLEMENTED"])


async def test_connections_have_a_number() -> None:
    async with serving(Bench([FakeReplica()]), limits=replace(LIMITS, max_connections=2)) as http:
        async with connection(http), connection(http):
            await eventually(lambda: http.server.connections == 2, timeout_s=TIMEOUT_S)
            async with connection(http) as (reader, _):
                status, error = await refusal(reader)
                assert (status, error["type"]) == (503, "server_error")
        await eventually(lambda: http.server.connections == 0, timeout_s=TIMEOUT_S)
        async with http.client() as client:
            await client.models.list()


async def test_r04_a_reader_that_takes_nothing_is_cut_off() -> None:
    script: list[Step] = [EngineStarted("rev-1", 1, "r")]
    script += [Delta(seq, 0, "x" * 65_536, (seq,)) for seq in range(1, 1000)]
    bench = Bench([FakeReplica(script)])
    async with (
        serving(bench, limits=replace(LIMITS, write_timeout_s=0.3)) as http,
        connection(http) as (_, writer),
    ):
        body = json.dumps(BODY | {"stream": True})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        # The call leaves the running ones a moment after its outcome is written.
        await eventually(lambda: bench.audit.ended and not len(http.running), timeout_s=TIMEOUT_S)
    ended = bench.audit.ended[0]
    assert (ended.outcome, ended.error_reason) == (Outcome.CANCELLED, "READER_STALLED")
    assert bench.replicas[0].closed == 1
