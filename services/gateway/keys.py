"""API keys: each is exchanged once with auth, and the token that it stands for is remembered for a while.

That token is verified here as any other, each time, so a key has no way of its own past what is checked of
tokens: revocation, the end of its life, the key that signed it.

The memory is keyed by the SHA-256 of the whole key and bounded; the least recently used go first. Many
requests with one unknown key cause one exchange. Bad keys are remembered for a few seconds, so that a
flood of them does not reach auth. While auth is away, known keys work until what they stand for expires.
"""

from __future__ import annotations

import asyncio
import hashlib
import string
import zlib
from collections import OrderedDict
from dataclasses import dataclass

from services.gateway.ports import AuthPort, VerifierPort
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import (
    Cancelled,
    CredentialInvalid,
    CredentialRevoked,
    DeadlineExceeded,
    DependencyUnavailable,
    LlmosError,
    Status,
)

PREFIX = "llmos_"
_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_BODY_CHARS = 30
_CHECKSUM_CHARS = 6
_LENGTH = len(PREFIX) + _BODY_CHARS + _CHECKSUM_CHARS


def is_api_key(credential: str) -> bool:
    """Whether the credential means to be an API key; it may still be malformed."""
    return credential.startswith(PREFIX)


def is_well_formed(key: str) -> bool:
    """Whether form and checksum are right: `llmos_`, 30 base62 characters, their CRC32 in 6 more."""
    if len(key) != _LENGTH or not is_api_key(key) or not key.isascii():
        return False
    body, checksum = key[len(PREFIX) : -_CHECKSUM_CHARS], key[-_CHECKSUM_CHARS:]
    number, wanted = zlib.crc32(body.encode("ascii")), ""
    for _ in range(_CHECKSUM_CHARS):
        number, place = divmod(number, len(_BASE62))
        wanted = _BASE62[place] + wanted
    return body.isalnum() and wanted == checksum


@dataclass(frozen=True, slots=True)
class _Bad:
    """A key that auth refused."""

    error: type[LlmosError]
    until_s: float


class KeyRing:
    """Turns API keys into identities."""

    def __init__(
        self,
        auth: AuthPort,
        verifier: VerifierPort,
        clock: Clock,
        *,
        max_entries: int = 10_000,
        max_in_flight: int = 64,
        refusal_ttl_s: float = 5.0,
    ) -> None:
        self._auth = auth
        self._verifier = verifier
        self._clock = clock
        self._max_entries = max_entries
        self._max_in_flight = max_in_flight
        self._refusal_ttl_s = refusal_ttl_s
        self._known: OrderedDict[bytes, str] = OrderedDict()
        """Tokens, by the digest of the key that they stand for."""
        self._refused: OrderedDict[bytes, _Bad] = OrderedDict()
        self._flights: dict[bytes, asyncio.Task[str]] = {}

    async def identity(self, api_key: str) -> Identity:
        """Whom the key stands for. Raises one of the UNAUTHENTICATED errors, or DependencyUnavailable where
        the key is not known here and auth cannot be asked."""
        digest = hashlib.sha256(api_key.encode("utf-8", "surrogatepass")).digest()
        revoked: CredentialRevoked | None = None
        known = self._known.get(digest)
        if known is None and not is_well_formed(api_key):
            raise CredentialInvalid(
                "The API key is malformed.",
                hint="Compare it with the original: a character is missing or wrong.",
            )
        if known is not None:
            try:
                verified = await self._verifier.verify(known)
            except LlmosError as error:
                if error.status is not Status.UNAUTHENTICATED:
                    raise
                # Expired, or of a key that no longer signs, or revoked: then auth knows whether the key is.
                self._known.pop(digest, None)
                revoked = error if isinstance(error, CredentialRevoked) else None
            else:
                if digest in self._known:
                    self._known.move_to_end(digest)
                return verified.identity()
        refused = self._refused.get(digest)
        if refused is not None:
            if self._clock.monotonic() < refused.until_s:
                raise refused.error("The API key was refused.")
            del self._refused[digest]
        try:
            token = await self._exchanged(digest, api_key)
        except DependencyUnavailable:
            if revoked is not None:
                raise revoked from None
            raise
        return (await self._verifier.verify(token)).identity()

    async def close(self) -> None:
        """Ends exchanges that run."""
        flights = tuple(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _exchanged(self, digest: bytes, api_key: str) -> str:
        while True:
            flight = self._flights.get(digest)
            mine = flight is None
            if flight is None:
                if len(self._flights) >= self._max_in_flight:
                    raise DependencyUnavailable("Too many unknown API keys are being checked.")
                # Runs on when this caller leaves: others may wait for it by then.
                flight = asyncio.create_task(self._exchange(digest, api_key), name="key-exchange")
                self._flights[digest] = flight
                flight.add_done_callback(lambda _: self._flights.pop(digest, None))
                flight.add_done_callback(_seen)
            try:
                return await asyncio.shield(flight)
            except (DeadlineExceeded, Cancelled):
                # The exchange ran on the deadline of the caller who caused it; mine may be later.
                if mine:
                    raise

    async def _exchange(self, digest: bytes, api_key: str) -> str:
        try:
            token = await self._auth.exchange(api_key)
        except LlmosError as error:
            if error.status is Status.UNAUTHENTICATED:
                until_s = self._clock.monotonic() + self._refusal_ttl_s
                self._refused[digest] = _Bad(type(error), until_s)
                while len(self._refused) > self._max_entries:
                    self._refused.popitem(last=False)
            raise
        self._known[digest] = token
        while len(self._known) > self._max_entries:
            self._known.popitem(last=False)
        return token


def _seen(flight: asyncio.Task[str]) -> None:
    """Takes note of a fault that nobody waits for any more."""
    if not flight.cancelled():
        flight.exception()
