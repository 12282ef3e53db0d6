"""RFC 8693: our own tokens for narrower ones, and those of corporate providers for ours."""

from __future__ import annotations

import re
from datetime import timedelta
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from services.auth.grants.exchange import SubjectKind
from services.auth.grants.introspection import ClientProof
from services.auth.grants.people import client_id_of
from services.auth.providers.provider_tokens import ProvenPerson
from services.auth.store import Client, IdentityProvider, Kind
from services.mesh.errors import (
    CredentialExpired,
    CredentialInvalid,
    CredentialRevoked,
    PolicyDenied,
    ScopeMissing,
)
from services.mesh.tokens import Audience

if TYPE_CHECKING:
    from conftest import Auth

GATEWAY_SECRET = "secret-of-gateway-".ljust(40, "x")
PROVIDER = IdentityProvider("corp", "https://login.corp.example", "llmos", "acme")


class TestOwnTokens:
    async def narrowed(self, auth: Auth, token: str, *wanted: str) -> str:
        signed = await auth.exchange.exchange(token, SubjectKind.ACCESS_TOKEN, Audience.GATEWAY, list(wanted))
        return signed.token

    @pytest.fixture
    async def first(self, auth: Auth) -> str:
        await auth.tenant()
        await auth.client(scopes=frozenset({"generate"}), roles=frozenset({"auditor", "user"}))
        key = await auth.key(models=("a*",), addresses=(ip_network("10.0.0.0/8"),))
        return (await auth.exchange.by_api_key(key)).token

    async def test_narrower_and_otherwise_the_same(self, auth: Auth, first: str) -> None:
        before = (await auth.verify(first)).identity()
        after = (await auth.verify(await self.narrowed(auth, first, "generate", "audit.read"))).identity()
        assert after.scopes == {"generate", "audit.read"}
        assert after.direct_scopes == {"generate"}
        assert after.token_id != before.token_id
        for name in ("tenant_id", "client_id", "key_id", "roles", "models", "addresses"):
            assert getattr(after, name) == getattr(before, name)

    async def test_never_wider_again(self, auth: Auth, first: str) -> None:
        narrow = await self.narrowed(auth, first, "generate")
        with pytest.raises(ScopeMissing):
            await self.narrowed(auth, narrow, "audit.read")

    async def test_never_longer(self, auth: Auth, first: str) -> None:
        end = (await auth.verify(first)).expires_at
        await auth.clock.advance(200)
        second = await self.narrowed(auth, first, "generate")
        assert (await auth.verify(second)).expires_at == end
        await auth.clock.advance(101)
        with pytest.raises(CredentialExpired):
            await self.narrowed(auth, first, "generate")

    @pytest.mark.parametrize("kind", [Kind.API_KEY, Kind.CLIENT, Kind.TENANT])
    async def test_r23_not_of_what_was_disabled_since(self, auth: Auth, first: str, kind: Kind) -> None:
        names = {Kind.API_KEY: "key_0", Kind.CLIENT: "app", Kind.TENANT: "acme"}
        await auth.change(kind, names[kind], disabled=True)
        with pytest.raises(CredentialRevoked):
            await self.narrowed(auth, first, "generate")

    async def test_not_a_services_nor_one_for_another_audience(self, auth: Auth, first: str) -> None:
        service = await auth.exchange.by_secret("service:gateway", GATEWAY_SECRET, Audience.AUTH, [])
        with pytest.raises(PolicyDenied):
            await self.narrowed(auth, service.token)
        secret = await auth.client("root", scopes=frozenset({"admin"}))
        for_auth = await auth.exchange.by_secret("root", secret, Audience.AUTH, [])
        with pytest.raises(CredentialInvalid):
            await self.narrowed(auth, for_auth.token)

    async def test_for_auth_with_a_scope_that_auth_knows(self, auth: Auth, first: str) -> None:
        with pytest.raises(ScopeMissing):
            await auth.exchange.exchange(first, SubjectKind.ACCESS_TOKEN, Audience.AUTH, [])
        secret = await auth.client("root", scopes=frozenset({"admin", "generate"}))
        token = (await auth.exchange.by_secret("root", secret, Audience.GATEWAY, [])).token
        signed = await auth.exchange.exchange(token, SubjectKind.ACCESS_TOKEN, Audience.AUTH, ["admin"])
        assert (await auth.verify(signed.token, Audience.AUTH)).scopes == {"admin"}

    async def test_an_api_key_by_its_kind_only(self, auth: Auth, first: str) -> None:
        key = await auth.key()
        signed = await auth.exchange.exchange(key, SubjectKind.API_KEY, Audience.GATEWAY, ["generate"])
        assert signed.scopes == {"generate"}
        for kind in (SubjectKind.ACCESS_TOKEN, SubjectKind.JWT):
            with pytest.raises(CredentialInvalid):
                await auth.exchange.exchange(key, kind, Audience.GATEWAY, [])
        with pytest.raises(CredentialInvalid):
            await auth.exchange.exchange(first, SubjectKind.API_KEY, Audience.GATEWAY, [])


