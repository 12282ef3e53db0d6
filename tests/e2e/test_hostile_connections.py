"""Hostile connections against a real gateway, on one mesh: rows 14, 15, 16, and what row 33 listens to."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress

import grpc
import h2.config
import h2.connection
import h2.exceptions
import httpx
import psutil
import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import ContinuationFrame, HeadersFrame
from llmos.gateway.v1 import generation_service_pb2

from services.mesh import errors, status
from tests.conftest import MeshFactory
from tests.framework.calls import Caller, spec
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

DRIBBLERS = 500
RESETS = 2000
MAX_CALLS = 32
RESET_AFTER = 64
"""A stream is reset when so many more were begun."""
MEMORY_BYTES = 64 * 1024 * 1024
METHOD = "/llmos.gateway.v1.GenerationService/Generate"


async def test_r14_r15_r16_r33_hostile_connections(make_mesh: MeshFactory) -> None:
    """Each row in turn; between them honest calls pass."""
    mesh = make_mesh(None)
    mesh.configure("gateway", max_concurrent_calls=MAX_CALLS)
    await mesh.start("auth", "inference", "gateway")
    caller = Caller(mesh)
    process = psutil.Process(mesh.processes["gateway"].pid)
    assert (await caller.stream("warm up")).finished
    r33_only_expected_listeners(mesh, process)
    await r16_hostile_parameters_never_reach_the_engine(mesh, caller)
    for attack in (rapid_reset, continuation_flood, header_bomb):
        before_bytes = process.memory_info().rss
        await attack(mesh)
        # Not at once: the gateway may still have some of the attack to read.
        await eventually(lambda: honest_passes(caller), timeout_s=60, what=f"no harm of {attack.__name__}")
        assert process.memory_info().rss - before_bytes < MEMORY_BYTES, attack.__name__
    await r14_dribblers_are_cut_off(mesh, caller)


async def honest_passes(caller: Caller) -> bool:
    seen = await caller.stream("honest")
    assert seen.finished, seen.error
    return True


def r33_only_expected_listeners(mesh: MeshHarness, process: psutil.Process) -> None:
    listening = [each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    urls = (mesh.target("gateway"), mesh.http_url(), mesh.metrics_url("gateway").removesuffix("/metrics"))
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == {int(url.rpartition(":")[2]) for url in urls}


async def r16_hostile_parameters_never_reach_the_engine(mesh: MeshHarness, caller: Caller) -> None:
    hostile = [
        spec("x", n=1_000_000_000),
        spec("x", stop=["x"] * 100_000),
        spec("x", max_tokens=4_000_000_000),
        spec("x", labels={str(number): "" for number in range(100)}),
        spec("x" * 2_000_000),
    ]
    for name in ("temperature", "top_p", "presence_penalty"):
        for value in (float("nan"), float("inf"), -1e30):
            hostile.append(spec("x"))
            setattr(hostile[-1].sampling, name, value)
    async with httpx.AsyncClient() as client:
        before = await requests_of_the_engine(client, mesh)
        assert before, "the engine has counted the honest call"
        taken_s = []
        for each in hostile:
            request = generation_service_pb2.GenerateRequest(spec=each)
            begun_s = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await caller.generation.Generate(request, metadata=mesh.bearer(), timeout=10)
            taken_s.append(time.monotonic() - begun_s)
            assert isinstance(status.from_rpc_error(refused.value), errors.RequestInvalid)
        request = generation_service_pb2.GenerateRequest(spec=spec("x"))
        metadata = [*mesh.bearer(), ("x-large", "x" * 17_000)]
        with pytest.raises(grpc.aio.AioRpcError) as large:
            await caller.generation.Generate(request, metadata=metadata, timeout=10)
        assert large.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert sorted(taken_s)[len(taken_s) // 2] < 0.1  # the machine may be busy: not each of them
        assert await requests_of_the_engine(client, mesh) == before


async def requests_of_the_engine(client: httpx.AsyncClient, mesh: MeshHarness) -> list[str]:
    text = (await client.get(mesh.metrics_url("inference"))).text
    counts = [
        line for line in text.splitlines() if line.startswith("rpc_server_duration") and "_count" in line
    ]
    return [line for line in counts if "InferenceService/Generate" in line]


class Attacker:
    """HTTP/2 by hand, on one connection to the gRPC port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.heard = asyncio.Event()

    @classmethod
    async def connect(cls, mesh: MeshHarness) -> Attacker:
        host, port = mesh.target("gateway").split(":")
        attacker = cls(*await asyncio.open_connection(host, int(port)))
        await attacker.flush()
        return attacker

    def headers(self, *more: tuple[str, str]) -> list[tuple[str, str]]:
        return [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", METHOD),
            (":authority", "gateway"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *more,
        ]

    async def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())
        await self.writer.drain()

    async def follow(self) -> None:
        """Hears what the gateway says, so that it is known how much may be sent."""
        while data := await self.reader.read(65_536):
            self.h2.receive_data(data)
            self.heard.set()
            self.heard.clear()

    def reset(self, stream_id: int) -> None:
        with suppress(h2.exceptions.StreamClosedError):  # ended by the gateway before
            self.h2.reset_stream(stream_id, ErrorCodes.CANCEL)

    async def close(self) -> None:
        self.writer.close()


