"""Credentials for tokens: the right ones pass, the wrong ones all look alike."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from services.auth.credentials import keys
from services.auth.store import Kind
from services.mesh.errors import (
    CredentialExpired,
    CredentialInvalid,
    CredentialRevoked,
    LlmosError,
    PolicyDenied,
    ScopeMissing,
    StateConflict,
)
from services.mesh.policy import Condition, Effect, Role, Rule
from services.mesh.tokens import Audience

if TYPE_CHECKING:
    from conftest import Auth

GATEWAY_SECRET = "secret-of-gateway-".ljust(40, "x")
USER = frozenset({"generate", "models.read"})


@pytest.fixture
async def secret(auth: Auth) -> str:
    """Of the client `app` in the tenant `acme`."""
    await auth.tenant()
    return await auth.client()


@pytest.fixture
async def api_key(auth: Auth, secret: str) -> str:
    return await auth.key(scopes=frozenset({"generate"}))


class TestClientCredentials:
    async def test_a_client(self, auth: Auth, secret: str) -> None:
        signed = await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])
        assert signed.scopes == USER
        verified = await auth.verify(signed.token)
        assert verified.identity() == signed.identity
        assert (verified.tenant_id, verified.client_id, verified.key_id) == ("acme", "app", "")
        assert (verified.roles, verified.direct_scopes) == (frozenset(), None)
        assert verified.expires_at == signed.expires_at == auth.clock.now() + timedelta(seconds=300)

    async def test_fewer_scopes(self, auth: Auth, secret: str) -> None:
        signed = await auth.exchange.by_secret("app", secret, Audience.GATEWAY, ["generate"])
        assert (await auth.verify(signed.token)).scopes == signed.scopes == {"generate"}

    async def test_a_service(self, auth: Auth) -> None:
        signed = await auth.exchange.by_secret("service:gateway", GATEWAY_SECRET, Audience.INFERENCE, [])
        verified = await auth.verify(signed.token, Audience.INFERENCE)
        assert (verified.subject, verified.tenant_id, signed.scopes) == ("service:gateway", "", frozenset())
        assert verified.is_service
        assert signed.identity is None
        with pytest.raises(CredentialInvalid):
            await auth.verify(signed.token, Audience.LOGGING)

    async def test_r25_a_service_outlives_the_callers_that_it_knows_without_auth(self, auth: Auth) -> None:
        """It renews at two thirds: what is left then is as long as a caller's token lives."""
        signed = await auth.exchange.by_secret("service:gateway", GATEWAY_SECRET, Audience.INFERENCE, [])
        assert signed.expires_at - auth.clock.now() == timedelta(seconds=3 * 300)

    async def test_an_api_key_as_the_secret(self, auth: Auth, api_key: str) -> None:
        signed = await auth.exchange.by_secret("app", api_key, Audience.GATEWAY, [])
        verified = await auth.verify(signed.token)
        assert signed.scopes == verified.scopes == {"generate"}
        assert verified.key_id == "key_0"

    async def test_a_key_of_another_client_is_wrong(self, auth: Auth, api_key: str) -> None:
        await auth.client("other")
        with pytest.raises(CredentialInvalid):
            await auth.exchange.by_secret("other", api_key, Audience.GATEWAY, [])

    async def test_r24_everything_wrong_looks_alike(self, auth: Auth, secret: str) -> None:
        await auth.client("off", disabled=True)
        attempts = [
            ("nobody", secret),
            ("app", "not the secret"),
            ("app", secret[:-1] + ("A" if secret[-1] != "A" else "B")),
            ("app", "x" + secret[1:]),
            ("app", ""),
            ("App", secret),
            ("app' OR '1'='1", secret),
            ("app\x00", secret),
            ("off", "not the secret"),
            ("app", keys.new_api_key()),
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

    async def test_a_client_without_a_secret_has_none(self, auth: Auth, secret: str) -> None:
        await auth.change(Kind.CLIENT, "app", secret_digest=b"")
        for given in (secret, "", "\x00" * 32):
            with pytest.raises(CredentialInvalid):
                await auth.exchange.by_secret("app", given, Audience.GATEWAY, [])

    async def test_the_secret_before_works_until_its_end(self, auth: Auth, secret: str) -> None:
        new = keys.new_client_secret()
        await auth.change(
            Kind.CLIENT,
            "app",
            secret_digest=keys.digest(new),
            old_secret_digest=keys.digest(secret),
            old_secret_until=auth.clock.now() + timedelta(seconds=60),
        )
        await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])
        await auth.exchange.by_secret("app", new, Audience.GATEWAY, [])
        await auth.clock.advance(60)
        await auth.exchange.by_secret("app", new, Audience.GATEWAY, [])
        with pytest.raises(CredentialInvalid):
            await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])

    async def test_the_proof_comes_before_the_policy(self, auth: Auth, secret: str) -> None:
        with pytest.raises(CredentialInvalid):
            await auth.exchange.by_secret("app", "wrong", Audience.INFERENCE, ["nonsense"])
        with pytest.raises(PolicyDenied):
            await auth.exchange.by_secret("app", secret, Audience.INFERENCE, [])
        with pytest.raises(ScopeMissing):
            await auth.exchange.by_secret("app", secret, Audience.AUTH, [])

    async def test_tokens_differ(self, auth: Auth, secret: str) -> None:
        made = [await auth.exchange.by_secret("app", secret, Audience.GATEWAY, []) for _ in range(5)]
        assert len({signed.token for signed in made}) == 5
        assert len({signed.identity.token_id for signed in made if signed.identity}) == 5


