"""A provider's keys by its issuer (OpenID Connect Discovery 1.0, section 4), kept and fetched sparingly.

Keys are fetched again when they are ten minutes old, and for a key id that is not known at most every 30 s,
however many tokens name however many ids. While the provider is away, those at hand stay in use for up to
an hour.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from contextvars import Context

from services.auth.providers import fetching, signature
from services.auth.providers.fetching import Fetcher, FetchError
from services.auth.providers.signature import Key, Keys
from services.mesh.clock import Clock
from services.mesh.errors import DependencyUnavailable

log = logging.getLogger(__name__)

REFRESH_S = 600.0
UNKNOWN_KID_S = 30.0
"""Between two fetches, once there are keys."""
FIRST_RETRY_S = 1.0
"""Between two fetches, while there are none."""
MAX_AGE_S = 3600.0
"""Keys that are older are used no more."""
MAX_DOCUMENT_BYTES = 128 * 1024
MAX_JWKS_BYTES = 512 * 1024
MAX_ISSUERS = 256

_PATH = "/.well-known/openid-configuration"


def is_issuer(text: str) -> bool:
    """Whether a provider can have this issuer (section 2): an address that may be fetched, without a query,
    of at most 512 characters."""
    return len(text) <= 512 and "?" not in text and fetching.is_allowed(text)


async def fetch_keys(fetcher: Fetcher, issuer: str) -> Keys:
    """The keys that an issuer publishes now. Raises FetchError, or ValueError for what it publishes."""
    if not is_issuer(issuer):
        raise FetchError("its address is not https")
    # section 4.1: a terminating slash goes before the path is added
    document = json.loads(await fetcher.get(issuer.removesuffix("/") + _PATH, MAX_DOCUMENT_BYTES))
    if not isinstance(document, dict) or document.get("issuer") != issuer:  # section 4.3: exactly
        raise ValueError("its document does not name this issuer")
    jwks_uri = document.get("jwks_uri")
    if not isinstance(jwks_uri, str) or not fetching.is_allowed(jwks_uri):
        raise ValueError("its document has no address of keys that is https")
    if fetching.on_loopback(jwks_uri) and not fetching.on_loopback(issuer):
        raise ValueError("its document leads to this machine")
    return signature.parse_jwks(await fetcher.get(jwks_uri, MAX_JWKS_BYTES))


class IssuerKeys:
    """The keys of one issuer, and at most one running fetch."""

    def __init__(self, issuer: str, fetcher: Fetcher, clock: Clock) -> None:
        self._issuer = issuer
        self._fetcher = fetcher
        self._clock = clock
        self._keys: Keys = {}
        self._fetched_s = float("-inf")
        self._attempted_s = float("-inf")
        self._fetch: asyncio.Task[None] | None = None
        self._failing = False

    async def key(self, kid: str, algorithm: str) -> Key | None:
        """The key of this id, if it is good for the algorithm. Raises DependencyUnavailable where the
        provider does not answer, and has not for an hour."""
        if self._age_s() >= REFRESH_S or kid not in self._keys:
            fetch = self._start_fetch()
            if fetch is not None:
                await asyncio.wait([fetch])  # one caller's end does not take the fetch from the others
        if self._age_s() >= MAX_AGE_S:
            raise DependencyUnavailable(
                "The identity provider does not answer, so that its token cannot be verified.",
                retry_after_s=FIRST_RETRY_S,
            )
        return self._keys.get(kid, {}).get(algorithm)

    async def close(self) -> None:
        """Ends a running fetch."""
        if self._fetch is not None and not self._fetch.done():
            self._fetch.cancel()
            await asyncio.gather(self._fetch, return_exceptions=True)

    def _age_s(self) -> float:
        return self._clock.monotonic() - self._fetched_s

    def _start_fetch(self) -> asyncio.Task[None] | None:
        """The running fetch, or a new one where the interval allows it."""
        if self._fetch is not None and not self._fetch.done():
            return self._fetch
        now_s = self._clock.monotonic()
        pause_s = UNKNOWN_KID_S if self._age_s() < MAX_AGE_S else FIRST_RETRY_S
        if now_s - self._attempted_s < pause_s:
            return None
        self._attempted_s = now_s
        # a context of its own: the fetch serves everybody, not the request that happened to cause it
        self._fetch = asyncio.create_task(self._run_fetch(), name="provider-keys", context=Context())
        return self._fetch

    async def _run_fetch(self) -> None:
        try:
            self._keys = await fetch_keys(self._fetcher, self._issuer)
        except (FetchError, ValueError, RecursionError) as error:
            if not self._failing:
                log.warning("the keys of the identity provider %s cannot be had: %s", self._issuer, error)
            self._failing = True
            return
        if self._failing:
            log.info("the keys of the identity provider %s were fetched again", self._issuer)
        self._failing = False
        self._fetched_s = self._clock.monotonic()


class Directory:
    """The keys of all issuers that are in use: at most `MAX_ISSUERS`, those least recently used go first."""

    def __init__(self, fetcher: Fetcher, clock: Clock) -> None:
        self._fetcher = fetcher
        self._clock = clock
        self._issuers: OrderedDict[str, IssuerKeys] = OrderedDict()

    async def key(self, issuer: str, kid: str, algorithm: str) -> Key | None:
        """As `IssuerKeys.key`. `issuer` is one that an administrator has configured."""
        keys = self._issuers.get(issuer)
        if keys is None:
            keys = self._issuers[issuer] = IssuerKeys(issuer, self._fetcher, self._clock)
            await self._bound()
        self._issuers.move_to_end(issuer)
        return await keys.key(kid, algorithm)

    async def close(self) -> None:
        """Ends running fetches."""
        for keys in self._issuers.values():
            await keys.close()

    async def _bound(self) -> None:
        while len(self._issuers) > MAX_ISSUERS:
            _, oldest = self._issuers.popitem(last=False)
            await oldest.close()