async def rapid_reset(mesh: MeshHarness) -> None:
    """Streams that are begun and reset as fast as they can be written (CVE-2023-44487): at once without their
    request, some time after with it. The first of those stay until as many handlers began as may."""
    attacker = await Attacker.connect(mesh)
    over = asyncio.Event()
    async with httpx.AsyncClient() as client:
        watching = asyncio.create_task(most_at_work(client, mesh, over))
        following = asyncio.create_task(attacker.follow())
        try:
            await begin_and_reset(attacker, mesh, client)
        except ConnectionError:
            pass  # ended by the gateway, which is one way to defend itself
        finally:
            over.set()
            following.cancel()
        assert await watching <= MAX_CALLS
        await eventually(lambda: nothing_at_work(client, mesh), timeout_s=60, what="no handler is left")
    await attacker.close()


async def begin_and_reset(attacker: Attacker, mesh: MeshHarness, client: httpx.AsyncClient) -> None:
    headers = attacker.headers(("authorization", f"Bearer {mesh.admin_key}"))
    request = generation_service_pb2.GenerateRequest(spec=spec("[[hang]]")).SerializeToString()
    message = b"\0" + len(request).to_bytes(4, "big") + request
    begun: deque[int] = deque()
    full = False

    async def all_at_work() -> bool:
        return await calls_at_work(client, mesh) == MAX_CALLS

    for number in range(RESETS):
        stream_id = attacker.h2.get_next_available_stream_id()
        attacker.h2.send_headers(stream_id, headers)
        if number % 2:
            attacker.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
        else:
            while attacker.h2.local_flow_control_window(stream_id) < len(message):
                await attacker.flush()
                await attacker.heard.wait()
            attacker.h2.send_data(stream_id, message, end_stream=True)
            begun.append(stream_id)
        await attacker.flush()
        if len(begun) > RESET_AFTER:
            if not full:  # a handler that is slow to begin would never see a stream that is reset soon
                await eventually(all_at_work, timeout_s=60, what="handlers began")
                full = True
            attacker.reset(begun.popleft())
    for stream_id in begun:
        attacker.reset(stream_id)
    await attacker.flush()


async def most_at_work(client: httpx.AsyncClient, mesh: MeshHarness, over: asyncio.Event) -> int:
    most = 0
    while not over.is_set():
        most = max(most, await calls_at_work(client, mesh))
    return most


async def nothing_at_work(client: httpx.AsyncClient, mesh: MeshHarness) -> bool:
    return await calls_at_work(client, mesh) == 0


async def calls_at_work(client: httpx.AsyncClient, mesh: MeshHarness) -> int:
    lines = (await client.get(mesh.metrics_url("gateway"))).text.splitlines()
    running = (line for line in lines if line.startswith("llmos_calls_running{"))
    return sum(int(float(line.rpartition(" ")[2])) for line in running)


