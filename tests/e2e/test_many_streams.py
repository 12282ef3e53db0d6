"""Very many streams, and readers that are very slow, at one real gateway over both edges: rows 3 and 4.

`make streams STREAMS=20000` is the long form of row 3. The short one counts the blocks that Python's objects
hold: one that each stream leaves behind is seen among a thousand streams.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections import Counter
from contextlib import suppress
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
WRITE_TIMEOUT_S = 4.0
FAST = "[[tokens=2000]][[delay_ms=20]] " + "x" * 1000
STEADY = "[[tokens=2000]][[delay_ms=100]] " + "x" * 1000
"""What a slow machine can bring to those who keep up."""
AHEAD_BYTES = 16 * 1024
MEMORY_BYTES = (8 if LONG else 16) * 2**20
"""The row's 8 MiB hold for a gateway alone on its machine."""
BEHIND_S = 0.3
"""A gateway at which an honest stream of 0.1 s takes longer does not keep up with the engine. It gets merged,
larger messages, of which each reader's may be held several times: twice the memory, and no more."""
HONEST = 5
"""So many honest streams, one after the other, tell how long one takes."""
UNHURT = 5.0
"""So many times as long as beside readers who keep up."""


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
    # A busy machine is no lost replica.
    mesh.configure("gateway", write_timeout_s=WRITE_TIMEOUT_S, probe_timeout_s=30)
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
    print(f"\n{STREAMS} streams in {took_s:.1f} s\nbefore: {before}")

    async def as_before() -> bool:
        after = await watched.at_rest()
        grown_bytes = (after.memory_bytes - before.memory_bytes) / STREAMS
        blocks = (after.blocks - before.blocks) / STREAMS
        print(f"after: {after}\nfor each stream: {grown_bytes:.0f} bytes, {blocks:.2f} blocks")
        # Where garbage could not be collected, some of it is there.
        assert blocks < (0.5 if mesh.forked else 50)
        assert not LONG or grown_bytes < 200
        assert after.tasks <= before.tasks + 2
        assert after.descriptors <= before.descriptors + 2
        return True

    # Not at once: a connection may still be closing. What a stream leaves behind stays.
    await eventually(as_before, timeout_s=30)


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
    over = asyncio.Event()
    peak_bytes = 0

    async def watch() -> None:
        nonlocal peak_bytes
        while not over.is_set():
            peak_bytes = max(peak_bytes, watched.process.memory_info().rss)
            await asyncio.sleep(0.05)

    beside_quick_s, _ = await honest_beside(mesh, caller, watched, STEADY, pause_s=0)
    before = await watched.at_rest()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        beside_slow_s, ids = await honest_beside(mesh, caller, watched, FAST, pause_s=1)
        over.set()
    print(
        f"{READERS} slow readers: {(peak_bytes - before.memory_bytes) / 2**20:.1f} MiB more; honest streams "
        f"take {beside_slow_s:.2f} s, and beside readers who keep up {beside_quick_s:.2f} s"
    )
    allowed_bytes = MEMORY_BYTES if beside_slow_s < BEHIND_S else 2 * MEMORY_BYTES
    assert peak_bytes - before.memory_bytes <= allowed_bytes
    # Who has to wait for a stalled reader waits until that is cut off.
    assert beside_slow_s < max(WRITE_TIMEOUT_S / 2, UNHURT * beside_quick_s)
    await watched.at_rest()
    await caller.outcomes(ids)
    records = await caller.records()
    assert Counter(records[each].ended.error_reason for each in ids) == {
        error_reason_pb2.ERROR_REASON_READER_STALLED: READERS // 2
    }


async def honest_beside(
    mesh: MeshHarness, caller: Caller, watched: Watched, text: str, *, pause_s: float
) -> tuple[float, set[str]]:
    """What honest streams take (the median) beside readers who pause after each message, and the ids of those
    over gRPC. Where they pause, until all of those are cut off."""
    over, enough = asyncio.Event(), asyncio.Event()
    taken_s: list[float] = []

    async def honest() -> None:
        while not enough.is_set():
            begun_s = time.monotonic()
            assert (await caller.stream("[[tokens=20]][[delay_ms=5]] quick")).finished
            taken_s.append(time.monotonic() - begun_s)

    async def over_grpc() -> int:
        return (await watched.metrics())[STREAMS_OVER_GRPC]

    async def only_the_honest_over_grpc() -> bool:
        return len(taken_s) >= HONEST and (not pause_s or await over_grpc() <= 1)

    async def none_over_grpc() -> bool:
        return await over_grpc() == 0

    # Not a window that grows with what the network can carry.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", AHEAD_BYTES)]
    async with (
        grpc.aio.insecure_channel(mesh.target(), options=options) as channel,
        asyncio.TaskGroup() as group,
    ):
        honest_ones = group.create_task(honest())
        begun = [asyncio.Event() for _ in range(READERS)]
        readers_over_grpc = [
            group.create_task(read_over_grpc(mesh, channel, text, pause_s, each, over)) for each in begun[::2]
        ]
        for each in begun[1::2]:
            group.create_task(read_over_sse(mesh, text, pause_s, each, over))
        for each in begun:
            await each.wait()
        # Those over HTTP may go on for as long as the kernel's buffers hold what they do not read.
        await eventually(only_the_honest_over_grpc, timeout_s=60, what="the stalled ones are ended")
        enough.set()
        await honest_ones
        if pause_s:
            await eventually(none_over_grpc, timeout_s=60, what="the last one is ended")
        over.set()
    ids = {reader.result() for reader in readers_over_grpc}
    return statistics.median(taken_s), ids


async def read_over_grpc(
    mesh: MeshHarness,
    channel: grpc.aio.Channel,
    text: str,
    pause_s: float,
    begun: asyncio.Event,
    over: asyncio.Event,
) -> str:
    """The request's id."""
    generation = generation_service_pb2_grpc.GenerationServiceStub(channel)
    request = generation_service_pb2.StreamGenerateRequest(spec=spec(text))
    call = generation.StreamGenerate(request, metadata=mesh.bearer(), timeout=120)
    started = await call.read()
    begun.set()
    try:
        while not over.is_set():
            assert (await call.read()).HasField("delta")
            await pause(pause_s, over)
    except grpc.aio.AioRpcError:
        if not pause_s:
            raise
    await over.wait()
    call.cancel()
    return str(started.started.request_id)


async def read_over_sse(
    mesh: MeshHarness, text: str, pause_s: float, begun: asyncio.Event, over: asyncio.Event
) -> None:
    async with sse(mesh, text, ahead_bytes=AHEAD_BYTES) as (_, reader):
        begun.set()
        while not over.is_set():
            assert await reader.read(10_000) or pause_s
            await pause(pause_s, over)


async def pause(pause_s: float, over: asyncio.Event) -> None:
    if pause_s:
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), pause_s)
