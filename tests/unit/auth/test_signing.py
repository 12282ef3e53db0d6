"""Signing keys: published before they sign, retired after the last token, the same after any restart."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.auth.grants.tokens import Grant, TokenIssuer
from services.auth.signing.master_key import EnvelopeSealer, KeyManagement, Sealer, Sealing, load
from services.auth.signing.ring import KeyRing
from services.auth.store import SigningKey
from services.auth.stores.memory import MemoryStore
from services.mesh.app import StartError
from services.mesh.clock import ManualClock
from services.mesh.errors import DataCorrupt, DependencyUnavailable
from services.mesh.jwks import JwksCache, parse_jwks
from services.mesh.tokens import Audience, Verifier

ROTATION_S, AHEAD_S, TTL_S = 1000.0, 100.0, 60.0


class LocalKeys:
    """The port of a key management service over a master key in this process."""

    def __init__(self, master_key: bytes) -> None:
        """Raises ValueError unless the key has 32 bytes."""
        self._sealer = Sealer(master_key)

    async def wrap(self, data_key: bytes) -> bytes:
        return await self._sealer.seal("data-key", data_key)

    async def unwrap(self, wrapped: bytes) -> bytes:
        return await self._sealer.open("data-key", wrapped)


def ring_of(store: MemoryStore, clock: ManualClock, sealer: Sealing | None = None) -> KeyRing:
    return KeyRing(
        store, clock, rotation_s=ROTATION_S, publish_ahead_s=AHEAD_S, token_ttl_s=TTL_S, sealer=sealer
    )


def published(ring: KeyRing) -> set[str]:
    return set(parse_jwks(ring.jwks_json()))


async def test_the_steps_of_a_rotation() -> None:
    store, clock = MemoryStore(), ManualClock()
    ring = ring_of(store, clock)
    await ring.start()
    first, _ = ring.current()
    assert published(ring) == {first}

    await clock.advance(ROTATION_S - AHEAD_S - 1)
    assert published(ring) == {first}
    await clock.advance(2)
    (second,) = published(ring) - {first}
    assert ring.current()[0] == first

    await clock.advance(AHEAD_S)
    assert ring.current()[0] == second
    assert published(ring) == {first, second}

    await clock.advance(TTL_S + 40)
    assert published(ring) == {second}
    assert [key.kid for key in await store.signing_keys()] == [second]
    await ring.stop()


async def test_a_restart_changes_nothing() -> None:
    store, clock = MemoryStore(), ManualClock()
    seen: list[tuple[str, set[str]]] = []
    for _ in range(2):
        ring = ring_of(store, clock)
        await ring.start()
        seen.append((ring.current()[0], published(ring)))
        await ring.stop()
    assert seen[0] == seen[1]


async def test_after_a_long_stop_the_old_key_signs_until_the_new_one_is_known() -> None:
    store, clock = MemoryStore(), ManualClock()
    ring = ring_of(store, clock)
    await ring.start()
    old, _ = ring.current()
    await ring.stop()
    await clock.advance(50 * ROTATION_S)
    ring = ring_of(store, clock)
    await ring.start()
    assert ring.current()[0] == old
    assert len(published(ring)) == 2
    await clock.advance(AHEAD_S)
    assert ring.current()[0] != old
    await ring.stop()


async def test_r22_rotation_refuses_no_honest_token() -> None:
    """Verifiers that fetch at their interval, through many rotations: every token passes for all its life."""
    store, clock = MemoryStore(), ManualClock()
    ring = KeyRing(store, clock, rotation_s=5, publish_ahead_s=3, token_ttl_s=20)
    await ring.start()
    issuer = TokenIssuer(ring, clock, issuer="https://a", ttl_s=20, service_ttl_s=20)
    fetches = 0

    class Port:
        async def fetch(self) -> str:
            nonlocal fetches
            fetches += 1
            return ring.jwks_json()

    jwks = JwksCache(Port(), clock, refresh_interval_s=1, min_interval_s=1)
    alive: list[str] = []
    kids: set[str] = set()
    for second in range(120):
        alive = [*alive, issuer.issue(Grant("app", Audience.GATEWAY, frozenset(), "t")).token][-20:]
        for token in alive:
            fresh = Verifier(jwks, issuer="https://a", audience=Audience.GATEWAY, clock=clock)
            assert (await fresh.verify(token)).subject == "app"
        kids.add(ring.current()[0])
        await clock.advance(1)
        assert fetches <= second + 2
    assert len(kids) >= 20
    assert len(await store.signing_keys()) < 15
    await ring.stop()


async def test_a_store_that_fails_stops_no_signing(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(MemoryStore):
        down = False

        async def add_signing_key(self, key: SigningKey, *, after_kid: str) -> bool:
            if self.down:
                raise DependencyUnavailable("disk full")
            return await super().add_signing_key(key, after_kid=after_kid)

    store, clock = Failing(), ManualClock()
    ring = ring_of(store, clock)
    await ring.start()
    first, _ = ring.current()
    store.down = True
    await clock.advance(2 * ROTATION_S)
    assert ring.current()[0] == first
    assert "disk full" in caplog.text
    store.down = False
    await clock.advance(10 + AHEAD_S)
    assert ring.current()[0] != first
    await ring.stop()


async def test_the_set_holds_no_private_part() -> None:
    ring = ring_of(MemoryStore(), ManualClock())
    await ring.start()
    (entry,) = json.loads(ring.jwks_json())["keys"]
    assert entry.keys() == {"kty", "crv", "use", "alg", "kid", "x"}
    assert not parse_jwks(ring.jwks_json())[entry["kid"]].is_private
    await ring.stop()


class TestAtRest:
    async def started(self, store: MemoryStore, sealer: Sealing | None) -> str:
        ring = ring_of(store, ManualClock(), sealer)
        try:
            await ring.start()
            return ring.current()[0]
        finally:
            await ring.stop()

    async def test_private_keys_are_encrypted_where_a_key_is_configured(self) -> None:
        store, sealer = MemoryStore(), Sealer(os.urandom(32))
        kid = await self.started(store, sealer)
        (stored,) = await store.signing_keys()
        assert stored.sealed
        assert len(stored.private) == 12 + 32 + 16
        assert await self.started(store, sealer) == kid

    async def test_a_key_that_was_plain_is_encrypted_at_the_next_start(self) -> None:
        store = MemoryStore()
        kid = await self.started(store, None)
        (plain,) = await store.signing_keys()
        assert await self.started(store, Sealer(os.urandom(32))) == kid
        (sealed,) = await store.signing_keys()
        assert sealed.sealed
        assert plain.private not in sealed.private

    async def test_without_the_key_it_refuses_to_start(self) -> None:
        store = MemoryStore()
        await self.started(store, Sealer(os.urandom(32)))
        with pytest.raises(StartError, match="KEY_ENCRYPTION_KEY_FILE"):
            await self.started(store, None)
        with pytest.raises(StartError, match="another key encryption key"):
            await self.started(store, Sealer(os.urandom(32)))

    async def test_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "kek"
        path.write_text(base64.b64encode(os.urandom(32)).decode() + "\n")
        sealer = Sealer.from_file(path)
        assert await sealer.open("kid", await sealer.seal("kid", b"private")) == b"private"
        for wrong in ("", "short", base64.b64encode(os.urandom(16)).decode(), "!" * 44):
            path.write_text(wrong)
            with pytest.raises(StartError, match="openssl rand"):
                Sealer.from_file(path)
        with pytest.raises(StartError, match="cannot be read"):
            Sealer.from_file(tmp_path / "nowhere")


class TestMasterKeys:
    def test_from_the_environment(self) -> None:
        good = SecretStr(base64.b64encode(os.urandom(32)).decode())
        assert load(None, good, "MASTER") is not None
        assert load(None, None, None) is None
        with pytest.raises(StartError, match=r"MASTER.*is not set"):
            load(None, None, "MASTER")
        with pytest.raises(StartError, match=r"MASTER must be 32 bytes.*openssl rand") as caught:
            load(None, SecretStr("too-short-but-secret"), "MASTER")
        assert "too-short" not in str(caught.value)

    async def test_an_envelope_keeps_each_key_under_a_key_of_its_own(self) -> None:
        wrapped: list[bytes] = []

        class Recording(LocalKeys):
            async def wrap(self, data_key: bytes) -> bytes:
                wrapped.append(data_key)
                return await super().wrap(data_key)

        keys: KeyManagement = Recording(os.urandom(32))
        sealer = EnvelopeSealer(keys)
        sealed = [await sealer.seal("kid", b"x" * 32) for _ in range(2)]
        assert len(set(wrapped)) == 2
        assert all(data_key not in entry for data_key in wrapped for entry in sealed)
        assert [await sealer.open("kid", entry) for entry in sealed] == [b"x" * 32] * 2

    @pytest.mark.parametrize("envelope", [False, True])
    async def test_what_was_changed_or_moved_does_not_open(self, envelope: bool) -> None:
        master = os.urandom(32)
        sealer: Sealing = EnvelopeSealer(LocalKeys(master)) if envelope else Sealer(master)
        sealed = await sealer.seal("kid", b"x" * 32)
        with pytest.raises(DataCorrupt):
            await sealer.open("other", sealed)
        for place in range(len(sealed)):
            changed = bytearray(sealed)
            changed[place] ^= 1
            with pytest.raises(DataCorrupt):
                await sealer.open("kid", bytes(changed))
        for length in range(len(sealed)):
            with pytest.raises(DataCorrupt):
                await sealer.open("kid", sealed[:length])

    async def test_signing_keys_in_envelopes(self) -> None:
        store, sealer = MemoryStore(), EnvelopeSealer(LocalKeys(os.urandom(32)))
        kids = []
        for _ in range(2):
            ring = ring_of(store, ManualClock(), sealer)
            await ring.start()
            kids.append(ring.current()[0])
            await ring.stop()
        assert kids[0] == kids[1]


class TestSeveralProcesses:
    async def test_r22_each_publishes_the_next_key_before_any_signs_with_it(self) -> None:
        store, clock = MemoryStore(), ManualClock()
        rings = [KeyRing(store, clock, rotation_s=20, publish_ahead_s=8, token_ttl_s=15) for _ in range(3)]
        await asyncio.gather(*(ring.start() for ring in rings))
        signed: set[str] = set()
        for _ in range(400):
            signing = {ring.current()[0] for ring in rings}
            assert len(signing) == 1
            signed |= signing
            for ring in rings:
                assert signing <= published(ring)
            await clock.advance(0.5)
        assert len(signed) == 10
        assert len(await store.signing_keys()) <= 4
        for ring in rings:
            await ring.stop()

    async def test_they_begin_with_one_key(self) -> None:
        store, clock = MemoryStore(), ManualClock()
        rings = [ring_of(store, clock) for _ in range(5)]
        await asyncio.gather(*(ring.start() for ring in rings))
        assert len(await store.signing_keys()) == 1
        assert len({ring.current()[0] for ring in rings}) == 1
        for ring in rings:
            await ring.stop()

    async def test_keys_that_vanish_are_kept_in_use(self, caplog: pytest.LogCaptureFixture) -> None:
        store, clock = MemoryStore(), ManualClock()
        ring = ring_of(store, clock)
        await ring.start()
        kid, _ = ring.current()
        await store.delete_signing_key(kid)
        await clock.advance(20)
        assert ring.current()[0] == kid
        assert "are gone" in caplog.text
        await ring.stop()


async def test_r32_no_key_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = MemoryStore()
    ring = ring_of(store, ManualClock())
    await ring.start()
    await ring.stop()
    (key,) = await store.signing_keys()
    assert repr(key.private) not in caplog.text + repr(key)
    assert key.private.hex() not in caplog.text + repr(key)
