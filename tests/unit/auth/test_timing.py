"""What the time of a proof tells of a credential, and its files of the database's secrets: nothing."""

from __future__ import annotations

import base64
import contextlib
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from services.auth.credentials import keys
from services.auth.credentials.assertions import Assertions
from services.auth.credentials.last_use import LastUse
from services.auth.credentials.proof import Proofs
from services.auth.signing.master_key import Sealer
from services.auth.signing.ring import KeyRing
from services.auth.store import ApiKey, Batch, Client, Put, Tenant
from services.auth.stores.memory import MemoryStore
from services.auth.stores.opening import sqlite_store
from services.mesh.clock import ManualClock
from services.mesh.errors import CredentialInvalid

ROUNDS = 1500
MAX_SIGNAL = 0.10
"""Of the median. What an early end of a comparison of 32 bytes would save is far less than that; a query left
out, or a digest, is far more."""


def _with_checksum(body: str) -> str:
    return f"llmos_{body}{keys._checksum(body)}"


def _other(character: str) -> str:
    return "b" if character == "a" else "a"


class Timed:
    """A store with one client and key, and the time of attempts to prove others."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore()
        self.secret, self.key = keys.new_client_secret(), keys.new_api_key()
        assertions = Assertions(self.store, self.clock, audiences=frozenset({"https://auth.example"}))
        last_use = LastUse(self.store, self.clock)
        self.proofs = Proofs(self.store, self.clock, assertions, last_use, {})

    async def fill(self) -> None:
        parsed = keys.parse_api_key(self.key)
        writes = [
            Put(Tenant("acme"), create=True),
            Put(Client("app", "acme", secret_digest=keys.digest(self.secret)), create=True),
            Put(ApiKey("key_1", "app", parsed.prefix, parsed.digest), create=True),
        ]
        await self.store.commit(Batch(at=self.clock.now(), actor="acme/root", writes=writes))

    async def medians_s(self, *attempts: Callable[[], Awaitable[object]]) -> list[float]:
        """Of each attempt, all of which are refused; taken in turn, so that what slows one slows all."""
        took_s: list[list[float]] = [[] for _ in attempts]
        for number in range(ROUNDS):
            order = range(len(attempts)) if number % 2 else reversed(range(len(attempts)))
            for index in order:
                began_s = time.perf_counter()
                with contextlib.suppress(CredentialInvalid):
                    await attempts[index]()
                    raise AssertionError("a wrong credential was accepted")
                took_s[index].append(time.perf_counter() - began_s)
        return [statistics.median(times) for times in took_s]


@pytest.fixture
async def timed() -> Timed:
    timed = Timed()
    await timed.fill()
    return timed


def assert_alike(medians_s: list[float]) -> None:
    """The first two are the same attempt: what they differ by is noise."""
    first, again, *others = medians_s
    noise = abs(first - again)
    for other in others:
        assert abs(other - first) <= 4 * noise + MAX_SIGNAL * first, [1e6 * each for each in medians_s]


async def test_r24_a_key_wrong_in_its_first_or_last_byte(timed: Timed) -> None:
    """Of the secret part: the first eight characters find the key, and are no secret."""
    body = timed.key[len("llmos_") : -6]
    wrong_first = _with_checksum(body[:8] + _other(body[8]) + body[9:])
    wrong_last = _with_checksum(body[:-1] + _other(body[-1]))
    assert_alike(
        await timed.medians_s(
            lambda: timed.proofs.api_key(wrong_first),
            lambda: timed.proofs.api_key(wrong_first),
            lambda: timed.proofs.api_key(wrong_last),
        )
    )


async def test_r24_a_secret_wrong_in_its_first_or_last_byte(timed: Timed) -> None:
    wrong_first = _other(timed.secret[0]) + timed.secret[1:]
    wrong_last = timed.secret[:-1] + _other(timed.secret[-1])
    assert_alike(
        await timed.medians_s(
            lambda: timed.proofs.client("app", wrong_first),
            lambda: timed.proofs.client("app", wrong_first),
            lambda: timed.proofs.client("app", wrong_last),
        )
    )


@pytest.mark.parametrize("text", ["' OR '1'='1", "app'--", 'app"; DROP TABLE resources', "%", "_", "*", "\\"])
async def test_r24_metacharacters_are_characters(timed: Timed, text: str) -> None:
    for client_id, secret in ((text, timed.secret), ("app", text), (text, text)):
        with pytest.raises(CredentialInvalid):
            await timed.proofs.client(client_id, secret)
    with pytest.raises(CredentialInvalid):
        await timed.proofs.api_key(f"llmos_{text}")


def forms(secret: bytes) -> Iterator[bytes]:
    """How a secret could stand in a file."""
    yield secret
    yield secret[6:]
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    for shift in range(3):  # base64 of something that the secret stands in the middle of
        padded = b"\0" * shift + secret
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(padded)[4:-4]
    yield secret.decode("latin-1").encode("utf-16-le")
    yield secret.decode("latin-1").encode("utf-16-be")


def contents(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in folder.iterdir()]


async def test_r24_a_dump_of_the_store_has_no_secret(tmp_path: Path) -> None:
    clock = ManualClock()
    store = sqlite_store(tmp_path / "auth.db")
    await store.start()
    master = os.urandom(32)
    ring = KeyRing(
        store, clock, rotation_s=86_400, publish_ahead_s=3600, token_ttl_s=300, sealer=Sealer(master)
    )
    secrets = [master]
    try:
        await ring.start()
        for number in range(20):
            secret, key = keys.new_client_secret(), keys.new_api_key()
            secrets += [secret.encode(), key.encode(), key.encode()[len("llmos_") + 8 : -6]]
            parsed = keys.parse_api_key(key)
            client = Client(f"app-{number}", "acme", secret_digest=keys.digest(secret))
            writes = [
                *([Put(Tenant("acme"), create=True)] if not number else []),
                Put(client, create=True),
                Put(ApiKey(f"key_{number}", f"app-{number}", parsed.prefix, parsed.digest), create=True),
            ]
            await store.commit(Batch(at=clock.now(), actor="acme/root", writes=writes))
        private = ring.current()[1].private_key.private_bytes_raw()  # type: ignore[union-attr]
        secrets.append(private)
        await ring.stop()
        dumps = contents(tmp_path)  # with the write-ahead log
    finally:
        await store.stop()
    dumps += contents(tmp_path)
    whole = b"\n".join(dumps)
    assert b"app-19" in whole
    for each in secrets:
        for form in forms(each):
            assert form not in whole
