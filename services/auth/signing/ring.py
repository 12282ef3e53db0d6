"""The keys that tokens are signed with, and their rotation: publish, then sign, then retire.

Each key signs from its `signs_from` until the next key's. The next one is made, and published, a while
before it signs, so that every verifier has fetched it by then; a key that no longer signs stays published
until the last token that it signed has expired. All of this follows from the clock and the stored keys
alone, so a restart at any moment changes nothing.

Several processes may share the keys: one of them makes the next key, whoever is first, and the others read
it long before it signs, so that each of them publishes it in time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from joserfc.jwk import OKPKey

from services.auth.signing.master_key import Sealing
from services.auth.store import SigningKey, Store
from services.mesh.access_token import ALGORITHM
from services.mesh.app import StartError
from services.mesh.clock import Clock
from services.mesh.errors import DataCorrupt, DependencyUnavailable, LlmosError

log = logging.getLogger(__name__)

RETIRE_MARGIN_S = 30.0
"""Beyond a token's life: for clocks that differ."""
MAX_RELOAD_S = 5.0
"""So often at least the stored keys are read again."""
RETRY_S = 5.0


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
        sealer: Sealing | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._rotation = timedelta(seconds=rotation_s)
        self._publish_ahead = timedelta(seconds=publish_ahead_s)
        self._kept_after = timedelta(seconds=token_ttl_s + RETIRE_MARGIN_S)
        self._sealer = sealer
        self._reload_s = min(publish_ahead_s / 4, MAX_RELOAD_S)
        self._keys: Sequence[SigningKey] = ()
        self._opened: dict[str, OKPKey] = {}
        self._rotating: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises StartError where a stored key cannot be read, or a new one not be sealed."""
        try:
            await self.rotate()
            for key in self._keys:
                if self._sealer is not None and not key.sealed:
                    await self._store.replace_signing_key(await self._seal(key))
        except DependencyUnavailable as error:
            raise StartError(f"there are no signing keys: {error.message}") from error
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
        """Reads what others did, and does what is due: makes the next key, retires old ones. Returns the
        seconds until more is due.
        """
        await self._reload()
        now = self._clock.now()
        if not self._keys:
            await self._add(signs_from=now)
        due = self._keys[-1].signs_from + self._rotation
        if now >= due - self._publish_ahead:
            # after a long stop the old key goes on until the new one is known everywhere
            await self._add(signs_from=max(due, now + self._publish_ahead))
        events = [self._keys[-1].signs_from + self._rotation - self._publish_ahead]
        for old, successor in pairwise(tuple(self._keys)):
            retires = successor.signs_from + self._kept_after
            if now >= retires:
                await self._retire(old)
            else:
                events.append(retires)
        return max((min(events) - now).total_seconds(), 0.0)

    async def _rotate_for_ever(self) -> None:
        pause_s = self._reload_s
        while True:
            await self._clock.sleep(min(max(pause_s, 0.05), self._reload_s))
            try:
                pause_s = await self.rotate()
            except (LlmosError, StartError) as error:
                log.warning("the signing keys could not be rotated, the present one signs on: %s", error)
                pause_s = RETRY_S

    async def _reload(self) -> None:
        """All of the stored keys or, where one cannot be read, none of what is new."""
        keys = await self._store.signing_keys()
        opened = {key.kid: self._opened.get(key.kid) or await self._open(key) for key in keys}
        if keys or not self._keys:
            self._keys, self._opened = keys, opened
        else:  # it was emptied under us: what was issued stays valid
            raise DataCorrupt("the signing keys are gone from the database")

    async def _add(self, *, signs_from: datetime) -> None:
        private = Ed25519PrivateKey.generate()
        raw = private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        kid = secrets.token_hex(8)
        key = await self._seal(SigningKey(kid, raw, sealed=False, signs_from=signs_from))
        after_kid = self._keys[-1].kid if self._keys else ""
        added = await self._store.add_signing_key(key, after_kid=after_kid)
        await self._reload()
        if added:
            shown = signs_from.isoformat(timespec="seconds")
            log.info("signing key %s was made; it signs from %s", kid, shown)

    async def _retire(self, key: SigningKey) -> None:
        await self._store.delete_signing_key(key.kid)
        self._keys = [other for other in self._keys if other.kid != key.kid]
        self._opened.pop(key.kid, None)
        log.info("signing key %s is retired", key.kid)

    async def _seal(self, key: SigningKey) -> SigningKey:
        if self._sealer is None:
            return key
        return SigningKey(key.kid, await self._sealer.seal(key.kid, key.private), True, key.signs_from)

    async def _open(self, key: SigningKey) -> OKPKey:
        raw = key.private
        if key.sealed:
            if self._sealer is None:
                raise StartError(
                    "the signing keys in the database are encrypted: set LLMOS_AUTH_KEY_ENCRYPTION_KEY_FILE "
                    "(or ..._ENV) to the key that they were encrypted with"
                )
            try:
                raw = await self._sealer.open(key.kid, raw)
            except DataCorrupt:
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
