"""The keys of auth as a verifier holds them, and a service's own tokens: renewed sparingly, kept in need."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta

import pytest
from joserfc.jwk import OKPKey

from services.mesh.clock import ManualClock
from services.mesh.context import RequestContext, current, enter, leave
from services.mesh.errors import CredentialInvalid, DependencyUnavailable
from services.mesh.jwks import MAX_JWKS_CHARS, MAX_KEYS, JwksCache, parse_jwks
from services.mesh.tokens import Audience, IssuedToken, ServiceTokens
from tests.framework.access_tokens import jwks_of

KEYS = {f"key-{n}": OKPKey.generate_key("Ed25519") for n in range(3)}


class Auth:
    """The auth service behind both ports. `up` tells whether it answers, `gate` holds answers back."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.up = True
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls = 0
        self.published = {"key-0"}
        self.text: str | None = None
        self.life_s = 300.0
        self.saw_request: RequestContext | None = None

    async def _answer(self) -> None:
        self.calls += 1
        self.saw_request = current()
        await self.gate.wait()
        if not self.up:
            raise DependencyUnavailable("auth is down")

    async def fetch(self) -> str:
        await self._answer()
        return self.text or jwks_of({kid: KEYS[kid] for kid in self.published})

    async def issue(self, audience: Audience) -> IssuedToken:
        await self._answer()
        return IssuedToken(f"{audience}#{self.calls}", self.clock.now() + timedelta(seconds=self.life_s))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def auth(clock: ManualClock) -> Auth:
    return Auth(clock)


async def settle() -> None:
    """Lets tasks that wait for nothing come to rest."""
    for _ in range(10):
        await asyncio.sleep(0)


class TestJwksCache:
    @pytest.fixture
    def jwks(self, auth: Auth, clock: ManualClock) -> JwksCache:
        return JwksCache(auth, clock, refresh_interval_s=60, min_interval_s=5)

    async def test_fetches_once_for_many(self, jwks: JwksCache, auth: Auth) -> None:
        auth.gate.clear()
        waiting = [asyncio.create_task(jwks.key("key-0")) for _ in range(50)]
        await settle()
        auth.gate.set()
        assert all(await asyncio.gather(*waiting))
        assert auth.calls == 1
        assert await jwks.key("key-0")
        assert auth.calls == 1

    async def test_r22_a_flood_of_unknown_keys_fetches_once_per_interval(
        self, jwks: JwksCache, auth: Auth, clock: ManualClock
    ) -> None:
        for n in range(1000):
            assert await jwks.key(f"unknown-{n}") is None
        assert auth.calls == 1
        for _ in range(10):
            await clock.advance(5)
            for n in range(100):
                assert await jwks.key(f"unknown-{n}") is None
        assert auth.calls == 11
        assert not jwks.knows("unknown-1")

    async def test_a_new_key_is_found(self, jwks: JwksCache, auth: Auth, clock: ManualClock) -> None:
        await jwks.key("key-0")
        auth.published = {"key-0", "key-1"}
        await clock.advance(5)
        assert await jwks.key("key-1")

    async def test_old_keys_are_renewed_behind_the_request(
        self, jwks: JwksCache, auth: Auth, clock: ManualClock
    ) -> None:
        await jwks.key("key-0")
        auth.published = {"key-1"}
        auth.gate.clear()
        await clock.advance(60)
        assert await jwks.key("key-0")  # at once, with auth not answering
        auth.gate.set()
        await settle()
        assert not jwks.knows("key-0")
        assert jwks.knows("key-1")

    async def test_r25_known_keys_stay_while_auth_is_down(
        self, jwks: JwksCache, auth: Auth, clock: ManualClock
    ) -> None:
        await jwks.key("key-0")
        auth.up = False
        for _ in range(100):
            await clock.advance(60)
            assert await jwks.key("key-0")
            await settle()
        assert await jwks.key("key-1") is None
        assert auth.calls <= 102

    async def test_without_any_key_says_that_auth_is_missing(
        self, jwks: JwksCache, auth: Auth, clock: ManualClock
    ) -> None:
        auth.up = False
        with pytest.raises(DependencyUnavailable):
            await jwks.key("key-0")
        with pytest.raises(DependencyUnavailable):
            await jwks.key("key-0")
        assert auth.calls == 1
        auth.up = True
        await clock.advance(1)
        assert await jwks.key("key-0")

    @pytest.mark.parametrize(
        "text", ["", "{}", "[]", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "AA"}]}', "[" * 9999]
    )
    async def test_a_broken_answer_changes_nothing(
        self, jwks: JwksCache, auth: Auth, clock: ManualClock, text: str
    ) -> None:
        await jwks.key("key-0")
        auth.text = text or "not JSON"
        await clock.advance(60)
        await jwks.refresh()
        assert jwks.knows("key-0")

    async def test_a_caller_that_leaves_does_not_end_the_fetch(self, jwks: JwksCache, auth: Auth) -> None:
        auth.gate.clear()
        first, second = (asyncio.create_task(jwks.key("key-0")) for _ in range(2))
        await settle()
        first.cancel()
        await settle()
        auth.gate.set()
        assert await second
        assert auth.calls == 1

    async def test_the_fetch_belongs_to_no_request(self, jwks: JwksCache, auth: Auth) -> None:
        token = enter(RequestContext("req_1", "/method"))
        await jwks.key("key-0")
        leave(token)
        assert auth.saw_request is None

    async def test_close_ends_a_running_fetch(self, jwks: JwksCache, auth: Auth) -> None:
        auth.gate.clear()
        waiting = asyncio.create_task(jwks.key("key-0"))
        await settle()
        await jwks.close()
        assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], asyncio.CancelledError)


