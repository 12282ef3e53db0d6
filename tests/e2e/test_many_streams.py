"""Very many streams, and readers that are very slow, at one real gateway over both edges: rows 3 and 4.

`make streams STREAMS=20000` is the long form of row 3. The short one counts the blocks that Python's objects
hold: one that each stream leaves behind is seen among a thousand streams.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from dataclasses import dataclass

import grpc.aio
import httpx
import psutil
from llmos.common.v1 import error_reason_pb2
from llmos.gateway.v1 import generation_service_pb2, generation_service_pb2_grpc

from deploy.dev.broker import Broker
from tests.conftest import MeshFactory
from tests.framework.calls import Caller, cancel_sse_after_first_token, spec, sse
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

STREAMS = int(os.environ.get("LLMOS_STREAMS", "1000"))
LONG = STREAMS >= 10_000
"""Only over so many streams can the process's memory be divided by their number."""
WARM_UP = STREAMS // 4 if LONG else 500
AT_ONCE = 32
COLLECTIONS = 'python_gc_collections_total{generation="2"}'
"""Of all garbage."""
STREAMS_OVER_GRPC = "calls of StreamGenerate running"
KINDS = ("cancelled", "cancelled", "whole", "cancelled", "whole")
EDGES = ("grpc", "sse")
ENDLESS = "[[tokens=4000]][[delay_ms=20]] again and again"
WHOLE = "[[tokens=4]] word"

READERS = 50
WRITE_TIMEOUT_S = 2.0
SLOW_S = 3.0
"""For so long they read one message a second; then nothing."""
FAST = "[[tokens=400]][[delay_ms=20]] " + "x" * 1000
AHEAD_BYTES = 16 * 1024
MEMORY_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Held:
    """What a gateway at rest holds."""

    memory_bytes: int
    blocks: int
    tasks: int
    descriptors: int

    def __str__(self) -> str:
        return (
            f"{self.memory_bytes / 2**20:.1f} MiB, {self.blocks} blocks, {self.tasks} tasks, "
            f"{self.descriptors} descriptors"
        )


class Watched:
    """The gateway, seen from outside."""

    def __init__(self, mesh: MeshHarness, client: httpx.AsyncClient) -> None:
        self._mesh = mesh
        self._url, self._client = mesh.metrics_url("gateway"), client
        self.process = psutil.Process(mesh.processes["gateway"].pid)

    async def metrics(self) -> Counter[str]:
        """The sums over all labels."""
        found: Counter[str] = Counter()
        for line in (await self._client.get(self._url)).text.splitlines():
            if line.startswith(("llmos_", COLLECTIONS)):
                name, _, value = line.rpartition(" ")
                found[name if name == COLLECTIONS else name.partition("{")[0]] += int(float(value))
                if name.startswith("llmos_calls_running") and "/StreamGenerate" in name:
                    found[STREAMS_OVER_GRPC] += int(float(value))
        return found

    async def at_rest(self, timeout_s: float = 60.0) -> Held:
        """Once no call runs and the audit spool is empty."""

        async def resting() -> Counter[str] | None:
            found = await self.metrics()
            return None if found["llmos_calls_running"] or found["llmos_audit_spool_depth_events"] else found

        found = await eventually(resting, timeout_s=timeout_s, what="no call runs, and all are in the log")
        if self._mesh.forked:
            self._mesh.collect_garbage("gateway")

            async def collected() -> Counter[str] | None:
                after = await self.metrics()
                return after if after[COLLECTIONS] > found[COLLECTIONS] else None

            found = await eventually(collected, what="garbage is collected")
        return Held(
            self.process.memory_info().rss,
            found["llmos_process_memory_blocks"],
            found["llmos_process_tasks"],
            self.process.num_fds(),
        )


async def test_r03_r04_many_streams_and_slow_readers(make_mesh: MeshFactory, broker: Broker) -> None:
    """One mesh for both rows: starting it takes as long as they do."""
    mesh = make_mesh(broker)
    mesh.configure("inference", max_running=64)
    mesh.configure("gateway", write_timeout_s=WRITE_TIMEOUT_S)
    await mesh.start()
    async with httpx.AsyncClient() as client:
        watched = Watched(mesh, client)
        await r03_streams_leave_nothing_behind(mesh, watched)
        await r04_slow_readers_cost_little_and_are_cut_off(mesh, watched)


# -- row 3 -------------------------------------------------------------------------------------------------


async def r03_streams_leave_nothing_behind(mesh: MeshHarness, watched: Watched) -> None:
    caller = Caller(mesh)
    await run(mesh, caller, WARM_UP)
    before = await watched.at_rest()
    begun_s = time.monotonic()
    await run(mesh, caller, STREAMS)
    took_s = time.monotonic() - begun_s
    after = await watched.at_rest()
    grown_bytes = (after.memory_bytes - before.memory_bytes) / STREAMS
    blocks = (after.blocks - before.blocks) / STREAMS
    print(f"\n{STREAMS} streams in {took_s:.1f} s\nbefore: {before}\nafter: {after}")
    print(f"for each stream: {grown_bytes:.0f} bytes, {blocks:.2f} blocks")
    # Where garbage could not be collected, some of it is there.
    assert blocks < (0.5 if mesh.forked else 50)
    assert not LONG or grown_bytes < 200
    assert after.tasks <= before.tasks + 2
    assert after.descriptors <= before.descriptors + 2


