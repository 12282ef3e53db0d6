"""The public keys that tokens are verified with: fetched from auth, cached, refreshed sparingly.

A key that is known is used at once; what is older than the refresh interval is renewed behind the
request's back. A key id that is not known asks auth, but never more often than once per minimum
interval, however many tokens name however many unknown keys. While auth does not answer, the keys that
are known stay in use: a token lives for minutes only, and auth publishes a key long before it signs
with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from contextvars import Context
from typing import Any, Protocol

from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from services.mesh.access_token import ALGORITHM, is_kid
from services.mesh.clock import Clock
from services.mesh.errors import DependencyUnavailable, LlmosError
from services.mesh.health import Health

log = logging.getLogger(__name__)

MAX_JWKS_CHARS = 64 * 1024
MAX_KEYS = 100
FIRST_RETRY_S = 0.25
"""Until auth has answered once."""
KEYS = "signing keys"
"""The part of health that is missing until then."""


class JwksPort(Protocol):
    """Where the keys come from."""

    async def fetch(self) -> str:
        """The JWK Set as JSON. Ends within a deadline of its own; raises an LlmosError."""


class KeySource(Protocol):
    """What a verifier asks for keys."""

    async def key(self, kid: str) -> OKPKey | None:
        """The public key of this id, or None. Raises DependencyUnavailable where no key was ever had."""

    def knows(self, kid: str) -> bool:
        """Whether the key is published, as far as is known now."""


def parse_jwks(text: str) -> Mapping[str, OKPKey]:
    """The usable keys of a JWK Set (RFC 7517, section 5), by id.

    Keys of other kinds are passed over, as the RFC asks. Raises ValueError where the text is no JWK Set,
    is too large, or holds no usable key.
    """
    if len(text) > MAX_JWKS_CHARS:
        raise ValueError("the JWK Set is too large")
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("the JWK Set is nested too deeply") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise ValueError(f"the JWK Set has no list of at most {MAX_KEYS} keys")
    keys = {entry["kid"]: _import(entry) for entry in entries if _is_usable(entry)}
    if not keys:
        raise ValueError("the JWK Set holds no usable key")
    return keys


def _is_usable(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("kty") == "OKP"
        and entry.get("crv") == "Ed25519"
        and entry.get("use", "sig") == "sig"
        and entry.get("alg", ALGORITHM) == ALGORITHM
        and is_kid(entry.get("kid"))
        and isinstance(entry.get("x"), str)
    )


def _import(entry: Mapping[str, str]) -> OKPKey:
    try:
        # only what a public key needs: a private part, sent by mistake, goes no further
        return OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "x": entry["x"], "kid": entry["kid"]})
    except (JoseError, ValueError) as error:
        raise ValueError("the JWK Set holds a broken key") from error


class JwksCache:
    """A `KeySource` over a port. Holds at most `MAX_KEYS` keys and one running fetch.

    `refresh_interval_s`: keys older than that are renewed. `min_interval_s`: between two fetches, for
    whatever cause; at most the other.
    """

    def __init__(
        self, port: JwksPort, clock: Clock, *, refresh_interval_s: float = 60, min_interval_s: float = 5
    ) -> None:
        self._port = port
        self._clock = clock
        self._refresh_interval_s = refresh_interval_s
        self._min_interval_s = min(min_interval_s, refresh_interval_s)
        self._keys: Mapping[str, OKPKey] = {}
        self._fetched_s = float("-inf")
        self._attempted_s = float("-inf")
        self._fetch: asyncio.Task[None] | None = None
        self._failing = False

    async def key(self, kid: str) -> OKPKey | None:
        found = self._keys.get(kid)
        if found is not None:
            if self._clock.monotonic() - self._fetched_s >= self._refresh_interval_s:
                self._start_fetch()
            return found
        fetch = self._start_fetch()
        if fetch is not None:
            await asyncio.shield(fetch)  # one caller's end must not take the fetch from the others
        if not self._keys:
            raise DependencyUnavailable(
                "Tokens cannot be verified yet: the auth service has not answered.",
                retry_after_s=FIRST_RETRY_S,
            )
        return self._keys.get(kid)

    def knows(self, kid: str) -> bool:
        return kid in self._keys

    async def refresh(self) -> None:
        """Fetches now, unless that was just done; used at start. Faults are logged, not raised."""
        fetch = self._start_fetch()
        if fetch is not None:
            await asyncio.shield(fetch)

    async def close(self) -> None:
        """Ends a running fetch."""
        if self._fetch is not None and not self._fetch.done():
            self._fetch.cancel()
            await asyncio.gather(self._fetch, return_exceptions=True)

    @property
    def has_keys(self) -> bool:
        return bool(self._keys)

    def _start_fetch(self) -> asyncio.Task[None] | None:
        """The running fetch, or a new one where the interval allows it."""
        if self._fetch is not None and not self._fetch.done():
            return self._fetch
        now_s = self._clock.monotonic()
        # without any key nothing can be served: then ask again a little sooner
        pause_s = self._min_interval_s if self._keys else min(self._min_interval_s, FIRST_RETRY_S)
        if now_s - self._attempted_s < pause_s:
            return None
        self._attempted_s = now_s
        # a context of its own: the fetch serves everybody, not the request that happened to cause it
        self._fetch = asyncio.create_task(self._run_fetch(), name="jwks-fetch", context=Context())
        return self._fetch

    async def _run_fetch(self) -> None:
        try:
            self._keys = parse_jwks(await self._port.fetch())
        except (LlmosError, ValueError) as error:
            if not self._failing:
                log.warning(
                    "the keys of auth could not be fetched, %d stay in use: %s", len(self._keys), error
                )
            self._failing = True
            return
        if self._failing:
            log.info("the keys of auth were fetched again")
        self._failing = False
        self._fetched_s = self._clock.monotonic()


class FirstKeys:
    """Fetches the first keys, as a component. The start does not wait for auth; health does, since whoever
    cannot verify a token can serve nobody."""

    def __init__(self, cache: JwksCache, health: Health, clock: Clock) -> None:
        """`health` has the part `KEYS`."""
        self._cache = cache
        self._health = health
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="first-jwks")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._cache.close()

    async def _run(self) -> None:
        await self._cache.refresh()
        while not self._cache.has_keys:
            await self._clock.sleep(FIRST_RETRY_S)
            await self._cache.refresh()
        await self._health.set_part(KEYS, ready=True)