class TestPeople:
    @pytest.fixture(autouse=True)
    async def tenant(self, auth: Auth) -> None:
        await auth.tenant()

    def arrives(
        self, auth: Auth, *roles: str, name: str = "Alice", provider: IdentityProvider = PROVIDER
    ) -> None:
        auth.providers.people["jwt"] = ProvenPerson(provider, "alice", frozenset(roles), name)

    async def token(self, auth: Auth) -> str:
        signed = await auth.exchange.exchange("jwt", SubjectKind.JWT, Audience.GATEWAY, [])
        return signed.token

    async def stored(self, auth: Auth) -> Client:
        stored = await auth.store.get(Kind.CLIENT, client_id_of(PROVIDER.issuer, "alice"))
        assert stored is not None
        assert isinstance(stored.resource, Client)
        return stored.resource

    async def test_the_first_exchange_makes_a_client(self, auth: Auth) -> None:
        self.arrives(auth, "user")
        identity = (await auth.verify(await self.token(auth))).identity()
        assert re.fullmatch("user:[a-z2-7]{26}", identity.client_id)
        assert (identity.tenant_id, identity.roles) == ("acme", {"user"})
        assert identity.scopes == {"generate", "models.read"}
        assert identity.direct_scopes == frozenset()
        client = await self.stored(auth)
        assert (client.is_user, client.external_subject) == (True, "corp alice")
        assert (client.display_name, client.secret_digest) == ("Alice", b"")
        changes = await auth.store.changes(kind=Kind.CLIENT, limit=10)
        assert [(change.actor, change.note) for change in changes] == [("service:auth", "token exchange")]

    async def test_the_second_changes_nothing(self, auth: Auth) -> None:
        self.arrives(auth, "user")
        first = (await auth.verify(await self.token(auth))).client_id
        version = await auth.store.version()
        assert (await auth.verify(await self.token(auth))).client_id == first
        assert await auth.store.version() == version

    async def test_roles_are_what_the_mapping_says_now(self, auth: Auth) -> None:
        self.arrives(auth, "user", "auditor")
        await self.token(auth)
        self.arrives(auth, "auditor", name="")
        assert (await auth.verify(await self.token(auth))).roles == {"auditor"}
        client = await self.stored(auth)
        assert (client.roles, client.display_name) == ({"auditor"}, "Alice")

    async def test_r23_a_disabled_person_stays_out(self, auth: Auth) -> None:
        self.arrives(auth, "user")
        await self.token(auth)
        await auth.change(Kind.CLIENT, client_id_of(PROVIDER.issuer, "alice"), disabled=True)
        self.arrives(auth, "auditor")
        with pytest.raises(CredentialRevoked):
            await self.token(auth)
        assert (await self.stored(auth)).roles == {"user"}

    async def test_a_person_does_not_move_to_another_tenant(self, auth: Auth) -> None:
        self.arrives(auth, "user")
        await self.token(auth)
        await auth.tenant("other")
        self.arrives(auth, "user", provider=IdentityProvider("corp", PROVIDER.issuer, "llmos", "other"))
        with pytest.raises(PolicyDenied):
            await self.token(auth)

    async def test_people_differ_by_issuer_and_subject(self) -> None:
        ids = {client_id_of(issuer, subject) for issuer in ("https://a", "https://b") for subject in "xy"}
        assert len(ids) == 4

    async def test_an_unknown_token(self, auth: Auth) -> None:
        with pytest.raises(CredentialInvalid):
            await self.token(auth)


