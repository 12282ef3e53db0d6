"""Credentials for tokens: the right ones pass, the wrong ones all look alike."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from services.auth import keys
from services.mesh.context import Identity
from services.mesh.errors import CredentialExpired, CredentialInvalid, LlmosError, PolicyDenied, ScopeMissing
from services.mesh.tokens import Audience

if TYPE_CHECKING:
    from conftest import Auth

GATEWAY_SECRET = "secret-of-gateway-".ljust(40, "x")


@pytest.fixture
async def secret(auth: Auth) -> str:
    """Of the client `app` in the tenant `acme`."""
    await auth.administration.create_tenant("acme")
    return await auth.administration.create_client("acme", "app", ["generate", "models.read"])


@pytest.fixture
async def api_key(auth: Auth, secret: str) -> str:
    key, _ = await auth.administration.create_api_key("app", ["generate"], None)
    return key


class TestClientCredentials:
    async def test_a_client(self, auth: Auth, secret: str) -> None:
        issued, scopes = await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])
        assert scopes == {"generate", "models.read"}
        verified = await auth.verify(issued.token)
        assert verified.identity() == Identity("acme", "app", "", scopes)
        assert verified.expires_at == issued.expires_at == auth.clock.now() + timedelta(seconds=300)

    async def test_fewer_scopes(self, auth: Auth, secret: str) -> None:
        issued, scopes = await auth.exchange.by_secret("app", secret, Audience.GATEWAY, ["generate"])
        assert (await auth.verify(issued.token)).scopes == scopes == {"generate"}

    async def test_a_service(self, auth: Auth) -> None:
        issued, scopes = await auth.exchange.by_secret(
            "service:gateway", GATEWAY_SECRET, Audience.INFERENCE, []
        )
        verified = await auth.verify(issued.token, Audience.INFERENCE)
        assert (verified.subject, verified.tenant_id, scopes) == ("service:gateway", "", frozenset())
        assert verified.is_service
        with pytest.raises(CredentialInvalid):
            await auth.verify(issued.token, Audience.LOGGING)

    async def test_an_api_key_as_the_secret(self, auth: Auth, api_key: str) -> None:
        issued, scopes = await auth.exchange.by_secret("app", api_key, Audience.GATEWAY, [])
        verified = await auth.verify(issued.token)
        assert scopes == verified.scopes == {"generate"}
        assert verified.key_id.startswith("key_")

    async def test_a_key_of_another_client_is_wrong(self, auth: Auth, api_key: str) -> None:
        await auth.administration.create_client("acme", "other", ["generate"])
        with pytest.raises(CredentialInvalid):
            await auth.exchange.by_secret("other", api_key, Audience.GATEWAY, [])

    async def test_r24_everything_wrong_looks_alike(self, auth: Auth, secret: str) -> None:
        attempts = [
            ("nobody", secret),
            ("app", "not the secret"),
            ("app", secret[:-1] + ("A" if secret[-1] != "A" else "B")),
            ("app", "x" + secret[1:]),
            ("app", ""),
            ("App", secret),
            ("app' OR '1'='1", secret),
            ("app\x00", secret),
            ("service:gateway", "not the secret"),
            ("service:nobody", GATEWAY_SECRET),
            ("service:auth", GATEWAY_SECRET),
            ("service:", ""),
            ("", ""),
        ]
        seen = set()
        for client_id, given in attempts:
            with pytest.raises(CredentialInvalid) as caught:
                await auth.exchange.by_secret(client_id, given, Audience.GATEWAY, [])
            seen.add((caught.value.message, caught.value.hint))
            assert len(given) < 4 or given not in str(vars(caught.value))
        assert len(seen) == 1

    async def test_the_proof_comes_before_the_policy(self, auth: Auth, secret: str) -> None:
        with pytest.raises(CredentialInvalid):
            await auth.exchange.by_secret("app", "wrong", Audience.INFERENCE, ["nonsense"])
        with pytest.raises(PolicyDenied):
            await auth.exchange.by_secret("app", secret, Audience.INFERENCE, [])
        with pytest.raises(ScopeMissing):
            await auth.exchange.by_secret("app", secret, Audience.AUTH, [])

    async def test_tokens_differ(self, auth: Auth, secret: str) -> None:
        made = {
            (await auth.exchange.by_secret("app", secret, Audience.GATEWAY, []))[0].token for _ in range(5)
        }
        assert len(made) == 5


class TestApiKeys:
    async def test_a_key(self, auth: Auth, api_key: str) -> None:
        issued, identity = await auth.exchange.by_api_key(api_key)
        assert identity == (await auth.verify(issued.token)).identity()
        assert (identity.tenant_id, identity.client_id, identity.scopes) == ("acme", "app", {"generate"})

    async def test_r24_a_wrong_key_is_refused(self, auth: Auth, api_key: str) -> None:
        wrong = [
            keys.new_api_key(),
            api_key[:-1],
            api_key + "0",
            api_key.swapcase(),
            "llmos_",
            "",
            "' OR 1=1 --",
        ]
        for text in wrong:
            with pytest.raises(CredentialInvalid) as caught:
                await auth.exchange.by_api_key(text)
            assert len(text) < 10 or text not in str(vars(caught.value))

    async def test_r24_the_right_prefix_does_not_help(self, auth: Auth, api_key: str) -> None:
        body = api_key[6:14] + keys.new_api_key()[14:36]
        forged = f"llmos_{body}{keys._checksum(body)}"
        assert keys.parse_api_key(forged).prefix == keys.parse_api_key(api_key).prefix
        with pytest.raises(CredentialInvalid):
            await auth.exchange.by_api_key(forged)

    async def test_no_token_outlives_the_key(self, auth: Auth, secret: str) -> None:
        end = auth.clock.now() + timedelta(seconds=400)
        key, _ = await auth.administration.create_api_key("app", [], end)
        issued, _ = await auth.exchange.by_api_key(key)
        assert issued.expires_at == auth.clock.now() + timedelta(seconds=300)
        await auth.clock.advance(200)
        issued, _ = await auth.exchange.by_api_key(key)
        assert issued.expires_at == end
        await auth.clock.advance(200)
        with pytest.raises(CredentialExpired):
            await auth.exchange.by_api_key(key)

    async def test_a_key_about_to_end_gives_no_token(self, auth: Auth, secret: str) -> None:
        key, _ = await auth.administration.create_api_key(
            "app", [], auth.clock.now() + timedelta(milliseconds=900)
        )
        with pytest.raises(LlmosError) as caught:
            await auth.exchange.by_api_key(key)
        assert isinstance(caught.value, CredentialExpired)
