"""Tokens of a corporate provider: who they prove, with which roles."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from services.auth.providers.foreign_token import unverified_issuer
from services.auth.providers.provider_tokens import MAX_ROLES
from services.auth.store import ClaimRule
from services.mesh.errors import CredentialExpired, CredentialInvalid, PolicyDenied
from services.mesh.policy import Role
from tests.framework.oidc_exchange import OWN_ISSUER, Trust, trust
from tests.framework.oidc_provider import JWKS, Answer, MockProvider, SigningKey, rsa_key


@pytest.fixture
async def corp() -> AsyncIterator[Trust]:
    async with MockProvider() as provider, trust(provider) as trusted:
        yield trusted


async def test_a_person_with_the_roles_of_its_groups(corp: Trust) -> None:
    person = await corp.person()
    assert person.provider == corp.configured
    assert (person.subject, person.display_name) == ("00u1-alice", "Alice")
    assert person.roles == {"user"}


@pytest.mark.parametrize(
    ("private", "algs"),
    [
        (rsa_key(), ("RS256", "PS256")),
        (ec.generate_private_key(ec.SECP256R1()), ("ES256",)),
        (ed25519.Ed25519PrivateKey.generate(), ("EdDSA", "Ed25519")),
    ],
    ids=["RSA", "P-256", "Ed25519"],
)
async def test_each_algorithm_with_its_kind_of_key(corp: Trust, private: Any, algs: tuple[str, ...]) -> None:
    for alg in algs:
        corp.provider.keys = [SigningKey(f"key-{alg}", private, alg)]
        await corp.clock.advance(31)
        assert (await corp.person()).subject == "00u1-alice"


async def test_a_key_that_is_for_one_algorithm_is_not_for_another(corp: Trust) -> None:
    key = corp.provider.key
    jwks = {"keys": [key.jwk(alg="RS256"), key.jwk(kid="other", alg="ES256")]}
    corp.provider.answers[JWKS] = Answer(json.dumps(jwks).encode())
    await corp.person()
    for forged in (
        key.sign(corp.provider.claims(corp.clock.now()), alg="PS256"),
        key.sign(corp.provider.claims(corp.clock.now()), kid="other"),
    ):
        with pytest.raises(CredentialInvalid):
            await corp.verify(forged)


@pytest.mark.parametrize("typ", [None, "JWT", "jwt", "at+jwt", "application/at+jwt"])
async def test_types_of_id_and_access_tokens(corp: Trust, typ: str | None) -> None:
    token = corp.provider.key.sign(corp.provider.claims(corp.clock.now()), typ=typ, x5t="AAAA")
    assert (await corp.verify(token)).roles == {"user"}


class TestClaims:
    @pytest.mark.parametrize(
        "said",
        [
            {"aud": ["llmos"]},
            {"aud": ["other", "llmos"]},
            {"aud": ["other", "llmos"], "azp": "llmos"},
            {"aud": "llmos", "azp": "their-web-app"},
            {"nbf": 0},
            {"iat": 1893455999.5},
            {"sub": "x" * 255},
            {"sub": "CN=Alice, O=Acme"},
        ],
        ids=str,
    )
    async def test_what_is_in_order(self, corp: Trust, said: dict[str, Any]) -> None:
        assert (await corp.person(**said)).roles == {"user"}

    async def test_clocks_may_differ_by_five_seconds(self, corp: Trust) -> None:
        now = int(corp.clock.now().timestamp())
        await corp.person(iat=now + 5, nbf=now + 5)
        await corp.person(iat=now - 60, exp=now - 4)
        for early in ({"iat": now + 6}, {"nbf": now + 6}):
            with pytest.raises(CredentialInvalid, match="not valid yet"):
                await corp.person(**early)
        with pytest.raises(CredentialExpired):
            await corp.person(iat=now - 60, exp=now - 5)

    async def test_a_day_at_most(self, corp: Trust) -> None:
        now = int(corp.clock.now().timestamp())
        await corp.person(exp=now + 86_400)
        with pytest.raises(CredentialInvalid, match="lifetime"):
            await corp.person(exp=now + 86_401)

    @pytest.mark.parametrize(
        ("said", "name"),
        [
            ({"name": "Alice Ångström"}, "Alice Ångström"),
            ({"name": None, "preferred_username": "alice"}, "alice"),
            ({"name": " \n\x00\ud800 ", "email": "alice@acme.example"}, "alice@acme.example"),
            ({"name": ["Alice"]}, "00u1-alice"),
            ({"name": "x" * 5000}, "x" * 256),
        ],
    )
    async def test_a_name_for_people(self, corp: Trust, said: dict[str, Any], name: str) -> None:
        assert (await corp.person(**said)).display_name == name


class TestRoles:
    @pytest.mark.parametrize(
        ("said", "roles"),
        [
            ({"groups": "ml"}, {"user"}),
            ({"groups": ["admins", "ml"]}, {"tenant-admin", "user"}),
            ({"groups": None, "realm_access": {"roles": ["audit", "x"]}}, {"auditor"}),
            ({"groups": None, "realm_access": {"roles": "audit"}}, {"auditor"}),
            ({"groups": None, "realm_access.roles": ["audit"]}, {"auditor"}),
        ],
    )
    async def test_by_claims(self, corp: Trust, said: dict[str, Any], roles: set[str]) -> None:
        assert (await corp.person(**said)).roles == roles

    @pytest.mark.parametrize(
        "said",
        [
            {"groups": None},
            {"groups": []},
            {"groups": ["ML", "m", "mlx", " ml", "ml\n", "*"]},
            {"groups": {"ml": True}},
            {"groups": [["ml"], {"ml": 1}, 1, None]},
            {"groups": 1},
            {"groups": None, "realm_access": ["audit"]},
            {"groups": None, "realm_access": {"roles": {"audit": {}}}},
            {"groups": None, "realm_access": {"roles": None}, "roles": ["audit"]},
        ],
        ids=str,
    )
    async def test_nobody_without_a_role(self, corp: Trust, said: dict[str, Any]) -> None:
        with pytest.raises(PolicyDenied, match="nothing that gives you a role"):
            await corp.person(**said)

    async def test_default_roles(self, corp: Trust) -> None:
        await corp.configure(default_roles=frozenset({"auditor"}))
        assert (await corp.person(groups=None)).roles == {"auditor"}
        assert (await corp.person()).roles == {"auditor", "user"}

    async def test_a_claim_whose_name_holds_dots(self, corp: Trust) -> None:
        await corp.configure(claim_rules=(ClaimRule("https://acme.example/groups", "ml", "user"),))
        assert (await corp.person(**{"https://acme.example/groups": ["ml"]})).roles == {"user"}

    async def test_an_address_counts_once_it_was_checked(self, corp: Trust) -> None:
        await corp.configure(claim_rules=(ClaimRule("email", "root@acme.example", "admin"),))
        said = {"email": "root@acme.example"}
        for unchecked in ({}, {"email_verified": False}, {"email_verified": "true"}):
            with pytest.raises(PolicyDenied):
                await corp.person(**said, **unchecked)
        assert (await corp.person(**said, email_verified=True)).roles == {"admin"}

    async def test_a_role_that_is_gone_is_dropped(self, corp: Trust) -> None:
        """The store lets no role go that a provider names, but a provider may have been read just before."""
        rules = (ClaimRule("groups", "ml", "research"), ClaimRule("groups", "staff", "user"))
        await corp.configure(claim_rules=rules)
        assert (await corp.person()).roles == {"research", "user"}
        corp.store.read_before = corp.configured
        await corp.configure(claim_rules=rules[1:])
        await corp.delete_role("research")
        assert (await corp.person()).roles == {"user"}

    async def test_more_roles_than_an_identity_holds_are_refused(self, corp: Trust) -> None:
        roles = [Role(f"role-{number}", "acme") for number in range(MAX_ROLES + 1)]
        await corp.put(*roles)
        rules = [ClaimRule("groups", "ml", role.role_id) for role in roles]
        await corp.configure(claim_rules=tuple(rules[:-1]))
        assert len((await corp.person()).roles) == MAX_ROLES
        await corp.configure(claim_rules=tuple(rules))
        with pytest.raises(PolicyDenied, match="more than 32 roles"):
            await corp.person()


class TestIssuers:
    async def test_an_unknown_issuer_costs_no_request(self, corp: Trust) -> None:
        async with MockProvider(number=1) as other:
            with pytest.raises(CredentialInvalid, match="not one that this platform trusts"):
                await corp.verify(other.token(corp.clock.now()))
            assert other.requests == corp.provider.requests == []

    async def test_a_disabled_one_neither(self, corp: Trust) -> None:
        await corp.configure(disabled=True)
        with pytest.raises(CredentialInvalid, match="not one that this platform trusts"):
            await corp.person()
        assert corp.provider.requests == []

    async def test_our_own_is_none(self, corp: Trust) -> None:
        await corp.configure(issuer=OWN_ISSUER)
        with pytest.raises(CredentialInvalid, match="not one that this platform trusts"):
            await corp.person(iss=OWN_ISSUER)

    async def test_one_provider_cannot_speak_for_another(self, corp: Trust) -> None:
        async with MockProvider(number=1) as other:
            second = replace(corp.configured, provider_id="other", issuer=other.issuer)
            await corp.put(second)
            now = corp.clock.now()
            assert (await corp.verify(other.token(now))).provider == second
            for forged in (
                other.token(now, iss=corp.provider.issuer),
                corp.provider.token(now, iss=other.issuer),
            ):
                with pytest.raises(CredentialInvalid, match="signature"):
                    await corp.verify(forged)

    async def test_a_tokens_issuer_can_be_read_before_it_is_proven(self, corp: Trust) -> None:
        assert unverified_issuer(corp.provider.token(corp.clock.now())) == corp.provider.issuer
