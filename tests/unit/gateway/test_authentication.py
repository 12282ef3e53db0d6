"""Brute force at the gateway: wrong credentials are slowed before anything is done, good ones never."""

from __future__ import annotations

import pytest

from services.auth.credentials import keys as auth_keys
from services.gateway.authentication import GatewayAuthenticator, OpenMethodGuard
from services.gateway.keys import KeyRing
from services.mesh import errors
from services.mesh.clock import ManualClock
from services.mesh.context import RequestContext
from services.mesh.interceptors import Call
from services.mesh.slowdown import Slowdown
from tests.framework.gateway_fakes import ALICE, FakeAudit, FakeAuth

ATTACKER, HONEST = "192.0.2.1", "198.51.100.7"
ISSUE = "/llmos.auth.v1.TokenService/IssueToken"


class Gateway:
    """The authenticator over an auth in memory, which also verifies the tokens that it gave."""

    def __init__(self, **limits: int) -> None:
        self.clock = ManualClock()
        self.auth = FakeAuth(self.clock)
        self.audit = FakeAudit()
        ring = KeyRing(self.auth, self.auth, self.clock)
        self.slowdown = Slowdown(self.clock)
        self.authenticate = GatewayAuthenticator(
            self.auth,  # type: ignore[arg-type]
            ring,
            self.audit,
            self.slowdown,
            **limits,
        )
        self.guard = OpenMethodGuard(self.audit, self.slowdown)

    def key(self) -> str:
        """A good key."""
        key = auth_keys.new_api_key()
        self.auth.keys[key] = ALICE
        return key

    async def call(self, credential: str, address: str) -> str:
        """The reason of the refusal; empty: it was accepted."""
        try:
            caller = await self.authenticate("/m", {"authorization": f"Bearer {credential}"}, address)
        except errors.LlmosError as error:
            return error.reason
        assert caller.identity == ALICE
        return ""

    async def flood(self, times: int, address: str = ATTACKER) -> list[str]:
        return [await self.call(auth_keys.new_api_key(), address) for _ in range(times)]

    async def issue(self, address: str, error: errors.LlmosError | None = None) -> None:
        """A call of an open method, which ends so."""

        async def served(call: Call) -> None:
            if error is not None:
                raise error

        await self.guard.link(Call(RequestContext("req", ISSUE, address), {}), served)


async def test_r25_a_flood_of_bad_keys_is_slowed_and_hardly_reaches_auth() -> None:
    gateway = Gateway()
    honest = gateway.key()
    reasons = await gateway.flood(1000)
    assert reasons[:11] == ["CREDENTIAL_INVALID"] * 11
    assert set(reasons[11:]) == {"RATE_LIMIT"}
    assert gateway.auth.exchanges == 11
    assert gateway.audit.anonymous[-1] == (ATTACKER, "RATE_LIMIT")
    assert len(gateway.audit.anonymous) == 1000
    assert await gateway.call(honest, HONEST) == ""


async def test_r25_what_was_accepted_is_never_slowed_even_beside_the_attacker() -> None:
    gateway = Gateway()
    known, new = gateway.key(), gateway.key()
    assert await gateway.call(known, ATTACKER) == ""
    await gateway.flood(50)
    assert await gateway.call(known, ATTACKER) == ""
    assert await gateway.call(new, ATTACKER) == "RATE_LIMIT"
    # also where its token has ended, so that auth has to be asked again
    await gateway.clock.advance(gateway.auth.lifetime_s + 10)
    await gateway.flood(20)
    asked = gateway.auth.exchanges
    assert await gateway.call(known, ATTACKER) == ""
    assert gateway.auth.exchanges == asked + 1


async def test_an_owner_is_not_locked_out_by_guesses_at_his_key() -> None:
    gateway = Gateway()
    honest = gateway.key()
    prefix = honest[len("llmos_") :][:8]
    for number in range(300):
        body = prefix + auth_keys.new_api_key()[len("llmos_") + 8 : -6]
        guess = f"llmos_{body}{auth_keys._checksum(body)}"
        await gateway.call(guess, f"192.0.2.{number % 250}")
    assert await gateway.call(honest, HONEST) == ""


async def test_a_credential_that_turns_out_wrong_is_no_longer_exempt() -> None:
    gateway = Gateway()
    key = gateway.key()
    assert await gateway.call(key, ATTACKER) == ""
    del gateway.auth.keys[key]
    await gateway.clock.advance(gateway.auth.lifetime_s + 10)
    reasons = [await gateway.call(key, ATTACKER) for _ in range(20)]
    assert reasons[0] == "CREDENTIAL_INVALID"
    assert reasons[-1] == "RATE_LIMIT"


async def test_who_sends_no_credential_guesses_nothing() -> None:
    gateway = Gateway()
    for _ in range(100):
        with pytest.raises(errors.CredentialMissing):
            await gateway.authenticate("/m", {}, ATTACKER)
    assert await gateway.call(gateway.key(), ATTACKER) == ""


async def test_the_memory_of_accepted_credentials_is_bounded() -> None:
    gateway = Gateway(max_accepted=2)
    keys = [gateway.key() for _ in range(3)]
    for key in keys:
        assert await gateway.call(key, ATTACKER) == ""
    await gateway.flood(50)
    assert [await gateway.call(key, ATTACKER) for key in keys] == ["RATE_LIMIT", "", ""]


async def test_r25_open_methods_are_slowed_by_address() -> None:
    gateway = Gateway()
    for _ in range(11):
        with pytest.raises(errors.CredentialInvalid):
            await gateway.issue(ATTACKER, errors.CredentialInvalid("wrong"))
    with pytest.raises(errors.RateLimit):
        await gateway.issue(ATTACKER)
    await gateway.issue(HONEST)
    assert gateway.audit.anonymous[-1] == (ATTACKER, "RATE_LIMIT")
    assert await gateway.call(gateway.key(), ATTACKER) == "RATE_LIMIT"


async def test_the_public_keys_are_for_everybody() -> None:
    gateway = Gateway()
    await gateway.flood(50)
    jwks = RequestContext("req", "/llmos.auth.v1.TokenService/GetJwks", ATTACKER)
    served: list[str] = []

    async def serve(call: Call) -> None:
        served.append(ATTACKER)

    await gateway.guard.link(Call(jwks, {}), serve)
    assert served == [ATTACKER]