class TestIntrospection:
    @pytest.fixture
    async def client(self, auth: Auth) -> ClientProof:
        await auth.tenant()
        return ClientProof("app", await auth.client())

    async def token(self, auth: Auth, client: ClientProof) -> str:
        return (await auth.exchange.by_secret(client.client_id, client.secret, Audience.GATEWAY, [])).token

    async def active(self, auth: Auth, client: ClientProof, token: str) -> bool:
        return (await auth.introspection.introspect(client, token)).token is not None

    async def test_r23_an_own_token(self, auth: Auth, client: ClientProof) -> None:
        token = await self.token(auth, client)
        found = await auth.introspection.introspect(client, token)
        assert found.token == await auth.verify(token)
        assert found.asked_by is not None
        assert (found.asked_by.tenant_id, found.asked_by.client_id) == ("acme", "app")

    async def test_r23_anything_else_is_inactive(self, auth: Auth, client: ClientProof) -> None:
        token = await self.token(auth, client)
        for other in ("", "x", "a.b.c", token[:-1], token + "x", await auth.key()):
            assert not await self.active(auth, client, other)
        await auth.clock.advance(306)
        assert not await self.active(auth, client, token)

    async def test_r23_who_does_not_prove_itself_is_told_nothing(
        self, auth: Auth, client: ClientProof
    ) -> None:
        token = await self.token(auth, client)
        with pytest.raises(CredentialInvalid):
            await auth.introspection.introspect(ClientProof("app", "wrong"), token)
        with pytest.raises(CredentialInvalid):
            await auth.introspection.revoke(ClientProof("app", "wrong"), token)
        assert await self.active(auth, client, token)

    async def test_r23_another_tenants_token_is_nobodys_business(
        self, auth: Auth, client: ClientProof
    ) -> None:
        token = await self.token(auth, client)
        await auth.tenant("other")
        asker = ClientProof("spy", await auth.client("spy", "other", roles=frozenset({"tenant-admin"})))
        root = ClientProof("root", await auth.client("root", "other", roles=frozenset({"admin"})))
        colleague = ClientProof("mate", await auth.client("mate"))
        assert not await self.active(auth, asker, token)
        assert await self.active(auth, colleague, token)
        assert await self.active(auth, root, token)
        assert await self.active(auth, ClientProof("service:gateway", GATEWAY_SECRET), token)
        service = await auth.exchange.by_secret("service:gateway", GATEWAY_SECRET, Audience.AUTH, [])
        assert not await self.active(auth, client, service.token)
        assert await self.active(auth, root, service.token)

    @pytest.mark.parametrize("kind", [Kind.CLIENT, Kind.TENANT])
    async def test_r23_of_what_is_disabled_none_is_active(
        self, auth: Auth, client: ClientProof, kind: Kind
    ) -> None:
        token = await self.token(auth, client)
        await auth.tenant("ops")
        root = ClientProof("root", await auth.client("root", "ops", scopes=frozenset({"admin"})))
        assert await self.active(auth, root, token)
        await auth.change(kind, "app" if kind is Kind.CLIENT else "acme", disabled=True)
        assert not await self.active(auth, root, token)

    async def test_r23_a_revoked_token_is_inactive_at_once(self, auth: Auth, client: ClientProof) -> None:
        first, second = await self.token(auth, client), await self.token(auth, client)
        asked_by = await auth.introspection.revoke(client, first)
        assert asked_by is not None
        assert asked_by.client_id == "app"
        assert not await self.active(auth, client, first)
        assert await self.active(auth, client, second)
        with pytest.raises(CredentialRevoked):
            await auth.exchange.exchange(first, SubjectKind.ACCESS_TOKEN, Audience.GATEWAY, [])
        kept = await auth.store.revocations(after_version=0, now=auth.clock.now())
        assert kept[0].revoked.subject_id == (await auth.verify(first)).token_id
        assert kept[0].revoked.expires_at > (await auth.verify(first)).expires_at + timedelta(seconds=5)

    async def test_r23_revoking_what_is_no_token_is_no_error(self, auth: Auth, client: ClientProof) -> None:
        token = await self.token(auth, client)
        await auth.introspection.revoke(client, token)
        version = await auth.store.version()
        for other in (token, "x", "a.b.c"):
            await auth.introspection.revoke(client, other)
        assert await auth.store.version() == version

    async def test_r23_another_clients_token_stays(self, auth: Auth, client: ClientProof) -> None:
        token = await self.token(auth, client)
        for name, fields in (("mate", {}), ("root", {"scopes": frozenset({"admin"})})):
            other = ClientProof(name, await auth.client(name, **fields))
            with pytest.raises(PolicyDenied):
                await auth.introspection.revoke(other, token)
        assert await self.active(auth, client, token)
