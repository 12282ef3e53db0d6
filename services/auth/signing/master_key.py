"""How private keys are encrypted at rest: under a master key that the process is given, or under keys of
their own that a key management service encrypts.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from services.mesh.app import StartError
from services.mesh.errors import DataCorrupt

_KEY_BYTES = 32
_NONCE_BYTES = 12
_ENVELOPE = b"\x01"
_HOW = "make one with `openssl rand -base64 32`"


class Sealing(Protocol):
    """Encrypts private keys at rest, each bound to its id."""

    async def seal(self, kid: str, private: bytes) -> bytes:
        """Raises DependencyUnavailable where the keys are elsewhere and cannot be used now."""

    async def open(self, kid: str, sealed: bytes) -> bytes:
        """Raises DataCorrupt where it was sealed with another key, or changed; DependencyUnavailable."""


class KeyManagement(Protocol):
    """A key management service: the master key stays there."""

    async def wrap(self, data_key: bytes) -> bytes:
        """Encrypts a key of 32 bytes, to at most 65,535. Raises DependencyUnavailable."""

    async def unwrap(self, wrapped: bytes) -> bytes:
        """The key that it was. Raises DependencyUnavailable, and DataCorrupt if it was not wrapped there."""


class Sealer:
    """AES-256-GCM under a master key in this process."""

    def __init__(self, key: bytes) -> None:
        """Raises ValueError unless the key has 32 bytes."""
        if len(key) != _KEY_BYTES:
            raise ValueError("the key must have 32 bytes")
        self._cipher = AESGCM(key)

    @classmethod
    def from_file(cls, path: Path) -> Sealer:
        """Raises StartError where the file does not hold 32 bytes in base64."""
        try:
            text = path.read_text().strip()
        except OSError as error:
            raise StartError(f"the key encryption key {path} cannot be read: {error.strerror}") from None
        except ValueError:
            text = ""
        return cls._from_text(text, f"the key encryption key {path}")

    @classmethod
    def from_secret(cls, secret: SecretStr, variable: str) -> Sealer:
        """From an environment variable's value. Raises StartError where it is not 32 bytes in base64."""
        text = secret.get_secret_value().strip()
        return cls._from_text(text, f"the key encryption key in the environment variable {variable}")

    @classmethod
    def _from_text(cls, text: str, what: str) -> Sealer:
        try:
            return cls(base64.b64decode(text, validate=True))
        except (ValueError, binascii.Error):
            raise StartError(f"{what} must be 32 bytes in base64: {_HOW}") from None

    async def seal(self, kid: str, private: bytes) -> bytes:
        return _encrypt(self._cipher, private, kid.encode())

    async def open(self, kid: str, sealed: bytes) -> bytes:
        return _decrypt(self._cipher, sealed, kid.encode())


class EnvelopeSealer:
    """A data key for each private key, encrypted by a key management service and kept beside it.

    Sealed is: the byte 1, the length of the wrapped data key (2 bytes, big-endian), that key, and then what
    AES-256-GCM made of the private key.
    """

    def __init__(self, keys: KeyManagement) -> None:
        self._keys = keys

    async def seal(self, kid: str, private: bytes) -> bytes:
        data_key = secrets.token_bytes(_KEY_BYTES)
        wrapped = await self._keys.wrap(data_key)
        header = _ENVELOPE + len(wrapped).to_bytes(2, "big")
        return header + wrapped + _encrypt(AESGCM(data_key), private, kid.encode())

    async def open(self, kid: str, sealed: bytes) -> bytes:
        end = 3 + int.from_bytes(sealed[1:3], "big")
        if sealed[:1] != _ENVELOPE or len(sealed) <= end:
            raise DataCorrupt("A sealed key is not in an envelope.")
        data_key = await self._keys.unwrap(sealed[3:end])
        if len(data_key) != _KEY_BYTES:
            raise DataCorrupt("A data key has not 32 bytes.")
        return _decrypt(AESGCM(data_key), sealed[end:], kid.encode())


def load(file: Path | None, secret: SecretStr | None, variable: str | None) -> Sealer | None:
    """What the settings ask for: a master key from a file, the environment, or none. Raises StartError."""
    if file is not None:
        return Sealer.from_file(file)
    if variable is None:
        return None
    if secret is None:
        raise StartError(
            f"the environment variable {variable} is not set: LLMOS_AUTH_KEY_ENCRYPTION_KEY_ENV says that it "
            "holds the key encryption key"
        )
    return Sealer.from_secret(secret, variable)


def _encrypt(cipher: AESGCM, private: bytes, bound_to: bytes) -> bytes:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, private, bound_to)


def _decrypt(cipher: AESGCM, sealed: bytes, bound_to: bytes) -> bytes:
    try:
        return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound_to)
    except (InvalidTag, ValueError):
        raise DataCorrupt("It was encrypted with another key encryption key, or changed.") from None
