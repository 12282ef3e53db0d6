"""Signing keys that rotate every 5 s under 200 requests a second refuse nobody; floods cost auth little.

It takes 12 s of load here; `make rotation MINUTES=5` takes longer.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import urllib.request
from collections import Counter
from dataclasses import dataclass, field

import grpc
import pytest
from joserfc.jwk import OKPKey
from joserfc.jws import extract_compact
from llmos.gateway.v1 import (
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

from services.mesh.clock import SystemClock
from tests.conftest import MeshFactory
from tests.framework import calls
from tests.framework.access_tokens import honest_claims, signed
from tests.framework.identities import Identities, bearer
from tests.framework.mesh import MeshHarness

GATEWAYS = ("gateway", "gateway-1")
SERVICES = ("auth", "inference", *GATEWAYS)
LOAD_S = float(os.environ.get("LLMOS_ROTATION_MINUTES") or 0.2) * 60
ROTATION_S = 5
RATE_PER_S = 200
TICK_S = 0.05
GENERATE_EVERY = 10
"""One request of so many goes through to inference: the services' own tokens are signed by these keys too."""
TIMEOUT_S = 20
CLOCK = SystemClock()


@dataclass
class Seen:
    """What came of the load."""

    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    kids: set[str] = field(default_factory=set)
    """Of the keys that signed the tokens that were used."""


class Load:
    """Requests on both gateways, in turn, with the newest tokens and the oldest that live."""

    def __init__(self, mesh: MeshHarness, credentials: list[str], seen: Seen) -> None:
        self._credentials = credentials
        self._seen = seen
        channels = [mesh.channel(gateway) for gateway in GATEWAYS]
        self._models = [model_service_pb2_grpc.ModelServiceStub(channel) for channel in channels]
        self._generation = [
            generation_service_pb2_grpc.GenerationServiceStub(channel) for channel in channels
        ]
        self._request = generation_service_pb2.GenerateRequest(spec=calls.spec("one two"))

    async def send(self, number: int) -> None:
        metadata = bearer(self._credentials[number % len(self._credentials)])
        at = number // 3 % len(GATEWAYS)
        try:
            if number % GENERATE_EVERY == 0:
                await self._generation[at].Generate(self._request, metadata=metadata, timeout=TIMEOUT_S)
            else:
                await self._models[at].ListModels(
                    model_service_pb2.ListModelsRequest(), metadata=metadata, timeout=TIMEOUT_S
                )
            self._seen.answered += 1
        except grpc.aio.AioRpcError as error:
            self._seen.refused[calls.reason_of(error) or f"{error.code().name}: {error.details()}"] += 1


@pytest.mark.slow
async def test_r22_keys_rotate_every_5_s_at_200_requests_a_second(make_mesh: MeshFactory) -> None:
    mesh = make_mesh(None)
    mesh.configure(
        "auth",
        signing_key_rotation_s=ROTATION_S,
        signing_key_publish_ahead_s=4,
        access_token_ttl_s=30,
        service_token_ttl_s=30,
    )
    for name in ("inference", *GATEWAYS):
        mesh.configure(name, jwks_refresh_s=1)
    await mesh.start(*SERVICES)
    identities = Identities(mesh)
    await identities.tenant("acme")
    account = await identities.client("acme", "app")
    _, key = await identities.api_key(account.client_id)
    seen = Seen()
    credentials = [key, await identities.token(account), await identities.token(account)]
    load = Load(mesh, credentials, seen)

    async def renew() -> None:
        """The newest token is a second old, the other 20."""
        second = 0
        while True:
            credentials[1] = await identities.token(account)
            seen.kids.add(str(extract_compact(credentials[1].encode()).headers()["kid"]))
            if second % 20 == 0:
                credentials[2] = credentials[1]
            second += 1
            await asyncio.sleep(1)

    renewing = asyncio.create_task(renew())
    running: set[asyncio.Task[None]] = set()
    begun_s, number = CLOCK.monotonic(), 0
    while (elapsed_s := CLOCK.monotonic() - begun_s) < LOAD_S:
        assert not renewing.done(), await renewing
        while number < elapsed_s * RATE_PER_S and len(running) < RATE_PER_S:
            task = asyncio.create_task(load.send(number))
            running.add(task)
            task.add_done_callback(running.discard)
            number += 1
        await asyncio.sleep(TICK_S)
    await asyncio.gather(*running)
    renewing.cancel()
    await asyncio.gather(renewing, return_exceptions=True)
    print(f"{number} requests in {LOAD_S:g} s, signed by {len(seen.kids)} keys")
    assert not seen.refused, seen.refused
    assert seen.answered == number
    if "LLMOS_ROTATION_MINUTES" in os.environ:
        assert number > LOAD_S * RATE_PER_S / 2, "this machine is too slow to say anything"
    assert len(seen.kids) >= LOAD_S / ROTATION_S - 1


def fetches(mesh: MeshHarness) -> float:
    """How often auth was asked for its public keys."""
    with urllib.request.urlopen(mesh.metrics_url("auth"), timeout=TIMEOUT_S) as response:
        lines = response.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("rpc_server_duration_seconds_count") and "/GetJwks" in line
    )


async def test_r22_a_flood_of_unknown_keys_asks_auth_once_per_interval(make_mesh: MeshFactory) -> None:
    mesh = make_mesh(None)
    await mesh.start("auth", "inference", "gateway")
    stub = model_service_pb2_grpc.ModelServiceStub(mesh.channel())
    key = OKPKey.generate_key("Ed25519")
    before = await asyncio.to_thread(fetches, mesh)
    assert before >= 2, "both services have fetched the keys at their start"
    begun_s = CLOCK.monotonic()
    for _ in range(400):
        token = signed(key, honest_claims(CLOCK.now()), kid=secrets.token_hex(8))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListModels(
                model_service_pb2.ListModelsRequest(), metadata=bearer(token), timeout=TIMEOUT_S
            )
        assert calls.reason_of(refused.value) == "CREDENTIAL_INVALID"
    elapsed_s = CLOCK.monotonic() - begun_s
    assert await asyncio.to_thread(fetches, mesh) - before <= elapsed_s / 5 + 2
    # the honest pass beside it
    await stub.ListModels(model_service_pb2.ListModelsRequest(), metadata=mesh.bearer(), timeout=TIMEOUT_S)
