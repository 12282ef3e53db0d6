"""The calling side: what each call carries along, how errors arrive, and certificates that change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.dev.certs import CertificateAuthority
from services.mesh import context as request_context
from services.mesh import errors
from services.mesh.channel import IDENTITY_KEY, Channel, unpack_identity
from services.mesh.clock import SystemClock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.tls import TlsFiles

IDENTITY = Identity("acme", "web", "key-1", frozenset({"generate", "models.read"}))


class Seen:
    """What a bare server saw of the calls that it got."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.remaining_s: float | None = None
        self.certificates: list[bytes] = []
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()


async def start(seen: Seen, tls: TlsFiles | None = None) -> tuple[grpc.aio.Server, str]:
    def note(servicer_context: Any) -> None:
        seen.metadata = dict(servicer_context.invocation_metadata())
        seen.remaining_s = servicer_context.time_remaining()
        seen.certificates += servicer_context.auth_context().get("x509_pem_cert", [])
        seen.begun.set()

    async def unary(request: bytes, servicer_context: Any) -> bytes:
        note(servicer_context)
        if request == b"fail":
            await servicer_context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        return request

    async def stream(request: bytes, servicer_context: Any) -> AsyncIterator[bytes]:
        note(servicer_context)
        try:
            for number in range(3):
                yield bytes([number])
            if request == b"hang":
                await asyncio.Event().wait()
        finally:
            seen.ended.set()

    server = grpc.aio.server()
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", methods),))
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", tls.server_credentials())
    await server.start()
    return server, f"127.0.0.1:{port}"


class Tokens:
    async def token(self, audience: str) -> str:
        return f"token-for-{audience}"


async def test_a_call_carries_request_id_token_identity_and_what_is_left_of_the_deadline() -> None:
    seen, clock = Seen(), SystemClock()
    server, target = await start(seen)
    context = RequestContext("req_1", "/x/Y", deadline_s=clock.monotonic() + 2, caller=Caller(IDENTITY))
    token = request_context.enter(context)
    try:
        async with Channel(target, clock=clock, tokens=Tokens(), audience="llmos-logging") as channel:
            assert await channel.unary_unary("/test.Service/Unary")(b"hello", timeout=60) == b"hello"
    finally:
        request_context.leave(token)
        await server.stop(0)
    assert seen.metadata["x-request-id"] == "req_1"
    assert seen.metadata["authorization"] == "Bearer token-for-llmos-logging"
    assert unpack_identity(seen.metadata[IDENTITY_KEY]) == IDENTITY
    assert seen.remaining_s is not None
    assert 0 < seen.remaining_s <= 2.1  # gRPC rounds up what it sends


async def test_a_call_whose_deadline_has_passed_is_not_made() -> None:
    seen, clock = Seen(), SystemClock()
    server, target = await start(seen)
    token = request_context.enter(RequestContext("req_1", "/x/Y", deadline_s=clock.monotonic() - 1))
    try:
        async with Channel(target, clock=clock) as channel:
            with pytest.raises(errors.DeadlineExceeded):
                await channel.unary_unary("/test.Service/Unary")(b"hello")
    finally:
        request_context.leave(token)
        await server.stop(0)
    assert not seen.begun.is_set()


async def test_a_lost_service_is_an_error_of_the_tree() -> None:
    async with Channel("127.0.0.1:1", clock=SystemClock()) as channel:
        with pytest.raises(errors.DependencyUnavailable):
            await channel.unary_unary("/test.Service/Unary")(b"hello", timeout=5)
        with pytest.raises(errors.DependencyUnavailable):
            async for _ in channel.unary_stream("/test.Service/Stream")(b"hello", timeout=5):
                pass


