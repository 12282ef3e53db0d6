"""API keys: exchanged once, remembered within bounds, and known ones outlive auth."""

from __future__ import annotations

import asyncio
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.auth.credentials import keys as auth_keys
from services.gateway.authentication import GatewayAuthenticator
from services.gateway.keys import KeyRing, is_well_formed
from services.mesh import errors
from services.mesh.clock import ManualClock
from services.mesh.context import Identity
from services.mesh.slowdown import Slowdown
from tests.framework.gateway_fakes import ALICE, FakeAudit, FakeAuth, Gate

TIMEOUT_S = 5


class Setup:
    def __init__(self, **limits: float) -> None:
        self.clock = ManualClock()
        self.auth = FakeAuth(self.clock)
        self.key = auth_keys.new_api_key()
        self.auth.keys[self.key] = ALICE
        self.ring = KeyRing(self.auth, self.auth, self.clock, **limits)  # type: ignore[arg-type]


@given(st.integers(0, 41), st.characters(min_codepoint=33, max_codepoint=1000))
def test_the_form_of_a_key_is_auths(place: int, character: str) -> None:
    key = auth_keys.new_api_key()
    assert is_well_formed(key)
    changed = key[:place] + character + key[place + 1 :]
    try:
        auth_keys.parse_api_key(changed)
        accepted = True
    except errors.CredentialInvalid:
        accepted = False
    assert is_well_formed(changed) == accepted


async def test_a_key_is_exchanged_once_until_it_expires() -> None:
    setup = Setup()
    assert [await setup.ring.identity(setup.key) for _ in range(3)] == [ALICE] * 3
    assert setup.auth.exchanges == 1
    await setup.clock.advance(setup.auth.lifetime_s)
    assert await setup.ring.identity(setup.key) == ALICE
    assert setup.auth.exchanges == 2


async def test_while_auth_is_away_known_keys_work_until_they_expire() -> None:
    setup = Setup()
    await setup.ring.identity(setup.key)
    setup.auth.error = errors.DependencyUnavailable("down")
    await setup.clock.advance(setup.auth.lifetime_s - 1)
    assert await setup.ring.identity(setup.key) == ALICE
    with pytest.raises(errors.DependencyUnavailable):
        await setup.ring.identity(auth_keys.new_api_key())
    await setup.clock.advance(1)
    with pytest.raises(errors.DependencyUnavailable):
        await setup.ring.identity(setup.key)


async def test_r23_a_revoked_token_makes_auth_say_whether_the_key_is() -> None:
    setup = Setup()
    await setup.ring.identity(setup.key)
    setup.auth.revoked.add("token-1")
    assert await setup.ring.identity(setup.key) == ALICE
    assert setup.auth.exchanges == 2
    setup.auth.revoked.add("token-2")
    setup.auth.error = errors.CredentialRevoked("the key too")
    for _ in range(3):
        with pytest.raises(errors.CredentialRevoked):
            await setup.ring.identity(setup.key)
    assert setup.auth.exchanges == 3


async def test_r23_what_is_known_as_revoked_is_refused_while_auth_is_away() -> None:
    setup = Setup()
    await setup.ring.identity(setup.key)
    setup.auth.revoked.add("token-1")
    setup.auth.error = errors.DependencyUnavailable("down")
    with pytest.raises(errors.CredentialRevoked):
        await setup.ring.identity(setup.key)


async def test_a_key_has_all_that_its_token_says() -> None:
    setup = Setup()
    setup.auth.keys[setup.key] = limited = Identity(
        "acme",
        "alice",
        "key_1",
        frozenset({"generate"}),
        roles=frozenset({"user"}),
        direct_scopes=frozenset(),
        models=("a*",),
        addresses=(ip_network("10.0.0.0/8"),),
        token_id="t",
        issued_at_s=1,
    )
    assert await setup.ring.identity(setup.key) == limited


