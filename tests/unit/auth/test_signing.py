"""Signing keys: published before they sign, retired after the last token, the same after any restart."""

from __future__ import annotations

import base64
import json
import logging
import os
from pathlib import Path

import pytest

from services.auth.signing import KeyRing, Sealer
from services.auth.stores.memory import MemoryStore
from services.auth.tokens import Grant, TokenIssuer
from services.mesh.app import StartError
from services.mesh.clock import ManualClock
from services.mesh.errors import DependencyUnavailable
from services.mesh.jwks import JwksCache, parse_jwks
from services.mesh.tokens import Audience, Verifier

ROTATION_S, AHEAD_S, TTL_S = 1000.0, 100.0, 60.0


def ring_of(store: MemoryStore, clock: ManualClock, sealer: Sealer | None = None) -> KeyRing:
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
    issuer = TokenIssuer(ring, clock, issuer="https://a", ttl_s=20)
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

        async def put_signing_key(self, key: object) -> None:
            if self.down:
                raise DependencyUnavailable("disk full")
            await super().put_signing_key(key)  # type: ignore[arg-type]

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
    async def started(self, store: MemoryStore, sealer: Sealer | None) -> str:
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

    def test_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "kek"
        path.write_text(base64.b64encode(os.urandom(32)).decode() + "\n")
        sealer = Sealer.from_file(path)
        assert sealer.open("kid", sealer.seal("kid", b"private")) == b"private"
        for wrong in ("", "short", base64.b64encode(os.urandom(16)).decode(), "!" * 44):
            path.write_text(wrong)
            with pytest.raises(StartError, match="openssl rand"):
                Sealer.from_file(path)
        with pytest.raises(StartError, match="cannot be read"):
            Sealer.from_file(tmp_path / "nowhere")


async def test_r32_no_key_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = MemoryStore()
    ring = ring_of(store, ManualClock())
    await ring.start()
    await ring.stop()
    (key,) = await store.signing_keys()
    assert repr(key.private) not in caplog.text + repr(key)
    assert key.private.hex() not in caplog.text + repr(key)
