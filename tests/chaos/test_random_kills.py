"""Row 27 on real processes: whatever is killed, each request has exactly one outcome.

`LLMOS_CHAOS_KILLS` says how many kills there are: 12 in every run of the tests, 200 in `make chaos`.
"""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from deploy.dev.broker import Broker
from tests.conftest import MeshFactory
from tests.framework.calls import OUTCOME, Caller, Streamed
from tests.framework.waiting import eventually

KILLS = int(os.environ.get("LLMOS_CHAOS_KILLS", "12"))


@pytest.mark.slow
async def test_r27_random_kills_of_gateway_logging_and_broker_lose_and_double_no_outcome(
    make_mesh: MeshFactory, own_broker: Broker
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    mesh = make_mesh(own_broker)
    mesh.configure("inference", max_running=16)
    await mesh.start()
    history: list[Streamed] = []
    stop, gateway_up = asyncio.Event(), asyncio.Event()
    gateway_up.set()

    async def client(number: int) -> None:
        caller = Caller(mesh)
        while not stop.is_set():
            # A polite client: it waits while the gateway is away. The pace leaves room for the restarts.
            await gateway_up.wait()
            tokens = chance.randrange(1, 20)
            stream = await caller.stream(f"[[tokens={tokens}]][[delay_ms=25]] client {number}", timeout_s=20)
            history.append(stream)

    clients = [asyncio.create_task(client(number)) for number in range(6)]
    for kill in range(KILLS):
        victim = chance.choice(["gateway", "logging", "broker"])
        enough = len(history) + chance.randrange(1, 12)
        await eventually(lambda enough=enough: len(history) >= enough, timeout_s=60, what="load goes on")
        print(f"kill {kill}: {victim}")
        if victim == "broker":
            own_broker.kill()
            own_broker.start()
            await own_broker.wait_ready()
        else:
            if victim == "gateway":
                gateway_up.clear()
            mesh.kill(victim)
            await mesh.start(victim)
            gateway_up.set()
    stop.set()
    await asyncio.gather(*clients)

    ids = {stream.request_id for stream in history if stream.request_id}
    assert len(ids) == len([stream for stream in history if stream.request_id])
    assert all(stream.unbroken for stream in history)
    caller = Caller(mesh)
    outcomes = await caller.outcomes(ids, timeout_s=90)
    assert ids <= outcomes.keys()
    for stream in history:
        if stream.finished:
            # A gateway may die after its last byte and before its outcome.
            assert outcomes[stream.request_id] in {OUTCOME.OUTCOME_SUCCEEDED, OUTCOME.OUTCOME_ABORTED}
    finished = [stream for stream in history if stream.finished]
    lost = [s for s in finished if outcomes[s.request_id] == OUTCOME.OUTCOME_ABORTED]
    print(f"{len(history)} requests, {len(finished)} finished, {len(lost)} of them called aborted")
    assert len(finished) > 20
