"""Slows brute force down: who fails often may try only now and then. Pure, but for the injected clock.

Failures are counted for the source that they come from and for the name that they are about (the prefix of
an API key, a client's id). Some are free; each one beyond them doubles the time in which the source's
attempts are refused, before anything is looked up or computed for them. One failure is forgiven every
`interval_s`, and a success forgives one at most every `SUCCESS_FORGIVES_S`: who holds one good credential
gains next to nothing for guessing another.

A name is another matter, since whoever knows a name may fail on it on purpose, to lock its owner out. So a
name is never blocked: what is tried for it beyond the free failures waits its turn, one attempt every
`name_pace_s`, right or wrong, since that can't be told before asking. And only sources that have failed
themselves wait for that turn. An owner whose address has not failed of late notices nothing, whatever
others do to his name; a botnet gets one attempt from each of its addresses and then the common pace.

Whoever holds the credential in memory as a good one (the gateway) asks nothing here: it is never slowed.

Memory is bounded. Of the places, half are for those who are within their free failures and half for those
beyond, the offenders; among equals the one that failed longest ago is forgotten first. Many sources that
fail once or twice, which is what an IPv6 network has plenty of, so push out each other and no offender: to
make one offender forgotten, all places of offenders have to be filled, each by `free_failures` + 1 failures.

Attempts that run at the same time are all let in, as long as their source has not used up its free failures:
a restart of the gateway makes every caller's first requests new to it, and they are no attack. How many run
at once is bounded elsewhere (`KeyRing`). A source that is over its free failures gets one attempt at a time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from services.mesh.clock import Clock
from services.mesh.errors import CredentialInvalid, RateLimit

FREE_FAILURES = 10
INTERVAL_S = 60.0
MAX_WAIT_S = 60.0
NAME_PACE_S = 1.0
SUCCESS_FORGIVES_S = 10.0
FIRST_WAIT_S = 1.0
MIN_WAIT_S = 0.001
IPV6_PREFIX = 64
"""What one subscriber has at least (RFC 6177): its addresses are one source."""
MAX_KEY_CHARS = 64


def source_of(address: str) -> str:
    """What an address counts as: an IPv4 address for itself (also where it is written as IPv6), an IPv6
    address for its /64. What is no address is taken as it is, its first 64 characters."""
    try:
        parsed: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:
        return address[:MAX_KEY_CHARS]
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is None:
            return str(IPv6Network((parsed, IPV6_PREFIX), strict=False))
        parsed = parsed.ipv4_mapped
    return str(parsed)


@dataclass(slots=True)
class _Count:
    """The failures of one source or name."""

    failures: float
    """At `at_s`; they grow fewer with time."""
    at_s: float
    until_s: float = -math.inf
    """Until then nothing is let in."""
    forgiven_s: float = -math.inf
    """When a success last forgave."""


class _Counts:
    """Failures by source or by name."""

    def __init__(self, *, free: int, interval_s: float, max_wait_s: float, max_entries: int) -> None:
        self._free = free
        self._interval_s = interval_s
        self._max_wait_s = max_wait_s
        # No more than lead to the longest wait: it would only take longer to be forgiven.
        self._most = free + 1 + max(0, math.ceil(math.log2(max_wait_s / FIRST_WAIT_S)))
        self._places = (max_entries - max_entries // 2, max_entries // 2)
        self._fresh: OrderedDict[str, _Count] = OrderedDict()
        self._offenders: OrderedDict[str, _Count] = OrderedDict()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._offenders)

    def failures(self, key: str, now_s: float) -> float:
        """How many are remembered; forgets the key where there are none."""
        count = self._fresh.get(key) or self._offenders.get(key)
        if count is None:
            return 0.0
        left = count.failures - (now_s - count.at_s) / self._interval_s
        if left <= 0:
            self._pop(key)
            return 0.0
        return left

    def wait_s(self, key: str, now_s: float) -> float:
        """How long the key has to wait; 0: not at all."""
        count = self._offenders.get(key)
        wait_s = 0.0 if count is None else count.until_s - now_s
        # Whoever waits as long as it was told is let in, whatever the sum of floats is rounded to.
        return wait_s if wait_s > MIN_WAIT_S else 0.0

    def begin(self, key: str, now_s: float) -> None:
        """An attempt is let in: where the key is over its free failures, it is the only one for a while."""
        count = self._offenders.get(key)
        if count is not None:
            count.until_s = now_s + self._next_wait_s(self.failures(key, now_s))

    def failed(self, key: str, now_s: float) -> None:
        """Counts one more."""
        failures = min(self.failures(key, now_s) + 1, self._most)
        count = self._pop(key) or _Count(0.0, now_s)
        count.failures, count.at_s = failures, now_s
        wait_s = self._next_wait_s(failures)
        if wait_s:
            count.until_s = now_s + wait_s
        self._put(key, count)

    def succeeded(self, key: str, now_s: float) -> None:
        """Forgives one, unless one was forgiven lately. The last one goes by time only: what is forgotten
        does not tell any more when it was forgiven."""
        left = self.failures(key, now_s)
        count = self._fresh.get(key) or self._offenders.get(key)
        if count is None or left <= 1 or now_s - count.forgiven_s < SUCCESS_FORGIVES_S:
            return
        count.failures, count.at_s, count.forgiven_s = left - 1, now_s, now_s
        count.until_s = now_s

    def _next_wait_s(self, failures: float) -> float:
        over = math.ceil(failures - self._free)
        return 0.0 if over <= 0 else min(FIRST_WAIT_S * 2.0 ** (over - 1), self._max_wait_s)

    def _pop(self, key: str) -> _Count | None:
        return self._fresh.pop(key, None) or self._offenders.pop(key, None)

    def _put(self, key: str, count: _Count) -> None:
        """As the one that failed last."""
        offends = count.failures > self._free
        (self._offenders if offends else self._fresh)[key] = count
        for held, places in zip((self._fresh, self._offenders), self._places, strict=True):
            while len(held) > places:
                held.popitem(last=False)


class Slowdown:
    """Counts failures and refuses whoever has too many. Not for threads."""

    def __init__(
        self,
        clock: Clock,
        *,
        free_failures: int = FREE_FAILURES,
        interval_s: float = INTERVAL_S,
        max_wait_s: float = MAX_WAIT_S,
        name_pace_s: float = NAME_PACE_S,
        max_sources: int = 10_000,
        max_names: int = 10_000,
    ) -> None:
        """Remembers at most so many sources and names. One failure is forgiven each `interval_s`; the longest
        wait of a source is `max_wait_s`, and a name's attempts are `name_pace_s` apart."""
        self._clock = clock
        self._sources = _Counts(
            free=free_failures, interval_s=interval_s, max_wait_s=max_wait_s, max_entries=max_sources
        )
        self._names = _Counts(
            free=free_failures, interval_s=interval_s, max_wait_s=name_pace_s, max_entries=max_names
        )

    def __len__(self) -> int:
        """How many sources and names are remembered."""
        return len(self._sources) + len(self._names)

    def check(self, address: str, name: str = "") -> None:
        """To be asked before an attempt, which it lets in by returning; an empty name is none.

        Raises RateLimit, with `retry_after_s` in seconds, where the address or the name has to wait.
        """
        now_s = self._clock.monotonic()
        source, name = source_of(address), name[:MAX_KEY_CHARS]
        wait_s = self._sources.wait_s(source, now_s)
        waits_its_turn = bool(name) and self._sources.failures(source, now_s) > 0
        if waits_its_turn:
            wait_s = max(wait_s, self._names.wait_s(name, now_s))
        if wait_s > 0:
            raise RateLimit(
                "Too many credentials that are wrong were sent from this address, or for this name.",
                hint="Correct the credential, and try again later.",
                retry_after_s=wait_s,
            )
        self._sources.begin(source, now_s)
        if waits_its_turn:
            self._names.begin(name, now_s)

    def failed(self, address: str, name: str = "") -> None:
        """The credential was wrong."""
        now_s = self._clock.monotonic()
        self._sources.failed(source_of(address), now_s)
        if name:
            self._names.failed(name[:MAX_KEY_CHARS], now_s)

    def succeeded(self, address: str, name: str = "") -> None:
        """The credential was right."""
        now_s = self._clock.monotonic()
        self._sources.succeeded(source_of(address), now_s)
        if name:
            self._names.succeeded(name[:MAX_KEY_CHARS], now_s)

    @contextmanager
    def attempt(self, address: str, name: str = "") -> Iterator[None]:
        """Around the proving of a credential. Raises RateLimit as `check` does.

        Only CredentialInvalid counts as a failure: one that has expired or was revoked was no guess, and of
        one that auth could not be asked about nothing is known.
        """
        self.check(address, name)
        try:
            yield
        except CredentialInvalid:
            self.failed(address, name)
            raise
        self.succeeded(address, name)
