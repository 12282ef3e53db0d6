"""The chain on a real server: order, errors, deadlines and limits, in all four arities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from services.mesh import context as request_context
from services.mesh import errors
from services.mesh.clock import SystemClock
from services.mesh.context import Caller, Identity
from services.mesh.health import Health
from services.mesh.interceptors import server_chain
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.settings import ServiceSettings

ARITIES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
OPEN = "/test.Service/Open"


class Settings(ServiceSettings):
    service = "test"


async def authenticate(method: str, metadata: Any, source: str) -> Caller:
    if metadata.get("authorization") != "Bearer right":
        raise errors.CredentialInvalid("The credential is not known.")
    return Caller(Identity("acme", "web", "", frozenset({"generate"})), None)


class Behaviour:
    """What the handlers do; a test sets `act`."""

    def __init__(self) -> None:
        self.act: Callable[[], Awaitable[None]] = self.nothing
        self.ended = asyncio.Event()
        self.seen: list[request_context.RequestContext] = []

    async def nothing(self) -> None: ...

    async def run(self) -> None:
        self.seen.append(request_context.require_current())
        try:
            await self.act()
        finally:
            self.ended.set()


def handlers(behaviour: Behaviour) -> grpc.GenericRpcHandler[Any, Any]:
    async def unary(request: Any, _: Any) -> bytes:
        await behaviour.run()
        return b"answer"

    async def stream(request: Any, _: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await behaviour.run()
        yield b"answer"

    return grpc.method_handlers_generic_handler(
        "test.Service",
        {
            "unary_unary": grpc.unary_unary_rpc_method_handler(unary),
            "unary_stream": grpc.unary_stream_rpc_method_handler(stream),
            "stream_unary": grpc.stream_unary_rpc_method_handler(unary),
            "stream_stream": grpc.stream_stream_rpc_method_handler(stream),
            "Open": grpc.unary_unary_rpc_method_handler(unary),
        },
    )


class Harness:
    def __init__(self, tmp: Path, **overrides: Any) -> None:
        values: dict[str, Any] = {
            "grpc_port": 0,
            "metrics_port": 0,
            "state_dir": tmp,
            "service_secret_file": tmp / "secret",
        }
        self.settings = Settings(**(values | overrides))
        self.running = RunningCalls(self.settings.max_concurrent_calls)
        self.behaviour = Behaviour()
        self.health = Health()
        self.watches: set[str] = set()
        chain = server_chain(
            clock=SystemClock(),
            running=self.running,
            authenticator=authenticate,
            open_methods=frozenset({OPEN}),
            watch_methods=self.watches,
            max_call_s=self.settings.max_call_s,
            adopt_request_id=False,
        )
        self.links = list(chain.links)
        self.server = GrpcServer(self.settings, chain=chain, running=self.running, health=self.health)

    async def __aenter__(self) -> Harness:
        def register(servicer: Behaviour, server: grpc.aio.Server) -> None:
            server.add_generic_rpc_handlers((handlers(servicer),))

        await self.server.add(register, self.behaviour, "test.Service")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.server.ports['grpc']}")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.server.drain(0)

    async def call(
        self, arity: str, *, credential: str | None = "right", timeout_s: float | None = 10
    ) -> tuple[list[bytes], Any]:
        """The responses, and the call itself."""
        metadata = [("authorization", f"Bearer {credential}")] if credential else []
        request: Any = iter([b"question"]) if arity.startswith("stream") else b"question"
        path = f"/test.Service/{arity}"
        call = getattr(self.channel, arity if arity in ARITIES else "unary_unary")(path)(
            request, timeout=timeout_s, metadata=metadata
        )
        try:
            if arity.endswith("stream"):
                return [response async for response in call], call
            return [await call], call
        finally:
            call.cancel()


def reason(error: grpc.aio.AioRpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    details = rpc_status.from_call(error)
    assert details is not None
    assert details.details[0].Unpack(info)
    assert info.domain == "llmos"
    assert info.metadata["hint"]
    assert info.metadata["request_id"].startswith("req_")
    return str(info.reason)


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def refused(harness: Harness, arity: str, **arguments: Any) -> grpc.aio.AioRpcError:
    for _ in range(20):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.call(arity, **arguments)
        # grpc.aio's client loses the status of a call that ends while it writes (grpc/grpc issue 36066).
        if not (arity.startswith("stream") and caught.value.details() == "Internal error from Core"):
            break
    return caught.value


async def test_the_order_is_the_explained_one(tmp_path: Path) -> None:
    import services.mesh.interceptors as module

    assert module.__doc__ is not None
    explained = [line.split("`")[1] for line in module.__doc__.splitlines() if line[:1].isdigit()]
    async with Harness(tmp_path) as harness:
        assert harness.links == explained


@pytest.mark.parametrize("arity", ARITIES)
async def test_an_answer_names_its_request_and_trace(tmp_path: Path, arity: str) -> None:
    async with Harness(tmp_path) as harness:
        responses, call = await harness.call(arity)
        assert responses[-1] == b"answer"
        named = await (call.initial_metadata() if arity.endswith("stream") else call.trailing_metadata())
        assert dict(named)["x-request-id"] == harness.behaviour.seen[0].request_id
        assert harness.behaviour.seen[0].identity.tenant_id == "acme"


@pytest.mark.parametrize("arity", ARITIES)
async def test_an_error_of_the_tree_arrives_with_reason_hint_and_request_id(
    tmp_path: Path, arity: str
) -> None:
    async with Harness(tmp_path) as harness:

        async def act() -> None:
            raise errors.ConcurrencyLimit("Too much.", retry_after_s=2.5)

        harness.behaviour.act = act
        error = await refused(harness, arity)
        assert (error.code(), reason(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CONCURRENCY_LIMIT")
        status = rpc_status.from_call(error)
        assert status is not None
        retry = error_details_pb2.RetryInfo()
        assert status.details[1].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() == 2500


@pytest.mark.parametrize("arity", ARITIES)
async def test_a_fault_of_ours_shows_no_internals(tmp_path: Path, arity: str) -> None:
    async with Harness(tmp_path) as harness:

        async def act() -> None:
            raise KeyError("secret internals")

        harness.behaviour.act = act
        error = await refused(harness, arity)
        assert (error.code(), reason(error)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "secret" not in str(error)
        assert "KeyError" not in str(error)


@pytest.mark.parametrize("arity", ARITIES)
@pytest.mark.parametrize("credential", [None, "wrong"])
async def test_without_a_right_credential_nothing_runs(
    tmp_path: Path, arity: str, credential: str | None
) -> None:
    async with Harness(tmp_path) as harness:
        error = await refused(harness, arity, credential=credential)
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        assert harness.behaviour.seen == []


async def test_of_two_credentials_none_is_preferred(tmp_path: Path) -> None:
    async with Harness(tmp_path) as harness:
        metadata = [("authorization", "Bearer wrong"), ("authorization", "Bearer right")]
        call = harness.channel.unary_unary("/test.Service/unary_unary")(b"", metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_an_open_method_needs_no_credential(tmp_path: Path) -> None:
    async with Harness(tmp_path) as harness:
        assert (await harness.call("Open", credential=None))[0] == [b"answer"]


@pytest.mark.parametrize("arity", ARITIES)
async def test_r01_the_callers_deadline_ends_the_work(tmp_path: Path, arity: str) -> None:
    async with Harness(tmp_path) as harness:
        harness.behaviour.act = asyncio.Event().wait  # type: ignore[assignment]
        error = await refused(harness, arity, timeout_s=0.3)
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(harness.behaviour.ended.wait(), 1)


@pytest.mark.parametrize("arity", ARITIES)
async def test_r01_without_a_deadline_the_servers_cap_holds(tmp_path: Path, arity: str) -> None:
    async with Harness(tmp_path, max_call_s=0.2) as harness:
        harness.behaviour.act = asyncio.Event().wait  # type: ignore[assignment]
        error = await refused(harness, arity, timeout_s=None)
        assert (error.code(), reason(error)) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("arity", ARITIES)
async def test_a_cancelled_call_frees_its_place(tmp_path: Path, arity: str) -> None:
    async with Harness(tmp_path) as harness:
        begun = asyncio.Event()

        async def act() -> None:
            begun.set()
            await asyncio.Event().wait()

        harness.behaviour.act = act
        task = asyncio.create_task(harness.call(arity))
        await asyncio.wait_for(begun.wait(), 5)
        task.cancel()
        await asyncio.wait_for(harness.behaviour.ended.wait(), 5)
        assert await harness.running.drain(5) == 0


@pytest.mark.parametrize("arity", ARITIES)
async def test_r11_beyond_the_limit_calls_are_refused_at_once(tmp_path: Path, arity: str) -> None:
    async with Harness(tmp_path, max_concurrent_calls=2) as harness:
        release, at_work = asyncio.Event(), []
        two = asyncio.Event()

        async def act() -> None:
            at_work.append(len(harness.running))
            if len(at_work) == 2:
                two.set()
            await release.wait()

        harness.behaviour.act = act
        tasks = [asyncio.create_task(harness.call(arity)) for _ in range(2)]
        await asyncio.wait_for(two.wait(), 5)
        for _ in range(8):
            error = await refused(harness, arity, timeout_s=2)
            assert reason(error) == "CONCURRENCY_LIMIT"
        release.set()
        await asyncio.gather(*tasks)
        assert max(at_work) == 2


@pytest.mark.parametrize("arity", ["unary_unary", "unary_stream"])
async def test_a_drain_lets_calls_finish_and_awaits_what_it_cancels(tmp_path: Path, arity: str) -> None:
    async with Harness(tmp_path) as harness:
        begun = asyncio.Event()
        cleaned = asyncio.Event()

        async def act() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, lambda: None))
                cleaned.set()

        harness.behaviour.act = act
        task = asyncio.create_task(refused(harness, arity))
        await asyncio.wait_for(begun.wait(), 5)
        await asyncio.wait_for(harness.server.drain(0.1), 2)
        assert cleaned.is_set()
        assert len(harness.running) == 0
        assert reason(await task) == "DRAINING"


@pytest.mark.parametrize("arity", ["unary_unary", "unary_stream"])
async def test_a_watch_ends_when_the_drain_begins(tmp_path: Path, arity: str) -> None:
    async with Harness(tmp_path) as harness:
        begun = asyncio.Event()

        async def act() -> None:
            begun.set()
            await asyncio.Event().wait()

        harness.behaviour.act = act
        harness.watches.add(f"/test.Service/{arity}")
        task = asyncio.create_task(refused(harness, arity))
        await asyncio.wait_for(begun.wait(), 5)
        await asyncio.wait_for(harness.server.drain(30), 2)
        assert reason(await task) == "DRAINING"


async def test_a_health_watcher_does_not_hold_up_the_drain(tmp_path: Path) -> None:
    async with Harness(tmp_path) as harness:
        await harness.health.started()
        watch = health_pb2_grpc.HealthStub(harness.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await harness.health.drain()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.wait_for(harness.server.drain(30), 2)


async def test_a_reader_that_takes_nothing_loses_its_stream(tmp_path: Path) -> None:
    async with Harness(tmp_path, write_timeout_s=0.2) as harness:
        ended = asyncio.Event()

        async def flood(request: Any, _: Any) -> AsyncIterator[bytes]:
            try:
                for _ in range(10_000):
                    yield bytes(64 * 1024)
            finally:
                ended.set()

        handler = grpc.method_handlers_generic_handler(
            "test.Flood", {"Flood": grpc.unary_stream_rpc_method_handler(flood)}
        )
        await harness.server.add(
            lambda _, server: server.add_generic_rpc_handlers((handler,)), None, "test.Flood"
        )
        metadata = [("authorization", "Bearer right")]
        call = harness.channel.unary_stream("/test.Flood/Flood")(b"", metadata=metadata)
        await call.read()
        await asyncio.wait_for(ended.wait(), 5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
        assert reason(caught.value) == "READER_STALLED"