class TestDisabled:
    @pytest.mark.parametrize(("kind", "resource_id"), [(Kind.CLIENT, "app"), (Kind.TENANT, "acme")])
    async def test_r23_what_is_disabled_is_refused(
        self, auth: Auth, secret: str, api_key: str, kind: Kind, resource_id: str
    ) -> None:
        await auth.change(kind, resource_id, disabled=True)
        for given in (secret, api_key):
            with pytest.raises(CredentialRevoked):
                await auth.exchange.by_secret("app", given, Audience.GATEWAY, [])
        with pytest.raises(CredentialRevoked):
            await auth.exchange.by_api_key(api_key)
        with pytest.raises(CredentialInvalid):
            await auth.exchange.by_secret("app", "not the secret", Audience.GATEWAY, [])

    async def test_r23_with_the_organisation_all_its_projects(self, auth: Auth) -> None:
        await auth.tenant("corp")
        await auth.tenant("corp-lab", parent_id="corp")
        secret = await auth.client("app", "corp-lab")
        await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])
        await auth.change(Kind.TENANT, "corp", disabled=True)
        with pytest.raises(CredentialRevoked):
            await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])

    async def test_r23_a_disabled_key_alone(self, auth: Auth, secret: str, api_key: str) -> None:
        await auth.change(Kind.API_KEY, "key_0", disabled=True)
        with pytest.raises(CredentialRevoked):
            await auth.exchange.by_api_key(api_key)
        await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])


class TestRoles:
    async def test_roles_and_what_does_not_hang_on_them(self, auth: Auth) -> None:
        await auth.tenant()
        secret = await auth.client(scopes=frozenset({"generate"}), roles=frozenset({"user", "auditor"}))
        signed = await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])
        verified = await auth.verify(signed.token)
        assert verified.identity() == signed.identity
        assert verified.scopes == {"generate", "models.read", "audit.read"}
        assert verified.roles == {"user", "auditor"}
        assert verified.direct_scopes == {"generate"}
        fewer = await auth.exchange.by_secret("app", secret, Audience.GATEWAY, ["audit.read"])
        verified = await auth.verify(fewer.token)
        assert (verified.scopes, verified.direct_scopes) == ({"audit.read"}, frozenset())

    async def test_a_rule_that_may_allow_makes_a_scope_reachable(self, auth: Auth) -> None:
        await auth.tenant()
        rule = Rule("small", Effect.ALLOW, frozenset({"generate"}), Condition(max_tokens=10))
        never = Rule("never", Effect.DENY, frozenset({"audit.read"}))
        await auth.put(Role("writer", rules=(rule, never)))
        secret = await auth.client(scopes=frozenset(), roles=frozenset({"writer"}))
        signed = await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])
        assert signed.scopes == {"generate"}
        assert signed.identity is not None
        assert signed.identity.direct_scopes == frozenset()
        with pytest.raises(ScopeMissing):
            await auth.exchange.by_secret("app", secret, Audience.GATEWAY, ["audit.read"])

    async def test_a_role_of_another_tenant_gives_nothing(self, auth: Auth) -> None:
        await auth.tenant("corp")
        await auth.tenant("lab", parent_id="corp")
        await auth.tenant("other")
        for tenant_id in ("corp", "lab", "other"):
            await auth.put(Role(f"of-{tenant_id}", tenant_id, scopes=frozenset({"generate"})))
        roles = frozenset({"of-corp", "of-lab", "of-other"})
        secret = await auth.client("app", "lab", scopes=frozenset(), roles=roles)
        signed = await auth.exchange.by_secret("app", secret, Audience.GATEWAY, [])
        assert signed.identity is not None
        assert signed.identity.roles == {"of-corp", "of-lab"}

    async def test_a_tenants_administrator_gets_a_token_for_auth(self, auth: Auth) -> None:
        await auth.tenant()
        secret = await auth.client(scopes=frozenset(), roles=frozenset({"tenant-admin"}))
        signed = await auth.exchange.by_secret("app", secret, Audience.AUTH, ["tenant.admin"])
        assert (await auth.verify(signed.token, Audience.AUTH)).scopes == {"tenant.admin"}

    async def test_more_than_fits_into_a_token_is_refused_here(self, auth: Auth, secret: str) -> None:
        key = await auth.key(models=tuple(f"{n:02}" + "\U0001f600" * 126 for n in range(16)))
        with pytest.raises(StateConflict):
            await auth.exchange.by_api_key(key)