async def test_a_stream_that_is_left_is_cancelled_on_the_other_side() -> None:
    seen = Seen()
    server, target = await start(seen)
    async with Channel(target, clock=SystemClock()) as channel:
        stream = channel.unary_stream("/test.Service/Stream")(b"hang")
        received = [response async for response in _first(stream, 3)]
        stream.cancel()
        assert received == [b"\0", b"\1", b"\2"]
        await asyncio.wait_for(seen.ended.wait(), 5)
    await server.stop(0)


async def test_who_is_cancelled_while_waiting_for_a_stream_goes_at_once_and_ends_it() -> None:
    seen = Seen()
    server, target = await start(seen)
    async with Channel(target, clock=SystemClock()) as channel:
        received: list[bytes] = []
        waits = asyncio.Event()

        async def read() -> None:
            async for response in channel.unary_stream("/test.Service/Stream")(b"hang"):
                received.append(response)
                if len(received) == 3:
                    # The reader's next step is to wait for what never comes.
                    asyncio.get_running_loop().call_soon(waits.set)

        reader = asyncio.create_task(read())
        await asyncio.wait_for(waits.wait(), 5)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(reader), 5)
        await asyncio.wait_for(seen.ended.wait(), 5)
    await server.stop(0)


async def test_a_deadline_around_the_reading_of_a_stream_is_kept() -> None:
    seen = Seen()
    server, target = await start(seen)
    async with Channel(target, clock=SystemClock()) as channel:
        received: list[bytes] = []

        async def read() -> None:
            async with asyncio.timeout(None) as timeout:
                async for response in channel.unary_stream("/test.Service/Stream")(b"hang"):
                    received.append(response)
                    if len(received) == 3:
                        timeout.reschedule(asyncio.get_running_loop().time())

        with pytest.raises(TimeoutError):
            await read()
        assert received == [b"\0", b"\1", b"\2"]
        await asyncio.wait_for(seen.ended.wait(), 5)
    await server.stop(0)


async def _first(stream: Any, count: int) -> AsyncIterator[bytes]:
    number = 0
    async for response in stream:
        yield response
        number += 1
        if number == count:
            return


def tls_files(authority: CertificateAuthority, name: str) -> TlsFiles:
    cert, key = authority.issue(name)
    return TlsFiles(cert, key, authority.ca_file)


async def test_without_a_certificate_of_the_authority_there_is_no_connection(tmp_path: Path) -> None:
    ours, foreign = CertificateAuthority(tmp_path / "ours"), CertificateAuthority(tmp_path / "foreign")
    seen = Seen()
    server, target = await start(seen, tls_files(ours, "server"))
    anonymous = grpc.ssl_channel_credentials(ours.ca_file.read_bytes())
    cert, key = foreign.issue("client")
    stranger = grpc.ssl_channel_credentials(ours.ca_file.read_bytes(), key.read_bytes(), cert.read_bytes())
    for credentials in (anonymous, stranger):
        async with grpc.aio.secure_channel(target, credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/test.Service/Unary")(b"hello", timeout=3)
            assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert not seen.begun.is_set()
    await server.stop(0)


async def test_a_replaced_certificate_is_used_by_the_next_connection(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path)
    seen, clock = Seen(), SystemClock()
    server, target = await start(seen, tls_files(authority, "server"))
    files = tls_files(authority, "client")
    async with Channel(target, clock=clock, tls=files) as channel:
        assert await channel.unary_unary("/test.Service/Unary")(b"one") == b"one"
        authority.issue("client")
        authority.issue("server")
        channel.check_certificates()
        assert await channel.unary_unary("/test.Service/Unary")(b"two") == b"two"
    await server.stop(0)
    assert len(set(seen.certificates)) == 2


async def test_a_half_replaced_pair_leaves_the_former_in_force(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path)
    files = tls_files(authority, "server")
    before = files.load()
    (tmp_path / "server.key").write_bytes(authority.issue("other")[1].read_bytes())
    assert files.load() == before
    assert files.version == 1
    authority.issue("server")
    assert files.load() != before
    assert files.version == 2
