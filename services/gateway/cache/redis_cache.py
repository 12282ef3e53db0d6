"""Answers in Redis, for several gateways.

Each is sealed with a key that only its own request yields: whoever reads Redis, without the tenant's id and
the whole request, learns sizes and times. A value that was moved to another name, or changed, does not open
and is a miss.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.gateway.redis import Redis, RedisLost

PREFIX = b"llmos:answer:"
NONCE_BYTES = 12
SEAL_BYTES = NONCE_BYTES + 16


class RedisCache:
    """A `ResponseCache`. Redis bounds the whole by its own `maxmemory`."""

    def __init__(self, redis: Redis, *, max_entry_bytes: int, ttl_s: float) -> None:
        self._redis = redis
        self._max_entry_bytes = max_entry_bytes
        self._ttl_ms = max(1, int(ttl_s * 1000))

    @property
    def held_bytes(self) -> int:
        return 0

    async def get(self, key: bytes) -> bytes | None:
        if not self._redis.is_available:
            return None
        name = _name(key)
        try:
            # Never more than was allowed to be put, whoever put it.
            sealed = await self._redis.execute("GETRANGE", name, 0, self._max_entry_bytes + SEAL_BYTES)
        except RedisLost:
            return None
        return _open(key, name, sealed) if sealed else None

    async def put(self, key: bytes, value: bytes) -> None:
        if len(value) > self._max_entry_bytes or not self._redis.is_available:
            return
        name = _name(key)
        try:
            await self._redis.execute("SET", name, _seal(key, name, value), "PX", self._ttl_ms)
        except RedisLost:
            return


def _name(key: bytes) -> bytes:
    return PREFIX + hashlib.sha256(b"name" + key).hexdigest().encode()


def _cipher(key: bytes) -> AESGCM:
    return AESGCM(hashlib.sha256(b"seal" + key).digest())


def _seal(key: bytes, name: bytes, value: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return nonce + _cipher(key).encrypt(nonce, value, name)


def _open(key: bytes, name: bytes, sealed: bytes) -> bytes | None:
    try:
        return _cipher(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], name)
    except (InvalidTag, ValueError):
        return None
