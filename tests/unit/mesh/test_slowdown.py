"""The slow-down of brute force: who fails often waits, nobody else does, and memory is bounded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.mesh.clock import ManualClock
from services.mesh.errors import (
    CredentialExpired,
    CredentialInvalid,
    CredentialRevoked,
    DependencyUnavailable,
    LlmosError,
    RateLimit,
)
from services.mesh.slowdown import MAX_KEY_CHARS, Slowdown, source_of

ATTACKER, HONEST = "192.0.2.1", "198.51.100.7"


def waits_s(slowdown: Slowdown, address: str, name: str = "") -> float:
    """What an attempt is told to wait; 0 where it is let in."""
    try:
        slowdown.check(address, name)
    except RateLimit as error:
        return error.retry_after_s or 0.0
    return 0.0


def fail(slowdown: Slowdown, address: str, times: int, name: str = "") -> None:
    for _ in range(times):
        slowdown.failed(address, name)


class TestOneSource:
    async def test_r25_some_failures_are_free_then_the_wait_doubles_up_to_a_minute(self) -> None:
        clock = ManualClock()
        slowdown = Slowdown(clock)
        waits = []
        for _ in range(20):
            waits.append(waits_s(slowdown, ATTACKER))
            await clock.advance(waits[-1])
            assert not (waits[-1] and waits_s(slowdown, ATTACKER))
            slowdown.failed(ATTACKER)
        assert waits[:11] == [0] * 11
        assert waits[11:17] == pytest.approx([1, 2, 4, 8, 16, 32])
        assert max(waits) == 60

    async def test_r25_guesses_of_an_hour_from_one_address(self) -> None:
        """An attacker who comes again the moment that he may gets about one guess a minute."""
        clock = ManualClock()
        slowdown = Slowdown(clock)
        guesses = 0
        while clock.monotonic() < 3600:
            wait_s = waits_s(slowdown, ATTACKER)
            if wait_s:
                await clock.advance(wait_s)
            else:
                guesses += 1
                slowdown.failed(ATTACKER)
        assert guesses < 10 + 7 + 60 + 15

    async def test_others_are_unhurt(self) -> None:
        slowdown = Slowdown(ManualClock())
        fail(slowdown, ATTACKER, 1000)
        assert waits_s(slowdown, ATTACKER) == 60
        assert not waits_s(slowdown, HONEST)

    async def test_asking_while_one_waits_makes_it_no_longer(self) -> None:
        clock = ManualClock()
        slowdown = Slowdown(clock)
        fail(slowdown, ATTACKER, 14)
        await clock.advance(7)
        assert [waits_s(slowdown, ATTACKER) for _ in range(100)] == [1.0] * 100

    async def test_over_the_free_failures_one_attempt_is_let_in_at_a_time(self) -> None:
        clock = ManualClock()
        slowdown = Slowdown(clock)
        fail(slowdown, ATTACKER, 14)
        await clock.advance(8)
        assert not waits_s(slowdown, ATTACKER)
        assert all(waits_s(slowdown, ATTACKER) for _ in range(100))

    async def test_all_is_forgiven_with_time(self) -> None:
        clock = ManualClock()
        slowdown = Slowdown(clock)
        fail(slowdown, ATTACKER, 1000)
        await clock.advance(60 * 17 + 1)
        fail(slowdown, ATTACKER, 10)
        assert not waits_s(slowdown, ATTACKER)

    async def test_a_success_forgives_one_and_seldom(self) -> None:
        """With one good credential nobody guesses much faster."""
        clock = ManualClock()
        slowdown = Slowdown(clock)
        guesses = 0
        while clock.monotonic() < 3600:
            slowdown.succeeded(ATTACKER)
            if waits_s(slowdown, ATTACKER):
                await clock.advance(1)
            else:
                guesses += 1
                slowdown.failed(ATTACKER)
        assert guesses < 10 + 7 + 3600 / 60 + 3600 / 10 + 30

    async def test_a_success_never_slows_anybody(self) -> None:
        slowdown = Slowdown(ManualClock())
        for _ in range(100):
            slowdown.succeeded(HONEST, "a")
        assert not waits_s(slowdown, HONEST, "a")
        assert len(slowdown) == 0


class TestNames:
    async def test_an_owner_who_has_not_failed_is_not_delayed_by_those_who_fail_on_his_name(self) -> None:
        slowdown = Slowdown(ManualClock())
        for number in range(1000):
            fail(slowdown, f"192.0.2.{number % 250}", 1, "Ab3dEf6h")
        assert not any(waits_s(slowdown, HONEST, "Ab3dEf6h") for _ in range(10))

    async def test_a_botnet_gets_the_common_pace(self) -> None:
        """From each address one attempt, and all others together one a second."""
        clock = ManualClock()
        slowdown = Slowdown(clock)
        addresses = [f"10.0.{number // 250}.{number % 250}" for number in range(1000)]
        guesses = 0
        for _ in range(60):
            for address in addresses:
                if not waits_s(slowdown, address, "Ab3dEf6h"):
                    guesses += 1
                    slowdown.failed(address, "Ab3dEf6h")
            await clock.advance(1)
        assert guesses <= len(addresses) + 60

    async def test_whoever_has_failed_waits_for_his_turn_a_second_at_most(self) -> None:
        clock = ManualClock()
        slowdown = Slowdown(clock)
        fail(slowdown, HONEST, 1, "Ab3dEf6h")
        for number in range(100):
            fail(slowdown, f"192.0.2.{number}", 1, "Ab3dEf6h")
        assert waits_s(slowdown, HONEST, "Ab3dEf6h") == 1.0
        await clock.advance(1)
        assert not waits_s(slowdown, HONEST, "Ab3dEf6h")
        assert waits_s(slowdown, "192.0.2.1", "Ab3dEf6h") == 1.0
        assert not waits_s(slowdown, "192.0.2.1", "another0")


class TestMemory:
    async def test_a_flood_over_many_sources_grows_nothing_and_pushes_out_no_offender(self) -> None:
        slowdown = Slowdown(ManualClock(), max_sources=100, max_names=100)
        fail(slowdown, ATTACKER, 17, "Ab3dEf6h")
        for number in range(20_000):
            address = f"2001:db8:{number >> 16:x}:{number & 0xFFFF:x}::1"
            fail(slowdown, address, 3, f"name{number}")
        assert len(slowdown) <= 200
        assert waits_s(slowdown, ATTACKER) == 60

    async def test_an_offender_costs_the_failures_of_all_places(self) -> None:
        slowdown = Slowdown(ManualClock(), max_sources=100)
        fail(slowdown, ATTACKER, 17)
        for number in range(49):
            fail(slowdown, f"198.18.0.{number}", 11)
        assert waits_s(slowdown, ATTACKER) == 60
        fail(slowdown, "198.18.1.1", 11)
        assert not waits_s(slowdown, ATTACKER)

    async def test_the_latest_failures_are_kept(self) -> None:
        slowdown = Slowdown(ManualClock(), max_sources=20)
        for number in range(1000):
            fail(slowdown, ATTACKER, 1 if number < 9 else 0)
            fail(slowdown, f"198.18.{number // 250}.{number % 250}", 1)
            if number == 8:
                fail(slowdown, ATTACKER, 3)
        assert waits_s(slowdown, ATTACKER) > 0

    async def test_long_names_and_what_is_no_address_take_no_more_room(self) -> None:
        slowdown = Slowdown(ManualClock())
        fail(slowdown, "x" * 100_000, 11, "n" * 100_000)
        assert waits_s(slowdown, "x" * MAX_KEY_CHARS) == 1.0


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:ffff:ffff:ffff", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix", "unix"),
        ("", ""),
    ],
)
def test_what_counts_as_one_source(address: str, source: str) -> None:
    assert source_of(address) == source


@given(st.text(max_size=200))
def test_any_text_is_a_source(address: str) -> None:
    assert len(source_of(address)) <= MAX_KEY_CHARS


class TestAttempt:
    @pytest.mark.parametrize("error", [CredentialExpired, CredentialRevoked, DependencyUnavailable])
    async def test_only_a_wrong_credential_counts(self, error: type[LlmosError]) -> None:
        slowdown = Slowdown(ManualClock())
        for _ in range(100):
            with pytest.raises(error), slowdown.attempt(HONEST, "a"):
                raise error("no")
        assert not waits_s(slowdown, HONEST, "a")

    async def test_is_refused_before_anything_is_done(self) -> None:
        slowdown = Slowdown(ManualClock())
        tried = refused = 0
        for _ in range(1000):
            try:
                with slowdown.attempt(ATTACKER, "a"):
                    tried += 1
                    raise CredentialInvalid("no")
            except CredentialInvalid:
                pass
            except RateLimit:
                refused += 1
        assert (tried, refused) == (11, 989)


@dataclass
class Model:
    """The rule for one source, without names and without bounds: each failure by itself, forgiven or not."""

    free: int
    interval_s: float
    max_wait_s: float
    left: dict[str, float] = field(default_factory=dict)
    until_s: dict[str, float] = field(default_factory=dict)
    forgiven_s: dict[str, float] = field(default_factory=dict)

    def passes(self, duration_s: float) -> None:
        for source in list(self.left):
            self.left[source] -= duration_s / self.interval_s
            if self.left[source] < 1e-9:
                del self.left[source]
                self.until_s.pop(source, None)
                self.forgiven_s.pop(source, None)

    def _wait_s(self, source: str) -> float:
        over = math.ceil(self.left.get(source, 0) - self.free - 1e-9)
        return min(2.0 ** (over - 1), self.max_wait_s) if over > 0 else 0.0

    def check(self, source: str, now_s: float) -> float:
        wait_s = self.until_s.get(source, 0) - now_s
        if wait_s < 0.001 and self._wait_s(source):
            self.until_s[source] = now_s + self._wait_s(source)
        return max(0.0, wait_s)

    def failed(self, source: str, now_s: float) -> None:
        most = self.free + 1 + math.ceil(math.log2(self.max_wait_s))
        self.left[source] = min(self.left.get(source, 0) + 1, most)
        if self._wait_s(source):
            self.until_s[source] = now_s + self._wait_s(source)

    def succeeded(self, source: str, now_s: float) -> None:
        if self.left.get(source, 0) > 1 and now_s - self.forgiven_s.get(source, -math.inf) >= 10:
            self.left[source] -= 1
            self.forgiven_s[source] = self.until_s[source] = now_s


SOURCES = st.sampled_from(["192.0.2.1", "192.0.2.2", "192.0.2.3"])
# Times are multiples of 1/8 s, so that sums are exact; the interval makes failures fractions of 1/64.
STEP = st.one_of(
    st.tuples(st.just("check"), SOURCES),
    st.tuples(st.just("failed"), SOURCES),
    st.tuples(st.just("failed"), SOURCES),
    st.tuples(st.just("succeeded"), SOURCES),
    st.tuples(st.just("passes"), st.integers(1, 400).map(lambda eighths: eighths / 8)),
)


@given(st.lists(STEP, max_size=80), st.integers(0, 4))
async def test_it_does_what_the_model_does(steps: list[tuple[str, object]], free: int) -> None:
    clock = ManualClock()
    slowdown = Slowdown(clock, free_failures=free, interval_s=64, max_wait_s=32)
    model = Model(free, 64, 32)
    for what, argument in steps:
        if what == "passes":
            assert isinstance(argument, float)
            await clock.advance(argument)
            model.passes(argument)
            continue
        source, now_s = str(argument), clock.monotonic()
        if what == "check":
            wait_s = waits_s(slowdown, source)
            assert wait_s == model.check(source, now_s)
            assert 0 <= wait_s <= 32
        elif what == "failed":
            slowdown.failed(source)
            model.failed(source, now_s)
        else:
            slowdown.succeeded(source)
            model.succeeded(source, now_s)


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 30), st.booleans(), st.integers(0, 9)), max_size=300
    )
)
async def test_waits_and_memory_are_bounded_whatever_comes(
    steps: list[tuple[int, int, bool, int]],
) -> None:
    clock = ManualClock()
    slowdown = Slowdown(clock, free_failures=1, max_sources=8, max_names=6)
    for source, name, works, pause_s in steps:
        if not pause_s:
            await clock.advance(1)
        if not 0 <= waits_s(slowdown, f"10.0.0.{source}", f"n{name}") <= 60:
            raise AssertionError("a wait is out of its bounds")
        (slowdown.succeeded if works else slowdown.failed)(f"10.0.0.{source}", f"n{name}")
        assert len(slowdown) <= 14
