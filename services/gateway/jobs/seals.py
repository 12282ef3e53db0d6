"""How what a job holds is encrypted: AES-256-GCM under a key of the tenant's, made from a key that only
gateways have.

The key file holds one or more keys of 32 bytes in base64, a line each: the first seals and hashes, all open.
Gateways that share a schedule share the file. To change the key without a job that a gateway cannot open: put
the new one last in the file of every gateway, then first, and take the old one out when no job or result
of before is left. An idempotency key that was used before the new one came first makes a new job after it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import stat
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.mesh.app import StartError
from services.mesh.errors import DataCorrupt, StateConflict
from services.mesh.jobs import JobRequested, Sealed
from services.mesh.randomness import random_bytes

KEY_BYTES = 32
NONCE_BYTES = 12
MAX_KEYS = 16
MAX_KEY_FILE_BYTES = 4096
MAX_DERIVED = 4096
"""Keys of tenants that are remembered."""
_CONTEXT = b"llmos.jobs.v1"
_HOW = "make one with `openssl rand -base64 32`"


class PayloadSeals:
    """A `Seals` over the keys of a file."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Raises ValueError where there is none, or one has not 32 bytes."""
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError("there must be a key, and each must have 32 bytes")
        self._keys = {_key_id(key): key for key in keys}
        self._first = _key_id(keys[0])
        # Of this object alone, so that keys die with it.
        self._derived = lru_cache(MAX_DERIVED)(self._derive)

    def seal(self, plaintext: bytes, job: JobRequested, purpose: str) -> Sealed:
        cipher = AESGCM(self._derived(self._first, b"seal", job.identity.tenant_id))
        nonce = random_bytes(NONCE_BYTES)
        return Sealed(self._first, nonce + cipher.encrypt(nonce, plaintext, _bound_to(job, purpose)))

    def open(self, sealed: Sealed, job: JobRequested, purpose: str) -> bytes:
        if sealed.key_id not in self._keys:
            raise DataCorrupt("What the job holds was sealed with a key that this deployment does not have.")
        cipher = AESGCM(self._derived(sealed.key_id, b"seal", job.identity.tenant_id))
        nonce, text = sealed.ciphertext[:NONCE_BYTES], sealed.ciphertext[NONCE_BYTES:]
        try:
            return cipher.decrypt(nonce, text, _bound_to(job, purpose))
        except (InvalidTag, ValueError):
            raise DataCorrupt("What the job holds was not sealed for it, or was changed.") from None

    def keyed_hash(self, tenant_id: str, purpose: str, text: bytes) -> bytes:
        key = self._derived(self._first, f"hash {purpose}".encode(), tenant_id)
        return hmac.digest(key, text, hashlib.sha256)

    @property
    def key_id(self) -> str:
        """The key that seals now."""
        return self._first

    def derive(self, key_id: str, tenant_id: str, info: bytes) -> bytes:
        """32 bytes for a file of the tenant's. Raises DataCorrupt where there is no such key."""
        if key_id not in self._keys:
            raise DataCorrupt("The file was sealed with a key that this deployment does not have.")
        return hmac.digest(self._derived(key_id, b"file", tenant_id), info, hashlib.sha256)

    def _derive(self, key_id: str, use: bytes, tenant_id: str) -> bytes:
        return _hkdf(self._keys[key_id], _packed(_CONTEXT, use, tenant_id.encode()), KEY_BYTES)


class NoSeals:
    """A `Seals` of a deployment that has no key: it takes no jobs."""

    def seal(self, plaintext: bytes, job: JobRequested, purpose: str) -> Sealed:
        raise _no_key()

    def open(self, sealed: Sealed, job: JobRequested, purpose: str) -> bytes:
        raise _no_key()

    def keyed_hash(self, tenant_id: str, purpose: str, text: bytes) -> bytes:
        raise _no_key()

    @property
    def key_id(self) -> str:
        raise _no_key()

    def derive(self, key_id: str, tenant_id: str, info: bytes) -> bytes:
        raise _no_key()


def load(file: Path | None) -> PayloadSeals | NoSeals:
    """What the settings ask for. Raises StartError where the file is not right."""
    if file is None:
        return NoSeals()
    what = f"the payload key file {file}"
    try:
        with file.open("rb") as opened:
            mode = stat.S_IMODE(file.stat().st_mode)
            text = opened.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise StartError(f"{what} cannot be read: {error.strerror}") from None
    if mode & 0o007:
        raise StartError(f"{what} is open to everybody on this machine: `chmod 600` it")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        keys = [base64.b64decode(line, validate=True) for line in lines]
    except (ValueError, binascii.Error):
        raise StartError(f"{what} must hold keys of 32 bytes in base64, a line each: {_HOW}") from None
    if not 1 <= len(keys) <= MAX_KEYS or any(len(key) != KEY_BYTES for key in keys):
        raise StartError(f"{what} must hold 1 to {MAX_KEYS} keys of 32 bytes in base64, a line each: {_HOW}")
    return PayloadSeals(keys)


def _no_key() -> StateConflict:
    return StateConflict(
        "This deployment has no payload key, and so offers no jobs.",
        hint="Ask your operator to set LLMOS_GATEWAY_PAYLOAD_KEY_FILE.",
    )


def _key_id(key: bytes) -> str:
    return _hkdf(key, _packed(_CONTEXT, b"id"), 8).hex()


def _bound_to(job: JobRequested, purpose: str) -> bytes:
    """What is authenticated with what is sealed."""
    identity = job.identity
    texts = (
        *(job.job_id, str(int(job.kind)), job.method),
        *(identity.tenant_id, identity.client_id, identity.key_id, purpose),
    )
    return _packed(*(text.encode() for text in texts))


def _packed(*parts: bytes) -> bytes:
    """The parts, each after its length: no two lists give the same."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _hkdf(key: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(key)