class TestParseJwks:
    def test_takes_the_keys_it_can_use_and_passes_over_others(self) -> None:
        good = KEYS["key-0"].as_dict(private=False) | {"kid": "good"}
        others = [
            {"kty": "RSA", "kid": "rsa", "n": "AQAB", "e": "AQAB"},
            {"kty": "oct", "kid": "oct", "k": "AAAA"},
            good | {"kid": "../bad"},
            good | {"kid": 7},
            good | {"kid": "enc", "use": "enc"},
            good | {"kid": "alg", "alg": "HS256"},
            good | {"kid": "crv", "crv": "X25519"},
            "text",
            None,
        ]
        assert set(parse_jwks(json.dumps({"keys": [*others, good]}))) == {"good"}

    def test_drops_a_private_part(self) -> None:
        keys = parse_jwks(json.dumps({"keys": [KEYS["key-0"].as_dict(private=True) | {"kid": "k"}]}))
        assert not keys["k"].is_private

    def test_is_bounded(self) -> None:
        good = KEYS["key-0"].as_dict(private=False)
        with pytest.raises(ValueError, match="at most"):
            parse_jwks(json.dumps({"keys": [good | {"kid": f"k{n}"} for n in range(MAX_KEYS + 1)]}))
        with pytest.raises(ValueError, match="too large"):
            parse_jwks(" " * (MAX_JWKS_CHARS + 1))

    @pytest.mark.parametrize("x", ["", "AAAA", "!", "A" * 100])
    def test_refuses_a_broken_key(self, x: str) -> None:
        entry = {"kty": "OKP", "crv": "Ed25519", "kid": "k", "x": x}
        with pytest.raises(ValueError, match="JWK Set"):
            parse_jwks(json.dumps({"keys": [entry]}))


class TestServiceTokens:
    @pytest.fixture
    def tokens(self, auth: Auth, clock: ManualClock) -> ServiceTokens:
        return ServiceTokens(auth, clock)

    async def test_one_for_each_audience(self, tokens: ServiceTokens, auth: Auth) -> None:
        assert await tokens.token(Audience.INFERENCE) == "llmos-inference#1"
        assert await tokens.token("llmos-logging") == "llmos-logging#2"
        assert await tokens.token("llmos-inference") == "llmos-inference#1"
        assert auth.calls == 2

    async def test_an_unknown_audience_is_a_fault(self, tokens: ServiceTokens) -> None:
        with pytest.raises(ValueError, match="nobody"):
            await tokens.token("nobody")

    async def test_fetches_once_for_many(self, tokens: ServiceTokens, auth: Auth) -> None:
        auth.gate.clear()
        waiting = [asyncio.create_task(tokens.token("llmos-auth")) for _ in range(50)]
        await settle()
        waiting[0].cancel()
        auth.gate.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert results[1:] == ["llmos-auth#1"] * 49
        assert auth.calls == 1

    async def test_renews_at_two_thirds_behind_the_caller(
        self, tokens: ServiceTokens, auth: Auth, clock: ManualClock
    ) -> None:
        await tokens.token("llmos-auth")
        await clock.advance(199)
        assert await tokens.token("llmos-auth") == "llmos-auth#1"
        assert auth.calls == 1
        await clock.advance(1)
        assert await tokens.token("llmos-auth") == "llmos-auth#1"
        await settle()
        assert await tokens.token("llmos-auth") == "llmos-auth#2"

    async def test_r25_uses_the_valid_one_while_auth_is_down(
        self, tokens: ServiceTokens, auth: Auth, clock: ManualClock
    ) -> None:
        await tokens.token("llmos-auth")
        auth.up = False
        await clock.advance(200)
        for _ in range(1000):
            assert await tokens.token("llmos-auth") == "llmos-auth#1"
            await settle()
        assert auth.calls == 2
        await clock.advance(100)
        with pytest.raises(DependencyUnavailable):
            await tokens.token("llmos-auth")
        auth.up = True
        await clock.advance(1)
        assert await tokens.token("llmos-auth") == "llmos-auth#4"

    async def test_failing_does_not_flood_auth(self, tokens: ServiceTokens, auth: Auth) -> None:
        auth.up = False
        for _ in range(100):
            with pytest.raises(DependencyUnavailable):
                await tokens.token("llmos-auth")
        assert auth.calls == 1

    async def test_a_refused_secret_is_our_fault_and_not_the_callers(self, clock: ManualClock) -> None:
        class Refusing:
            async def issue(self, audience: Audience) -> IssuedToken:
                raise CredentialInvalid("the client id or its secret is wrong")

        with pytest.raises(DependencyUnavailable):
            await ServiceTokens(Refusing(), clock).token("llmos-auth")

    async def test_a_token_expired_on_arrival_is_refused(self, tokens: ServiceTokens, auth: Auth) -> None:
        auth.life_s = -1
        with pytest.raises(DependencyUnavailable):
            await tokens.token("llmos-auth")

    async def test_the_renewal_belongs_to_no_request(self, tokens: ServiceTokens, auth: Auth) -> None:
        token = enter(RequestContext("req_1", "/method"))
        await tokens.token("llmos-auth")
        leave(token)
        assert auth.saw_request is None

    async def test_close_ends_renewals(self, tokens: ServiceTokens, auth: Auth) -> None:
        auth.gate.clear()
        waiting = asyncio.create_task(tokens.token("llmos-auth"))
        await settle()
        await tokens.close()
        assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], asyncio.CancelledError)
