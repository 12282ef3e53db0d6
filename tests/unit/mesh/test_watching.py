"""A stream from auth is kept open: what it tells is taken over, silence and breaks open it anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta

import pytest

from services.mesh.clock import ManualClock
from services.mesh.errors import CredentialRevoked, DependencyUnavailable, LlmosError
from services.mesh.health import Health
from services.mesh.policy import PolicyDocument, RevocationKind, Role
from services.mesh.revocation import Revocation, RevocationList
from services.mesh.watching import (
    BACKOFF_MAX_S,
    POLICY,
    REVOCATIONS,
    SILENCE_S,
    PolicyAnswer,
    PolicySource,
    RevocationsAnswer,
    Watching,
    watch_policy,
    watch_revocations,
)
from tests.framework.waiting import eventually

START = datetime(2030, 1, 1, tzinfo=UTC)
END = "the stream ends"


class Streams:
    """Auth's side: each stream that is opened reads what the test puts."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0
        self.answers: asyncio.Queue[RevocationsAnswer | LlmosError | str] = asyncio.Queue()

    async def open(self) -> AsyncGenerator[RevocationsAnswer, None]:
        self.opened += 1
        try:
            while True:
                answer = await self.answers.get()
                if isinstance(answer, LlmosError):
                    raise answer
                if isinstance(answer, str):
                    return
                yield answer
        finally:
            self.closed += 1


class World:
    def __init__(self) -> None:
        self.clock = ManualClock(START)
        self.health = Health([REVOCATIONS])
        self.revoked = RevocationList(self.clock)
        self.streams = Streams()
        self.watching: Watching[RevocationsAnswer] = watch_revocations(
            self.streams.open, self.revoked, health=self.health, clock=self.clock
        )

    async def tell(self, answer: RevocationsAnswer | LlmosError | str) -> None:
        self.streams.answers.put_nowait(answer)
        await self.rest()

    async def rest(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def __aenter__(self) -> World:
        await self.watching.start()
        await self.rest()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.watching.stop()

    def refuses(self, token_id: str) -> bool:
        try:
            self.revoked.check(
                token_id=token_id, key_id="", client_id="c", tenant_id="t", issued_at_s=int(START.timestamp())
            )
        except CredentialRevoked:
            return True
        return False


def snapshot(*token_ids: str) -> RevocationsAnswer:
    found = tuple(
        Revocation(1, RevocationKind.TOKEN, each, START, START + timedelta(hours=1)) for each in token_ids
    )
    return RevocationsAnswer(1, snapshot=True, revocations=found)


async def test_the_first_answer_makes_it_ready() -> None:
    async with World() as world:
        assert REVOCATIONS in world.health.waiting_for
        await world.tell(snapshot("a"))
        assert REVOCATIONS not in world.health.waiting_for
        assert world.refuses("a")


async def test_half_a_snapshot_does_not_make_it_ready() -> None:
    async with World() as world:
        await world.tell(RevocationsAnswer(9, snapshot=True, revocations=snapshot("a").revocations))
        assert REVOCATIONS in world.health.waiting_for
        await world.tell(RevocationsAnswer(9))
        assert REVOCATIONS not in world.health.waiting_for


async def test_r23_a_silent_stream_is_opened_anew_and_the_list_stays() -> None:
    async with World() as world:
        await world.tell(snapshot("a"))
        await world.clock.advance(SILENCE_S - 0.1)
        assert (world.streams.opened, world.streams.closed) == (1, 0)
        await world.tell(RevocationsAnswer(1))
        await world.clock.advance(SILENCE_S - 0.1)
        assert (world.streams.opened, world.streams.closed) == (1, 0)
        assert world.watching.age_s == pytest.approx(SILENCE_S - 0.1)
        await world.clock.advance(0.2)
        await world.rest()
        assert world.streams.closed == 1
        assert world.refuses("a")
        await world.clock.advance(BACKOFF_MAX_S)
        await world.rest()
        assert world.streams.opened == 2
        assert world.refuses("a")
        await world.tell(snapshot("b"))
        assert world.watching.age_s == 0
        assert world.refuses("b")
        assert not world.refuses("a")


@pytest.mark.parametrize("end", [DependencyUnavailable("gone"), END])
async def test_r23_a_stream_that_ends_is_opened_again_soon(end: LlmosError | str) -> None:
    """Also the one that auth closes since no call lasts longer."""
    async with World() as world:
        for turn in range(1, 6):
            await world.tell(snapshot("a"))
            assert world.streams.opened == turn
            await world.tell(end)
            await world.clock.advance(0.1)
            await world.rest()
            assert world.streams.opened == turn + 1


async def opened_in(world: World, seconds: float) -> int:
    """How often it tries while auth is away."""
    before = world.streams.opened
    for _ in range(round(seconds / 0.1)):
        if world.streams.opened > world.streams.closed:
            await world.tell(DependencyUnavailable("away"))
        await world.clock.advance(0.1)
        await world.rest()
    return world.streams.opened - before


async def test_without_auth_it_asks_every_two_seconds_at_most() -> None:
    async with World() as world:
        await world.tell(snapshot("a"))
        assert 14 <= await opened_in(world, 30) <= 36


async def test_before_it_knows_anything_it_asks_a_few_times_a_second() -> None:
    """Services start side by side: none is to wait longer than auth takes."""
    async with World() as world:
        assert 30 <= await opened_in(world, 10) <= 80
        assert REVOCATIONS in world.health.waiting_for


async def test_a_fault_of_ours_does_not_end_the_watch() -> None:
    async with World() as world:
        await world.tell(RevocationsAnswer(1, True, (None,)))  # type: ignore[arg-type]
        await world.clock.advance(0.2)
        await world.tell(snapshot("a"))
        assert world.refuses("a")


async def test_stopping_closes_the_stream() -> None:
    async with World() as world:
        await world.tell(snapshot())
    assert world.streams.closed == 1


async def test_the_policy_is_rebuilt_for_a_new_document_only() -> None:
    clock, health, policy = ManualClock(START), Health([POLICY]), PolicySource()
    answers: asyncio.Queue[PolicyAnswer] = asyncio.Queue()

    async def stream() -> AsyncGenerator[PolicyAnswer, None]:
        while True:
            yield await answers.get()

    async def told(answer: PolicyAnswer) -> None:
        answers.put_nowait(answer)
        await eventually(lambda: answers.empty() and policy.version == answer.version)

    with pytest.raises(DependencyUnavailable):
        _ = policy.engine
    watching = watch_policy(stream, policy, health=health, clock=clock)
    await watching.start()
    await told(PolicyAnswer(3, PolicyDocument()))
    first = policy.engine
    assert first.version == 3
    await told(PolicyAnswer(3))
    await told(PolicyAnswer(3, PolicyDocument()))
    assert policy.engine is first
    await told(PolicyAnswer(4, PolicyDocument(roles=(Role("reader"),))))
    assert policy.engine.version == 4
    assert policy.engine.document.roles == (Role("reader"),)
    await watching.stop()
