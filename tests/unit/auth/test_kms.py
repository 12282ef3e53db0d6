"""Signing keys under a key management service, over the plugin protocol of Kubernetes on a real socket."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.auth.signing.kms import request
from services.auth.signing.kms.clients import KmsPlugin
from services.auth.signing.master_key import EnvelopeSealer, Sealer
from services.auth.signing.ring import KeyRing
from services.auth.stores.memory import MemoryStore
from services.mesh.app import StartError
from services.mesh.clock import ManualClock
from services.mesh.errors import DataCorrupt, DependencyUnavailable


class Plugin:
    """Encrypts under the newest of its keys, and decrypts by what its annotations say."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.keys = [Sealer(os.urandom(32))]
        self.failure: grpc.StatusCode | None = None
        self._server: Any = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        handlers = {
            "Encrypt": grpc.unary_unary_rpc_method_handler(
                self._encrypt,
                request.EncryptRequest.FromString,
                request.EncryptResponse.SerializeToString,
            ),
            "Decrypt": grpc.unary_unary_rpc_method_handler(
                self._decrypt,
                request.DecryptRequest.FromString,
                request.DecryptResponse.SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(request.SERVICE, handlers)]
        )
        self._server.add_insecure_port(f"unix://{self.socket}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def _encrypt(self, asked: Any, context: Any) -> Any:
        if self.failure is not None:
            await context.abort(self.failure, "as told")
        newest = len(self.keys) - 1
        sealed = await self.keys[newest].seal("kms", asked.plaintext)
        return request.EncryptResponse(
            ciphertext=sealed, key_id=f"key-{newest}", annotations={"number.example": b"%d" % newest}
        )

    async def _decrypt(self, asked: Any, context: Any) -> Any:
        if self.failure is not None:
            await context.abort(self.failure, "as told")
        number = int(asked.annotations["number.example"])
        assert asked.key_id == f"key-{number}"
        return request.DecryptResponse(plaintext=await self.keys[number].open("kms", asked.ciphertext))


@pytest.fixture
async def plugin() -> AsyncIterator[Plugin]:
    with tempfile.TemporaryDirectory(prefix="llmos-kms-") as folder:  # a socket's path must be short
        plugin = Plugin(Path(folder) / "kms.sock")
        await plugin.start()
        yield plugin
        await plugin.stop()


def ring_of(store: MemoryStore, plugin: Plugin) -> KeyRing:
    sealer = EnvelopeSealer(KmsPlugin(plugin.socket))
    return KeyRing(store, ManualClock(), rotation_s=100, publish_ahead_s=10, token_ttl_s=10, sealer=sealer)


async def test_a_key_that_was_sealed_is_read_again_also_after_the_service_took_a_new_key(
    plugin: Plugin,
) -> None:
    store, kids = MemoryStore(), set()
    for _ in range(3):
        ring = ring_of(store, plugin)
        await ring.start()
        kids.add(ring.current()[0])
        await ring.stop()
        plugin.keys.append(Sealer(os.urandom(32)))
    assert len(kids) == 1
    (stored,) = await store.signing_keys()
    assert stored.sealed


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
async def test_a_service_that_fails_is_said_to(plugin: Plugin, code: grpc.StatusCode) -> None:
    keys = KmsPlugin(plugin.socket)
    wrapped = await keys.wrap(b"x" * 32)
    assert await keys.unwrap(wrapped) == b"x" * 32
    plugin.failure = code
    with pytest.raises(DependencyUnavailable, match=code.name):
        await keys.wrap(b"x" * 32)
    with pytest.raises(DependencyUnavailable, match=code.name):
        await keys.unwrap(wrapped)
    with pytest.raises(StartError, match="key management service"):
        await ring_of(MemoryStore(), plugin).start()


async def test_what_it_never_wrapped(plugin: Plugin) -> None:
    keys = KmsPlugin(plugin.socket)
    with pytest.raises(DataCorrupt):
        await keys.unwrap(b"\xff\xff\xff")
    plugin.failure = grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(DataCorrupt):
        await keys.unwrap(b"")


async def test_no_service(tmp_path: Path) -> None:
    with pytest.raises(DependencyUnavailable):
        await KmsPlugin(tmp_path / "nowhere").wrap(b"x" * 32)