async def continuation_flood(mesh: MeshHarness) -> None:
    """A header block that never ends (CVE-2024-27316)."""
    attacker = await Attacker.connect(mesh)
    begin = HeadersFrame(1)
    begin.data = attacker.h2.encoder.encode(attacker.headers())
    more = ContinuationFrame(1)
    more.data = attacker.h2.encoder.encode([("x-more", "x" * 8000)], huffman=False)
    try:
        attacker.writer.write(begin.serialize())
        for _ in range(5000):
            attacker.writer.write(more.serialize())
            await attacker.writer.drain()
    except ConnectionError:
        pass
    await attacker.close()


async def header_bomb(mesh: MeshHarness) -> None:
    """One large header in the table of HPACK, named again and again: a few bytes that mean megabytes."""
    attacker = await Attacker.connect(mesh)
    bomb = [("x-bomb", "x" * 3000)] * 8000
    frame = HeadersFrame(1)
    frame.data = attacker.h2.encoder.encode(attacker.headers(*bomb))
    frame.flags.add("END_HEADERS")
    try:
        attacker.writer.write(frame.serialize())
        await attacker.writer.drain()
    except ConnectionError:
        pass
    await attacker.close()


async def r14_dribblers_are_cut_off(mesh: MeshHarness, caller: Caller) -> None:
    """A byte a second of a head, of a body, and of HTTP/2's preface: ended within 10 s; others are unhurt."""
    http, rpc = mesh.http_url().removeprefix("http://"), mesh.target("gateway")
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + mesh.admin_key.encode()
    )
    starts = [
        (http, b"G", b"ET / HTTP/1.1\r\nx: " + b"x" * 100),
        (http, head + b"\r\ncontent-length: 500\r\n\r\n", b"{" * 400),
        (rpc, b"P", b"RI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ]
    slow = asyncio.create_task(caller.stream("[[tokens=20]][[delay_ms=500]] longer than that"))
    over = asyncio.Event()
    honest = asyncio.create_task(slowest_honest_s(mesh, caller, over))
    lasted_s = await asyncio.gather(*(dribble(*starts[number % 3]) for number in range(DRIBBLERS)))
    over.set()
    # What a busy machine makes everybody wait for is not the gateway's patience.
    assert max(lasted_s) - await honest < 10
    assert (await caller.stream("honest")).finished
    assert (await slow).finished


async def slowest_honest_s(mesh: MeshHarness, caller: Caller, over: asyncio.Event) -> float:
    """The longest of many requests, each on a new connection beside those that dribble. Five times as many
    bodies dribble as there are places, and honest calls find one."""
    slowest_s = 0.0
    while not over.is_set():
        begun_s = time.monotonic()
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.get(f"{mesh.http_url()}/healthz")).status_code == 200
        assert await honest_passes(caller)
        slowest_s = max(slowest_s, time.monotonic() - begun_s)
        await asyncio.sleep(0.1)
    return slowest_s


async def dribble(target: str, at_once: bytes, then: bytes) -> float:
    """How long the gateway kept the connection."""
    host, port = target.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    begun_s = time.monotonic()

    async def write() -> None:
        writer.write(at_once)
        for byte in then:
            await writer.drain()
            await asyncio.sleep(1)
            writer.write(bytes([byte]))

    writing = asyncio.create_task(write())
    try:
        async with asyncio.timeout(60):
            while await reader.read(65_536):
                pass
    except ConnectionError:
        pass
    finally:
        writing.cancel()
        writer.close()
    return time.monotonic() - begun_s


async def test_r33_without_its_secret_it_refuses_to_start(make_mesh: MeshFactory) -> None:
    mesh = make_mesh(None)
    mesh.configure("gateway", service_secret_file=mesh.state.logs / "none")
    process = mesh.spawn("gateway")
    await eventually(lambda: not process.running, timeout_s=30, what="it ends")
    assert process.exit_code not in (0, None)
    assert "secret" in mesh.log("gateway").lower()