async def run(mesh: MeshHarness, caller: Caller, streams: int) -> None:
    """Each kind over each edge in turn, some at once; fails where one ends as it should not."""
    kinds = itertools.islice(itertools.cycle(itertools.product(KINDS, EDGES)), streams)

    async def one_after_the_other() -> None:
        for kind, edge in kinds:
            await stream(mesh, caller, kind, edge)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(one_after_the_other())


async def stream(mesh: MeshHarness, caller: Caller, kind: str, edge: str) -> None:
    match kind, edge:
        case "whole", "grpc":
            seen = await caller.stream(WHOLE)
            assert seen.finished, seen.error
        case "whole", _:
            async with sse(mesh, WHOLE) as (_, reader):
                assert b"data: [DONE]" in await reader.read(-1)
        case _, "grpc":
            call = caller.begin(ENDLESS)
            async for response in call:
                if response.HasField("delta"):
                    break
            call.cancel()
        case _:
            await cancel_sse_after_first_token(mesh, ENDLESS)


# -- row 4 -------------------------------------------------------------------------------------------------


async def r04_slow_readers_cost_little_and_are_cut_off(mesh: MeshHarness, watched: Watched) -> None:
    caller = Caller(mesh)
    before = await watched.at_rest()
    enough, over = asyncio.Event(), asyncio.Event()
    peak_bytes, honest_s = 0, [0.0]

    async def watch() -> None:
        nonlocal peak_bytes
        while not over.is_set():
            peak_bytes = max(peak_bytes, watched.process.memory_info().rss)
            await asyncio.sleep(0.05)

    async def honest() -> None:
        while not over.is_set():
            begun_s = time.monotonic()
            assert (await caller.stream("[[tokens=20]][[delay_ms=5]] quick")).finished
            honest_s.append(time.monotonic() - begun_s)

    # Not a window that grows with what the network can carry.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", AHEAD_BYTES)]
    async with (
        grpc.aio.insecure_channel(mesh.target(), options=options) as channel,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(watch())
        group.create_task(honest())
        readers = [
            group.create_task(read_slowly_over_grpc(mesh, channel, enough, over))
            if number % 2
            else group.create_task(read_slowly_over_sse(mesh, enough, over))
            for number in range(READERS)
        ]
        await asyncio.sleep(SLOW_S)
        enough.set()
        stalled_s = time.monotonic()
        # Those over HTTP may go on for as long as the kernel's buffers hold what they do not read.
        await eventually(
            lambda: only_the_honest_over_grpc(watched),
            timeout_s=WRITE_TIMEOUT_S + 4,
            what="the stalled ones are ended",
        )
        ended_s = time.monotonic() - stalled_s
        over.set()
    print(
        f"{READERS} slow readers: {(peak_bytes - before.memory_bytes) / 2**20:.1f} MiB more; ended after "
        f"{ended_s:.1f} s; {len(honest_s) - 1} honest streams, the slowest {max(honest_s):.2f} s"
    )
    assert peak_bytes - before.memory_bytes <= MEMORY_BYTES
    assert max(honest_s) < 2
    ids = {reader.result() for number, reader in enumerate(readers) if number % 2}
    await watched.at_rest()
    await caller.outcomes(ids)
    records = await caller.records()
    assert Counter(records[each].ended.error_reason for each in ids) == {
        error_reason_pb2.ERROR_REASON_READER_STALLED: READERS // 2
    }


async def only_the_honest_over_grpc(watched: Watched) -> bool:
    return (await watched.metrics())[STREAMS_OVER_GRPC] <= 1


async def read_slowly_over_grpc(
    mesh: MeshHarness, channel: grpc.aio.Channel, enough: asyncio.Event, over: asyncio.Event
) -> str:
    generation = generation_service_pb2_grpc.GenerationServiceStub(channel)
    request = generation_service_pb2.StreamGenerateRequest(spec=spec(FAST))
    call = generation.StreamGenerate(request, metadata=mesh.bearer(), timeout=60)
    started = await call.read()
    while not enough.is_set():
        assert (await call.read()).HasField("delta")
        await asyncio.sleep(1)
    await over.wait()
    call.cancel()
    return str(started.started.request_id)


async def read_slowly_over_sse(mesh: MeshHarness, enough: asyncio.Event, over: asyncio.Event) -> str:
    async with sse(mesh, FAST, ahead_bytes=AHEAD_BYTES) as (request_id, reader):
        while not enough.is_set():
            assert await reader.read(10_000)
            await asyncio.sleep(1)
        await over.wait()
    return request_id
