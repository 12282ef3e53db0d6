"""Tells the other services of each revocation and of each change of the policy, as it comes.

The hub reads the store twice a second, and at once when this process has committed something: so several
auth processes on one database need not know of each other. Whoever watches is told what is new, and every
second and a half that there is nothing. While the store cannot be read nobody is told anything: then what a
service knows grows old, and it can see that. A watcher has no queue: it reads on in the hub's own list from
where it was, however slow it is.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
from collections.abc import AsyncGenerator, Set
from dataclasses import dataclass
from operator import attrgetter

from services.auth import store as stored
from services.auth.store import Store
from services.mesh.clock import Clock, wait_at_most
from services.mesh.errors import LlmosError
from services.mesh.interceptors import Call, Link, Rest
from services.mesh.policy import PolicyDocument
from services.mesh.revocation import MAX_ENTRIES, Revocation, RevocationList
from services.mesh.watching import PolicyAnswer, RevocationsAnswer

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.5
NOTHING_NEW_INTERVAL_S = 1.5
"""So often it is told that there is nothing new: watchers take five seconds of silence for an outage."""
MAX_IN_ANSWER = 5_000
"""Revocations, in one answer: well below the limit of a message."""
FORGET_INTERVAL_S = 60.0
"""Between two times that the hub drops what has expired from its list."""
PRUNE_INTERVAL_S = 3600.0
_VERSION = attrgetter("version")
_TOKENS = "/llmos.auth.v1.TokenService/"
WATCHES = frozenset({f"{_TOKENS}WatchRevocations", f"{_TOKENS}WatchPolicy"})
"""Methods that last as long as their caller likes."""
REVOKE_TOKEN = f"{_TOKENS}RevokeToken"


@dataclass(frozen=True, slots=True)
class _State:
    """What was last read."""

    version: int
    """Of the latest revocation."""
    live: tuple[Revocation, ...]
    """In the order of their versions."""
    policy_version: int
    policy: PolicyDocument


class Hub:
    """A component, to be started after the store. `revoked` is this process's own list."""

    def __init__(self, store: Store, clock: Clock, *, max_revocations: int = MAX_ENTRIES) -> None:
        self._store = store
        self._clock = clock
        self._max_revocations = max_revocations
        self.revoked = RevocationList(clock, max_entries=max_revocations)
        self._state: _State | None = None
        self._version = -1
        self._forgot_s = clock.monotonic()
        self._told = asyncio.Event()
        self._told_s = clock.monotonic()
        self._woken = asyncio.Event()
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads once, so that this process knows what is revoked before it serves. Raises what the store
        raises."""
        await self._read()
        self._task = asyncio.create_task(self._run(), name="watch-hub")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def wake(self) -> None:
        """Something was committed here: reads it at once."""
        self._woken.set()

    def link(self, methods: Set[str]) -> Link:
        """A link of the chain that wakes the hub after each call of these methods."""

        async def wake(call: Call, rest: Rest) -> None:
            try:
                await rest(call)
            finally:
                if call.context.method in methods:
                    self.wake()

        return wake

    async def revocations(self) -> AsyncGenerator[RevocationsAnswer, None]:
        """First all of them, then each as it comes; an answer from time to time where there is none."""
        state, told = await self._current(), self._told
        live = [each for each in state.live if each.expires_at > self._clock.now()]
        snapshot = True
        while True:
            for answer in _answers(state.version, live, snapshot=snapshot):
                yield answer
            position, snapshot = state.version, False
            await told.wait()
            state, told = await self._current(), self._told
            live = list(state.live[bisect.bisect_right(state.live, position, key=_VERSION) :])

    async def policy(self) -> AsyncGenerator[PolicyAnswer, None]:
        """First the document, and again whenever it is another one; an answer as above."""
        known = -1
        while True:
            told = self._told
            state = await self._current()
            yield PolicyAnswer(state.policy_version, None if state.policy_version == known else state.policy)
            known = state.policy_version
            await told.wait()

    async def _current(self) -> _State:
        while self._state is None:
            await self._told.wait()
        return self._state

    async def _run(self) -> None:
        while True:
            await self._pause()
            try:
                await self._read()
            except LlmosError as error:
                if not self._failing:
                    log.warning("the store cannot be read, so nothing is told to watchers: %s", error)
                self._failing = True
                continue
            self._failing = False

    async def _pause(self) -> None:
        await wait_at_most(self._clock, self._woken, POLL_INTERVAL_S)
        self._woken.clear()

    async def _read(self) -> None:
        version = await self._store.version()
        before = self._state
        is_news = self._failing or before is None or version != self._version
        if before is None or version != self._version:
            now = self._clock.now()
            last = before.version if before else 0
            found = await self._store.revocations(after_version=last, now=now)
            new = [_revocation(each) for each in found]
            last = new[-1].version if new else last
            policy_version, policy = await self._store.policy()
            if before is not None and before.policy_version == policy_version:
                policy = before.policy
            live = self._bounded([*(before.live if before else ()), *new])
            self._state = _State(last, live, policy_version, policy)
            self._version = version
            self.revoked.apply(before is None, last, new)
        self._forget()
        now_s = self._clock.monotonic()
        if is_news or now_s - self._told_s >= NOTHING_NEW_INTERVAL_S:
            self._told_s = now_s
            self._tell()

    def _forget(self) -> None:
        """Drops what has expired. What watchers hold is another list."""
        if self._state is None or self._clock.monotonic() - self._forgot_s < FORGET_INTERVAL_S:
            return
        self._forgot_s = self._clock.monotonic()
        now, state = self._clock.now(), self._state
        live = tuple(each for each in state.live if each.expires_at > now)
        self._state = _State(state.version, live, state.policy_version, state.policy)
        self.revoked.apply(False, state.version, ())

    def _bounded(self, live: list[Revocation]) -> tuple[Revocation, ...]:
        """The most that any service keeps: of more, those that end last."""
        if len(live) > self._max_revocations:
            log.error("more than %d revocations: those that end first are not told", self._max_revocations)
            live = sorted(live, key=attrgetter("expires_at"))[-self._max_revocations :]
            live.sort(key=_VERSION)
        return tuple(live)

    def _tell(self) -> None:
        told, self._told = self._told, asyncio.Event()
        told.set()


class Pruning:
    """Lets the store forget what has expired, as a component."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="prune")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._store.prune(self._clock.now())
            except LlmosError as error:
                log.warning("what has expired could not be dropped from the store: %s", error)
            await self._clock.sleep(PRUNE_INTERVAL_S)


def _answers(version: int, revocations: list[Revocation], *, snapshot: bool) -> list[RevocationsAnswer]:
    """In parts where they are many. The last part is told by its last revocation, or by having none."""
    parts = [
        RevocationsAnswer(version, snapshot and start == 0, tuple(revocations[start : start + MAX_IN_ANSWER]))
        for start in range(0, len(revocations), MAX_IN_ANSWER)
    ]
    if not parts:
        return [RevocationsAnswer(version, snapshot)]
    if revocations[-1].version < version:  # the latest one has expired already
        parts.append(RevocationsAnswer(version))
    return parts


def _revocation(kept: stored.Revocation) -> Revocation:
    revoked = kept.revoked
    return Revocation(
        version=kept.version,
        kind=revoked.kind,
        subject_id=revoked.subject_id,
        revoked_at=revoked.revoked_at,
        expires_at=revoked.expires_at,
        cut_streams=revoked.cut_streams,
    )