class TestApiKeys:
    async def test_a_key(self, auth: Auth, api_key: str) -> None:
        signed = await auth.exchange.by_api_key(api_key)
        assert signed.identity == (await auth.verify(signed.token)).identity()
        assert signed.identity is not None
        assert (signed.identity.tenant_id, signed.identity.client_id) == ("acme", "app")
        assert signed.identity.scopes == {"generate"}

    async def test_a_key_without_scopes_has_all_of_its_clients(self, auth: Auth, secret: str) -> None:
        signed = await auth.exchange.by_api_key(await auth.key())
        assert signed.scopes == USER

    async def test_a_key_never_has_more_than_its_client(self, auth: Auth, secret: str) -> None:
        key = await auth.key(scopes=frozenset({"generate", "admin"}))
        assert (await auth.exchange.by_api_key(key)).scopes == {"generate"}
        with pytest.raises(ScopeMissing):
            await auth.exchange.by_secret("app", key, Audience.GATEWAY, ["models.read"])

    async def test_its_limits_go_into_the_token(self, auth: Auth, secret: str) -> None:
        networks = (ip_network("2001:db8::/32"), ip_network("10.0.0.0/8"))
        key = await auth.key(models=("b", "a*", "b"), addresses=networks)
        signed = await auth.exchange.by_api_key(key)
        identity = (await auth.verify(signed.token)).identity()
        assert identity == signed.identity
        assert identity.models == ("a*", "b")
        assert set(identity.addresses) == set(networks)

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
        key = await auth.key(expires_at=end)
        signed = await auth.exchange.by_api_key(key)
        assert signed.expires_at == auth.clock.now() + timedelta(seconds=300)
        await auth.clock.advance(200)
        signed = await auth.exchange.by_api_key(key)
        assert signed.expires_at == end
        await auth.clock.advance(200)
        with pytest.raises(CredentialExpired):
            await auth.exchange.by_api_key(key)

    async def test_a_key_about_to_end_gives_no_token(self, auth: Auth, secret: str) -> None:
        key = await auth.key(expires_at=auth.clock.now() + timedelta(milliseconds=900))
        with pytest.raises(LlmosError) as caught:
            await auth.exchange.by_api_key(key)
        assert isinstance(caught.value, CredentialExpired)


class TestLastUse:
    async def used(self, auth: Auth) -> object:
        stored = await auth.store.get(Kind.API_KEY, "key_0")
        assert stored is not None
        return stored.last_used_at

    async def test_is_remembered_to_the_minute_and_written_every_minute(
        self, auth: Auth, api_key: str
    ) -> None:
        await auth.last_use.start()
        await auth.clock.advance(30)
        await auth.exchange.by_api_key(api_key)
        assert await self.used(auth) is None
        await auth.clock.advance(60)
        await asyncio.sleep(0)
        assert await self.used(auth) == auth.clock.now().replace(second=0) - timedelta(minutes=1)
        await auth.last_use.stop()

    async def test_is_written_at_the_end(self, auth: Auth, api_key: str) -> None:
        await auth.last_use.start()
        await auth.exchange.by_secret("app", api_key, Audience.GATEWAY, [])
        await auth.last_use.stop()
        assert await self.used(auth) == auth.clock.now()

    async def test_a_refused_key_was_not_used(self, auth: Auth, api_key: str) -> None:
        await auth.change(Kind.API_KEY, "key_0", disabled=True)
        with pytest.raises(CredentialRevoked):
            await auth.exchange.by_api_key(api_key)
        await auth.last_use.flush()
        assert await self.used(auth) is None
