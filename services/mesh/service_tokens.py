"""This service's own tokens, one for each audience, by which it proves itself to the other services."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from services.mesh.access_token import Audience
from services.mesh.clock import Clock
from services.mesh.errors import DependencyUnavailable, LlmosError
from services.mesh.jwks import FIRST_RETRY_S

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A token that was just made."""

    token: str
    expires_at: datetime


class TokenPort(Protocol):
    """Where this service's own tokens come from."""

    async def issue(self, audience: Audience) -> IssuedToken:
        """A new token. Ends within a deadline of its own; raises an LlmosError."""


@dataclass(slots=True)
class _Own:
    """This service's token for one audience."""

    token: str = ""
    renew_s: float = float("-inf")
    end_s: float = float("-inf")
    attempted_s: float = float("-inf")
    renewal: asyncio.Task[None] | None = None
    error: LlmosError | None = None


class ServiceTokens:
    """This service's own tokens, renewed at two thirds of their life, behind the caller's back.

    While auth is down the valid one stays in use. At most one renewal runs for each audience, and not more
    than one begins every `min_interval_s`.
    """

    def __init__(self, port: TokenPort, clock: Clock, *, min_interval_s: float = 1.0) -> None:
        self._port = port
        self._clock = clock
        self._min_interval_s = min_interval_s
        self._own: dict[str, _Own] = {audience: _Own() for audience in Audience}

    async def token(self, audience: str) -> str:
        """A token for the audience, one of `Audience`. Raises DependencyUnavailable where there is none
        and auth gives none."""
        own = self._own.get(audience)
        if own is None:
            raise ValueError(f"there is no audience {audience!r}")
        now_s = self._clock.monotonic()
        if now_s < own.renew_s:
            return own.token
        renewal = self._renew(Audience(audience), own, now_s)
        if now_s < own.end_s:
            return own.token
        if renewal is not None:
            await asyncio.shield(renewal)
        if self._clock.monotonic() < own.end_s:
            return own.token
        raise DependencyUnavailable(
            "This service could not get a token of its own from the auth service.",
            retry_after_s=self._min_interval_s,
        ) from own.error

    async def close(self) -> None:
        """Ends renewals that run."""
        running = [own.renewal for own in self._own.values() if own.renewal and not own.renewal.done()]
        for renewal in running:
            renewal.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _renew(self, audience: Audience, own: _Own, now_s: float) -> asyncio.Task[None] | None:
        if own.renewal is not None and not own.renewal.done():
            return own.renewal
        # without any token nothing can be asked: then a little sooner, as services start side by side
        pause_s = self._min_interval_s if own.token else min(self._min_interval_s, FIRST_RETRY_S)
        if now_s - own.attempted_s < pause_s:
            return None
        own.attempted_s = now_s
        # a context of its own: the renewal belongs to no request, and must not carry a caller's identity
        own.renewal = asyncio.create_task(
            self._run_renewal(audience, own), name=f"token-{audience}", context=Context()
        )
        return own.renewal

    async def _run_renewal(self, audience: Audience, own: _Own) -> None:
        try:
            issued = await self._port.issue(audience)
            life_s = (issued.expires_at - self._clock.now()).total_seconds()
            if life_s <= 0:
                raise DependencyUnavailable(
                    "auth's tokens are expired on arrival: the clocks differ too much"
                )
        except LlmosError as error:
            if own.error is None:
                log.warning("no new token for %s, the present one stays in use: %s", audience, error)
            own.error = error
            return
        now_s = self._clock.monotonic()
        own.token = issued.token
        own.renew_s = now_s + life_s * 2 / 3
        own.end_s = now_s + life_s
        own.error = None