async def test_a_malformed_key_never_reaches_auth() -> None:
    setup = Setup()
    for key in (setup.key[:-1], setup.key + "0", setup.key.swapcase(), "llmos_", "llmos_' OR 1=1 --"):
        with pytest.raises(errors.CredentialInvalid):
            await setup.ring.identity(key)
    assert setup.auth.exchanges == 0


async def test_a_refused_key_is_remembered_for_a_moment() -> None:
    setup = Setup(refusal_ttl_s=5)
    setup.auth.error = errors.CredentialRevoked("gone")
    for _ in range(3):
        with pytest.raises(errors.CredentialRevoked):
            await setup.ring.identity(setup.key)
    assert setup.auth.exchanges == 1
    setup.auth.error = None
    await setup.clock.advance(5)
    assert await setup.ring.identity(setup.key) == ALICE


async def test_many_callers_cause_one_exchange_and_one_may_leave() -> None:
    setup = Setup()
    setup.auth.gate = Gate()
    first = asyncio.create_task(setup.ring.identity(setup.key))
    others = [asyncio.create_task(setup.ring.identity(setup.key)) for _ in range(5)]
    await asyncio.wait_for(setup.auth.gate.reached.wait(), TIMEOUT_S)
    first.cancel()
    setup.auth.gate.open.set()
    assert await asyncio.gather(*others) == [ALICE] * 5
    assert setup.auth.exchanges == 1


async def test_the_first_callers_deadline_is_not_everybodys() -> None:
    setup = Setup()
    setup.auth.gate = Gate()
    setup.auth.error = errors.DeadlineExceeded("of the first")
    first = asyncio.create_task(setup.ring.identity(setup.key))
    second = asyncio.create_task(setup.ring.identity(setup.key))
    await asyncio.wait_for(setup.auth.gate.arrivals.acquire(), TIMEOUT_S)
    gate, setup.auth.gate = setup.auth.gate, Gate()
    gate.open.set()
    await asyncio.wait_for(setup.auth.gate.reached.wait(), TIMEOUT_S)
    setup.auth.error = None
    setup.auth.gate.open.set()
    assert await asyncio.wait_for(second, TIMEOUT_S) == ALICE
    with pytest.raises(errors.DeadlineExceeded):
        await first


async def test_the_memory_is_bounded() -> None:
    setup = Setup(max_entries=2, max_in_flight=3)
    keys = [auth_keys.new_api_key() for _ in range(3)]
    for index, key in enumerate(keys):
        setup.auth.keys[key] = Identity("acme", f"client-{index}")
        await setup.ring.identity(key)
    await setup.ring.identity(keys[2])
    assert setup.auth.exchanges == 3
    await setup.ring.identity(keys[0])  # forgotten as the least recently used
    assert setup.auth.exchanges == 4

    setup.auth.gate = Gate()
    flood = [asyncio.create_task(setup.ring.identity(auth_keys.new_api_key())) for _ in range(5)]
    done, waiting = await asyncio.wait(flood, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    assert all(isinstance(task.exception(), errors.DependencyUnavailable) for task in done)
    await setup.ring.close()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert setup.auth.exchanges == 4 + 3


async def test_refusals_are_counted_by_source() -> None:
    setup = Setup()
    audit = FakeAudit()
    slowdown = Slowdown(setup.clock)
    authenticate = GatewayAuthenticator(None, setup.ring, audit, slowdown)  # type: ignore[arg-type]
    caller = await authenticate("/m", {"authorization": f"Bearer {setup.key}"}, "10.0.0.1")
    assert caller.identity == ALICE
    assert caller.peer_service is None
    for metadata, error in (
        ({}, errors.CredentialMissing),
        ({"authorization": "Basic x"}, errors.CredentialInvalid),
        ({"authorization": "Bearer llmos_x"}, errors.CredentialInvalid),
    ):
        with pytest.raises(error):
            await authenticate("/m", metadata, "10.0.0.1")
    assert audit.anonymous == [
        ("10.0.0.1", "CREDENTIAL_MISSING"),
        ("10.0.0.1", "CREDENTIAL_INVALID"),
        ("10.0.0.1", "CREDENTIAL_INVALID"),
    ]
