"""The form of API keys and client secrets, and how they are kept: as digests only.

An API key is `llmos_`, 30 random base62 characters (178 bits), and their CRC32 in 6 base62 characters. The
checksum turns a typo away without a query and lets secret scanners tell a key from noise. The first 8
random characters find the key in the store; the 22 others (131 bits) are the secret proper, which is why
an unsalted SHA-256 is enough: nobody can search that space.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
import zlib
from dataclasses import dataclass, field

from services.mesh.errors import CredentialInvalid

API_KEY_PREFIX = "llmos_"
CLIENT_SECRET_PREFIX = "llmoscs_"  # noqa: S105 (no secret, what it begins with)
_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_BASE62_SET = frozenset(_BASE62)
_RANDOM_CHARS = 30
_CHECKSUM_CHARS = 6
_LOOKUP_CHARS = 8
_LENGTH = len(API_KEY_PREFIX) + _RANDOM_CHARS + _CHECKSUM_CHARS

NO_DIGEST = bytes(32)
"""Compared against where there is nothing to compare with, so that the answer takes as long."""


@dataclass(frozen=True, slots=True)
class ParsedApiKey:
    """A well-formed key, as the store knows it."""

    prefix: str
    digest: bytes = field(repr=False)


def new_api_key() -> str:
    """A new key's text."""
    body = _random(_RANDOM_CHARS)
    return f"{API_KEY_PREFIX}{body}{_checksum(body)}"


def new_key_id() -> str:
    """A new key's id, which is no secret and tells nothing of the key."""
    return f"key_{_random(16)}"


def new_client_secret() -> str:
    """A new client's secret: 256 random bits."""
    return f"{CLIENT_SECRET_PREFIX}{secrets.token_urlsafe(32)}"


def is_api_key(text: str) -> bool:
    """Whether the text means to be an API key; it may still be malformed."""
    return text.startswith(API_KEY_PREFIX)


def parse_api_key(text: str) -> ParsedApiKey:
    """Raises CredentialInvalid where the form or the checksum is wrong; the error repeats nothing of it."""
    body, checksum = text[len(API_KEY_PREFIX) : -_CHECKSUM_CHARS], text[-_CHECKSUM_CHARS:]
    if (
        len(text) != _LENGTH
        or not is_api_key(text)
        or not _BASE62_SET.issuperset(body)
        or _checksum(body) != checksum
    ):
        raise CredentialInvalid(
            "The API key is malformed.", hint="Compare it with the original: a character is missing or wrong."
        )
    return ParsedApiKey(body[:_LOOKUP_CHARS], digest(text))


def digest(secret: str) -> bytes:
    """What is stored in the place of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def matches(stored: bytes, given: bytes) -> bool:
    """Compares two digests in a time that does not tell where they differ."""
    return hmac.compare_digest(stored, given)


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode("ascii"))
    characters = []
    for _ in range(_CHECKSUM_CHARS):
        number, place = divmod(number, len(_BASE62))
        characters.append(_BASE62[place])
    return "".join(reversed(characters))
