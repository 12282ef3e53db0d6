"""The keys that tokens are signed with, and their rotation: publish, then sign, then retire.

Each key signs from its `signs_from` until the next key's. The next one is made, and published, a while
before it signs, so that every verifier has fetched it by then; a key that no longer signs stays published
until the last token that it signed has expired. All of this follows from the clock and the stored keys
alone, so a restart at any moment changes nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from joserfc.jwk import OKPKey

from services.auth.store import SigningKey, Store
from services.mesh.access_token import ALGORITHM
from services.mesh.app import StartError
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError

log = logging.getLogger(__name__)

RETIRE_MARGIN_S = 30.0
"""Beyond a token's life: for clocks that differ."""
MAX_PAUSE_S = 60.0
RETRY_S = 5.0
_NONCE_BYTES = 12


class Sealer:
    """Encrypts private keys at rest with AES-256-GCM, bound to their id."""

    def __init__(self, key: bytes) -> None:
        """Raises ValueError unless the key has 32 bytes."""
        if len(key) != 32:
            raise ValueError("the key must have 32 bytes")
        self._cipher = AESGCM(key)

    @classmethod
    def from_file(cls, path: Path) -> Sealer:
        """Raises StartError where the file does not hold 32 bytes in base64."""
        try:
            return cls(base64.b64decode(path.read_text().strip(), validate=True))
        except OSError as error:
            raise StartError(f"the key encryption key {path} cannot be read: {error.strerror}") from None
        except (ValueError, binascii.Error):
            raise StartError(
                f"the key encryption key {path} must be 32 bytes in base64: make one with "
                "`openssl rand -base64 32`"
            ) from None

    def seal(self, kid: str, private: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, private, kid.encode())

    def open(self, kid: str, sealed: bytes) -> bytes:
        """Raises cryptography's InvalidTag where it was sealed with another key, or changed."""
        return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], kid.encode())


class KeyRing:
    """A component. Also the `KeySource` that this process verifies with, so that it needs no network."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        rotation_s: float,
        publish_ahead_s: float,
        token_ttl_s: float,
        sealer: Sealer | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._rotation = timedelta(seconds=rotation_s)
        self._publish_ahead = timedelta(seconds=publish_ahead_s)
        self._kept_after = timedelta(seconds=token_ttl_s + RETIRE_MARGIN_S)
        self._sealer = sealer
        self._keys: Sequence[SigningKey] = ()
        self._opened: dict[str, OKPKey] = {}
        self._rotating: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises StartError where a stored key cannot be read."""
        self._keys = await self._store.signing_keys()
        for key in self._keys:
            self._opened[key.kid] = self._open(key)
            if self._sealer is not None and not key.sealed:
                await self._store.put_signing_key(self._seal(key))
        await self.rotate()
        self._rotating = asyncio.create_task(self._rotate_for_ever(), name="key-rotation")

    async def stop(self) -> None:
        if self._rotating is not None:
            self._rotating.cancel()
            await asyncio.gather(self._rotating, return_exceptions=True)

    def current(self) -> tuple[str, OKPKey]:
        """The id and the private key to sign with now."""
        now = self._clock.now()
        # should the wall clock have gone back before all of them, the oldest signs
        kid = next((key.kid for key in reversed(self._keys) if key.signs_from <= now), self._keys[0].kid)
        return kid, self._opened[kid]

    def jwks_json(self) -> str:
        """All published keys as a JWK Set, public parts only."""
        return json.dumps({"keys": [_public_jwk(key.kid, self._opened[key.kid]) for key in self._keys]})

    async def key(self, kid: str) -> OKPKey | None:
        return self._opened.get(kid)

    def knows(self, kid: str) -> bool:
        return kid in self._opened

    async def rotate(self) -> float:
        """Does what is due: makes the next key, retires old ones. Returns the seconds until more is due."""
        now = self._clock.now()
        if not self._keys:
            await self._add(signs_from=now)
        due = self._keys[-1].signs_from + self._rotation
        if now >= due - self._publish_ahead:
            # after a long stop the old key goes on until the new one is known everywhere
            due = max(due, now + self._publish_ahead)
            await self._add(signs_from=due)
            due += self._rotation
        events = [due - self._publish_ahead]
        for old, successor in pairwise(tuple(self._keys)):
            retires = successor.signs_from + self._kept_after
            if now >= retires:
                await self._retire(old)
            else:
                events.append(retires)
        return max((min(events) - now).total_seconds(), 0.0)

    async def _rotate_for_ever(self) -> None:
        pause_s = 0.0
        while True:
            # not longer than that: the wall clock may jump while the other one sleeps
            await self._clock.sleep(min(max(pause_s, 0.05), MAX_PAUSE_S))
            try:
                pause_s = await self.rotate()
            except LlmosError as error:
                log.warning("the signing keys could not be rotated, the present one signs on: %s", error)
                pause_s = RETRY_S

    async def _add(self, *, signs_from: datetime) -> None:
        private = Ed25519PrivateKey.generate()
        raw = private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        kid = secrets.token_hex(8)
        key = SigningKey(kid, raw, sealed=False, signs_from=signs_from)
        await self._store.put_signing_key(key if self._sealer is None else self._seal(key))
        self._opened[kid] = OKPKey.import_key(private)
        self._keys = [*self._keys, key]
        log.info("signing key %s was made; it signs from %s", kid, signs_from.isoformat(timespec="seconds"))

    async def _retire(self, key: SigningKey) -> None:
        await self._store.delete_signing_key(key.kid)
        self._keys = [other for other in self._keys if other.kid != key.kid]
        del self._opened[key.kid]
        log.info("signing key %s is retired", key.kid)

    def _seal(self, key: SigningKey) -> SigningKey:
        if self._sealer is None:
            return key
        return SigningKey(key.kid, self._sealer.seal(key.kid, key.private), True, key.signs_from)

    def _open(self, key: SigningKey) -> OKPKey:
        raw = key.private
        if key.sealed:
            if self._sealer is None:
                raise StartError(
                    "the signing keys in the database are encrypted: set "
                    "LLMOS_AUTH_KEY_ENCRYPTION_KEY_FILE to the file that they were encrypted with"
                )
            try:
                raw = self._sealer.open(key.kid, raw)
            except InvalidTag:
                raise StartError(
                    "the signing keys in the database were encrypted with another key encryption key: "
                    "configure that one"
                ) from None
        try:
            return OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(raw))
        except ValueError:
            raise StartError("a signing key in the database is damaged: put back a backup") from None


def _public_jwk(kid: str, key: OKPKey) -> dict[str, str]:
    raw = key.public_key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
    return {"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": ALGORITHM, "kid": kid, "x": x}
