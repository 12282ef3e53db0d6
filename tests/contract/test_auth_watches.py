"""The streams of auth over gRPC: what the hub says is what others hear, across caps and drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from llmos.auth.v1 import token_service_pb2_grpc

from services.auth.servicer import TokenServicer
from services.auth.store import Batch, NewRevocation, Put
from services.auth.stores.memory import MemoryStore
from services.auth.watching import WATCHES, Hub
from services.mesh.channel import Channel
from services.mesh.clock import SystemClock
from services.mesh.context import Caller
from services.mesh.errors import CredentialRevoked
from services.mesh.health import Health
from services.mesh.interceptors import server_chain
from services.mesh.policy import (
    Condition,
    Effect,
    RevocationKind,
    Role,
    Rule,
    TimeWindow,
)
from services.mesh.revocation import RevocationList
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.watch_client import GrpcWatches
from services.mesh.watching import POLICY, REVOCATIONS, PolicySource, watch_policy, watch_revocations
from tests.framework.proxy import TcpProxy
from tests.framework.tiny_service import TinySettings
from tests.framework.waiting import eventually

CLOCK = SystemClock()
WITHIN_S = 15.0
"""Generous: what is asked for is 5 s, on a machine that does nothing else."""


class Auth:
    """The watch methods of auth over a store in memory; can be stopped and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.store = MemoryStore()
        self._folder = folder
        self._port = 0
        self._version = 0

    async def start(self, *, max_call_s: float = 600) -> None:
        self.hub = Hub(self.store, CLOCK)
        await self.hub.start()
        running = RunningCalls(64)

        async def anybody(method: str, metadata: Any, source: str) -> Caller:
            return Caller(None, "service:gateway")

        chain = server_chain(
            clock=CLOCK,
            running=running,
            authenticator=anybody,
            watch_methods=WATCHES,
            max_call_s=max_call_s,
            adopt_request_id=True,
        )
        settings = TinySettings(grpc_port=self._port, metrics_port=0, probe_port=None, state_dir=self._folder)
        self._server = GrpcServer(settings, chain=chain, running=running, health=Health())
        nothing = cast("Any", None)
        await self._server.add(
            token_service_pb2_grpc.add_TokenServiceServicer_to_server,
            TokenServicer(nothing, nothing, nothing, nothing, self.hub, nothing, ""),
            "llmos.auth.v1.TokenService",
        )
        await self._server.start()
        self._port = self._server.ports["grpc"]

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def stop(self) -> None:
        async with asyncio.timeout(10):
            await self._server.drain(30)
        await self.hub.stop()

    async def revoke(self, token_id: str, *, cut_streams: bool = False) -> None:
        now = CLOCK.now()
        revocation = NewRevocation(
            RevocationKind.TOKEN, token_id, now, now + timedelta(minutes=5), cut_streams
        )
        await self.store.commit(Batch(now, "service:auth", revocations=[revocation]))


class Service:
    """What a service knows by its streams."""

    def __init__(self, target: str) -> None:
        self.health = Health([REVOCATIONS, POLICY])
        self.revoked = RevocationList(CLOCK)
        self.policy = PolicySource()
        self.channel = Channel(target, clock=CLOCK)
        watches = GrpcWatches(self.channel)
        self.watching = [
            watch_revocations(watches.revocations, self.revoked, health=self.health, clock=CLOCK),
            watch_policy(watches.policy, self.policy, health=self.health, clock=CLOCK),
        ]

    async def __aenter__(self) -> Service:
        for each in self.watching:
            await each.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for each in self.watching:
            await each.stop()
        await self.channel.close()

    async def ready(self) -> None:
        await eventually(lambda: not set(self.health.waiting_for) - {"start"}, timeout_s=WITHIN_S)

    def refuses(self, token_id: str) -> bool:
        try:
            self.revoked.check(token_id=token_id, key_id="", client_id="c", tenant_id="t", issued_at_s=1)
        except CredentialRevoked:
            return True
        return False

    async def refuses_soon(self, token_id: str) -> None:
        await eventually(lambda: self.refuses(token_id), timeout_s=WITHIN_S, what=f"{token_id} is refused")


@pytest.fixture
async def auth(tmp_path: Path) -> AsyncIterator[Auth]:
    auth = Auth(tmp_path)
    await auth.start()
    yield auth
    await auth.stop()


async def test_r23_a_revocation_reaches_all_who_watch(auth: Auth) -> None:
    await auth.revoke("before")
    async with AsyncExitStack() as stack:
        services = [await stack.enter_async_context(Service(auth.target)) for _ in range(4)]
        for service in services:
            await service.ready()
            await service.refuses_soon("before")
        heard: list[bool] = []
        services[0].revoked.on_revoked(lambda each: heard.append(each.cut_streams))
        await auth.revoke("during", cut_streams=True)
        for service in services:
            await service.refuses_soon("during")
            assert not service.refuses("another")
        assert heard == [True]


async def test_r23_a_stream_lasts_no_longer_than_a_call_and_the_next_one_follows(tmp_path: Path) -> None:
    auth = Auth(tmp_path)
    await auth.start(max_call_s=0.3)
    async with Service(auth.target) as service:
        await service.ready()
        for n in range(4):
            await auth.revoke(f"t{n}")
            await service.refuses_soon(f"t{n}")
        assert all(watching.age_s < 5 for watching in service.watching)
    await auth.stop()


async def test_r23_auth_drains_at_once_and_is_found_again(auth: Auth) -> None:
    async with Service(auth.target) as service:
        await service.ready()
        await auth.revoke("first")
        await service.refuses_soon("first")
        await auth.stop()
        assert service.refuses("first")
        await auth.revoke("while it was away")
        await auth.start()
        await service.refuses_soon("while it was away")
        assert service.refuses("first")


async def test_r23_a_connection_that_goes_silent_is_given_up(auth: Auth) -> None:
    async with TcpProxy(auth.target) as proxy, Service(proxy.target) as service:
        await service.ready()
        await auth.revoke("first")
        await service.refuses_soon("first")
        await proxy.black_hole()
        await auth.revoke("unheard")
        await eventually(lambda: service.watching[0].age_s > 2, timeout_s=WITHIN_S)
        assert service.refuses("first")
        assert not service.refuses("unheard")
        await proxy.heal()
        await service.refuses_soon("unheard")


async def test_the_policy_arrives_as_it_is(auth: Auth) -> None:
    role = Role(
        "small-models",
        description="Small models at work.",
        rules=(
            Rule(
                "small",
                Effect.ALLOW,
                frozenset({"generate"}),
                Condition(
                    models=("tiny-*",),
                    times=(TimeWindow((1, 2), 8 * 60, 18 * 60, "Europe/Paris"),),
                    max_tokens=100,
                    labels={"team": "a"},
                ),
            ),
        ),
    )
    async with Service(auth.target) as service:
        await service.ready()
        assert service.policy.engine.document == (await auth.store.policy())[1]
        version = await auth.store.commit(Batch(CLOCK.now(), "acme/alice", writes=[Put(role, create=True)]))
        auth.hub.wake()
        await eventually(lambda: service.policy.version == version, timeout_s=WITHIN_S)
        assert service.policy.engine.document == (await auth.store.policy())[1]
        assert role in service.policy.engine.document.roles
