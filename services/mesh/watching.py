"""What auth pushes to the other services: the revocations and the policy, kept in memory by a stream each.

Nothing here is asked while a request is served. A stream that breaks, or is silent, is opened again; what it
last told stays in use until then, so without auth tokens work until they end by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from services.mesh.clock import Clock
from services.mesh.decision import PolicyEngine
from services.mesh.errors import DependencyUnavailable, LlmosError
from services.mesh.health import Health
from services.mesh.policy import PolicyDocument
from services.mesh.revocation import Revocation, RevocationList

log = logging.getLogger(__name__)

REVOCATIONS = "revocations"
POLICY = "policy"
"""The parts of health that are missing until auth has told of them once."""
SILENCE_S = 5.0
"""A stream that says nothing for so long is broken: auth says something every two at least."""
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0
FIRST_BACKOFF_MAX_S = 0.25
"""Until auth has told all of it once: services start side by side, and wait for it to be ready."""

_A = TypeVar("_A")
_open: set[Watching[Any]] = set()


def _ages(_: CallbackOptions) -> Iterable[Observation]:
    return [Observation(each.age_s, {"llmos.watch": each.part}) for each in tuple(_open)]


_meter = metrics.get_meter("llmos.auth")
_meter.create_observable_gauge(
    "llmos.auth.watch.age",
    callbacks=[_ages],
    unit="s",
    description="Time since auth last told what it is, by what it tells: revocations or policy",
)


@dataclass(frozen=True, slots=True)
class RevocationsAnswer:
    """One answer of `WatchRevocations`; see `RevocationList.apply`."""

    version: int
    snapshot: bool = False
    revocations: tuple[Revocation, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicyAnswer:
    """One answer of `WatchPolicy`."""

    version: int
    document: PolicyDocument | None = None
    """None: it is as it was."""


class Watching(Generic[_A]):
    """Keeps one stream open, as a component. The start does not wait for auth; health does."""

    def __init__(
        self,
        part: str,
        open_stream: Callable[[], AsyncGenerator[_A, None]],
        take: Callable[[_A], Awaitable[bool]],
        *,
        health: Health,
        clock: Clock,
        silence_s: float = SILENCE_S,
    ) -> None:
        """`health` has the part. `take` says whether all is known that is needed to be ready."""
        self.part = part
        self._open_stream = open_stream
        self._take = take
        self._health = health
        self._clock = clock
        self._silence_s = silence_s
        self._told_s = clock.monotonic()
        self._failures = 0
        self._told = False
        self._task: asyncio.Task[None] | None = None

    @property
    def age_s(self) -> float:
        """Seconds since the last answer; where there was none, since the start."""
        return self._clock.monotonic() - self._told_s

    async def start(self) -> None:
        self._told_s = self._clock.monotonic()
        self._task = asyncio.create_task(self._run(), name=f"watch-{self.part}")
        _open.add(self)

    async def stop(self) -> None:
        _open.discard(self)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except LlmosError as error:
                if self._failures == 0:
                    log.warning(
                        "auth's stream of %s broke, the last state stays in use: %s", self.part, error
                    )
            except Exception:
                log.exception("auth's stream of %s cannot be read, what it told stays in use", self.part)
            most_s = BACKOFF_MAX_S if self._told else FIRST_BACKOFF_MAX_S
            backoff_s = min(most_s, BACKOFF_MIN_S * 2 ** min(self._failures, 10))
            self._failures += 1
            await self._clock.sleep(backoff_s * random.uniform(0.5, 1))  # noqa: S311 - no secret

    async def _follow(self) -> None:
        """One stream to its end: auth closes it when it has lasted as long as any call may."""
        answers = self._open_stream()
        try:
            while (answer := await self._next(answers)) is not None:
                ready = await self._take(answer)
                self._told_s = self._clock.monotonic()
                if self._failures > 1:
                    log.info("auth tells the %s again", self.part)
                self._failures = 0
                if ready:
                    self._told = True
                    await self._health.set_part(self.part, ready=True)
        finally:
            await answers.aclose()

    async def _next(self, answers: AsyncGenerator[_A, None]) -> _A | None:
        """The next answer, or None at the end. Raises DependencyUnavailable where none comes in time."""
        read = asyncio.ensure_future(anext(answers, None))
        silence = asyncio.ensure_future(self._clock.sleep(self._silence_s))
        try:
            await asyncio.wait((read, silence), return_when=asyncio.FIRST_COMPLETED)
            if read.done():
                return read.result()
            raise DependencyUnavailable(f"auth said nothing for {self._silence_s:g} s")
        finally:
            silence.cancel()
            read.cancel()
            await asyncio.gather(silence, read, return_exceptions=True)


class PolicySource:
    """The policy in force."""

    def __init__(self) -> None:
        self._engine: PolicyEngine | None = None
        self._version = -1

    @property
    def engine(self) -> PolicyEngine:
        """What decides by it. Raises DependencyUnavailable before auth has told the policy once."""
        if self._engine is None:
            raise DependencyUnavailable("The policy is not known yet: the auth service has not told it.")
        return self._engine

    @property
    def version(self) -> int:
        """Of the document in force; -1: there was none yet."""
        return self._version

    async def take(self, answer: PolicyAnswer) -> bool:
        """Takes over one answer; a new document is prepared in a thread, beside the requests."""
        if answer.document is not None and (self._engine is None or answer.version != self._version):
            self._engine = await asyncio.to_thread(_prepared, answer.document, answer.version, self._engine)
            self._version = answer.version
        return self._engine is not None


def _prepared(document: PolicyDocument, version: int, before: PolicyEngine | None) -> PolicyEngine:
    engine = PolicyEngine(document, version)
    if before is not None:
        engine.prepare_for(before)
    return engine


def watch_revocations(
    open_stream: Callable[[], AsyncGenerator[RevocationsAnswer, None]],
    revoked: RevocationList,
    *,
    health: Health,
    clock: Clock,
) -> Watching[RevocationsAnswer]:
    """Keeps `revoked` as auth tells it. `health` has the part `REVOCATIONS`."""

    async def take(answer: RevocationsAnswer) -> bool:
        revoked.apply(answer.snapshot, answer.version, answer.revocations)
        return revoked.complete

    return Watching(REVOCATIONS, open_stream, take, health=health, clock=clock)


def watch_policy(
    open_stream: Callable[[], AsyncGenerator[PolicyAnswer, None]],
    policy: PolicySource,
    *,
    health: Health,
    clock: Clock,
) -> Watching[PolicyAnswer]:
    """Keeps `policy` as auth tells it. `health` has the part `POLICY`."""
    return Watching(POLICY, open_stream, policy.take, health=health, clock=clock)
