"""A file, sealed for its tenant: a head with its name, then chunks that can be read from any one on.

    "LF1" key_id_len:1 key_id salt:16 head_len:2 sealed_head (sealed_chunk){1,}

AES-256-GCM under a key of this file alone: of the deployment's key, the tenant, what the file is bound to and
the salt, which is new each time it is written, so that no nonce serves twice. The nonce is the number of the
chunk, from 1, the head being 0; with it are authenticated what the file is bound to and whether the chunk is
the last, so that none can be cut off, moved or put into another file.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.gateway.files.ports import FileKeys
from services.mesh.errors import DataCorrupt
from services.mesh.randomness import random_bytes

CHUNK_BYTES = 1024 * 1024
TAG_BYTES = 16
SALT_BYTES = 16
HEAD_MAX_BYTES = 2048
_MAGIC = b"LF1"
_HEAD_LENGTH = struct.Struct(">H")
_STRIDE_BYTES = CHUNK_BYTES + TAG_BYTES


class Head(msgspec.Struct):
    """What is known of a file beside its id."""

    filename: str


@dataclass(frozen=True, slots=True)
class OpenedHead:
    """A head that was read, and how to read the rest."""

    head: Head
    bound: str
    size_bytes: int
    """Of the content."""
    _aead: AESGCM
    _begin: int

    @property
    def chunks(self) -> int:
        return max(1, -(-self.size_bytes // CHUNK_BYTES))

    def place(self, number: int) -> tuple[int, int]:
        """Where chunk `number`, from 1, begins, and how long it is at most."""
        return self._begin + (number - 1) * _STRIDE_BYTES, _STRIDE_BYTES

    def chunk(self, number: int, sealed: bytes) -> bytes:
        """Raises DataCorrupt."""
        return _open(self._aead, self.bound, number, sealed, last=number == self.chunks)


async def seal(
    keys: FileKeys, tenant_id: str, bound: str, head: Head, parts: AsyncIterator[bytes]
) -> AsyncGenerator[bytes, None]:
    """The bytes to store. Holds a chunk or two in memory."""
    salt, key_id = random_bytes(SALT_BYTES), keys.key_id.encode()
    aead = _aead(keys, keys.key_id, tenant_id, bound, salt)
    sealed = _seal(aead, bound, 0, msgspec.json.encode(head), last=False)
    yield b"".join(
        (_MAGIC, bytes([len(key_id)]), key_id, salt, _HEAD_LENGTH.pack(len(sealed)), sealed),
    )
    number, pending = 1, bytearray()
    async for part in parts:
        pending += part
        # The last one is known as such only at the end, so one chunk always waits.
        while len(pending) > CHUNK_BYTES:
            yield _seal(aead, bound, number, bytes(pending[:CHUNK_BYTES]), last=False)
            del pending[:CHUNK_BYTES]
            number += 1
    yield _seal(aead, bound, number, bytes(pending), last=True)


def open_head(keys: FileKeys, tenant_id: str, bound: str, size_bytes: int, begin: bytes) -> OpenedHead:
    """Of what is stored: its size, and its first HEAD_MAX_BYTES. Raises DataCorrupt."""
    try:
        if begin[:3] != _MAGIC:
            raise DataCorrupt("A stored file does not begin as one.")
        at = 4 + begin[3]
        key_id, salt = begin[4:at].decode(), begin[at : at + SALT_BYTES]
        at += SALT_BYTES
        (length,) = _HEAD_LENGTH.unpack_from(begin, at)
        at += _HEAD_LENGTH.size
        if len(begin) < at + length:
            raise DataCorrupt("A stored file is cut off.")
        aead = _aead(keys, key_id, tenant_id, bound, salt)
        head = msgspec.json.decode(_open(aead, bound, 0, begin[at : at + length], last=False), type=Head)
    except (IndexError, struct.error, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise DataCorrupt("A stored file does not begin as one.") from error
    at += length
    chunks = max(1, -(-(size_bytes - at) // _STRIDE_BYTES))
    return OpenedHead(head, bound, size_bytes - at - chunks * TAG_BYTES, aead, at)


def _aead(keys: FileKeys, key_id: str, tenant_id: str, bound: str, salt: bytes) -> AESGCM:
    return AESGCM(keys.derive(key_id, tenant_id, b"llmos file\0" + bound.encode() + b"\0" + salt))


def _seal(aead: AESGCM, bound: str, number: int, content: bytes, *, last: bool) -> bytes:
    return aead.encrypt(number.to_bytes(12, "big"), content, _authenticated(bound, last))


def _open(aead: AESGCM, bound: str, number: int, sealed: bytes, *, last: bool) -> bytes:
    try:
        return aead.decrypt(number.to_bytes(12, "big"), sealed, _authenticated(bound, last))
    except (InvalidTag, ValueError) as error:
        raise DataCorrupt("A stored file was changed or cut off.") from error


def _authenticated(bound: str, last: bool) -> bytes:
    return bound.encode() + (b"\1" if last else b"\0")
