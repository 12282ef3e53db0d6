"""From a token of a provider on loopback to one of ours: the real parts, from the first byte to the last."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from services.auth.credentials.assertions import Assertions
from services.auth.credentials.proof import Proofs
from services.auth.grants.exchange import Exchange, SubjectKind
from services.auth.grants.own_tokens import OwnTokens
from services.auth.providers.fetching import Fetcher
from services.auth.providers.provider_tokens import ProviderTokens
from services.auth.store import ClaimRule, Client, IdentityProvider, Kind
from services.mesh.access_token import Audience
from services.mesh.context import Identity
from services.mesh.errors import CredentialInvalid, PolicyDenied
from services.mesh.policy import Effect, Role, Rule
from tests.framework.oidc_exchange import OWN_ISSUER, RULES
from tests.framework.oidc_provider import AUDIENCE, MockProvider

if TYPE_CHECKING:
    from conftest import Auth


@dataclass
class Office:
    """A tenant that trusts a provider."""

    auth: Auth
    provider: MockProvider
    exchange: Exchange

    async def identity(self, **changes: Any) -> Identity:
        """What our token says of whom an honest token is about, but for what is changed of its claims."""
        token = self.provider.token(self.auth.clock.now(), **changes)
        signed = await self.exchange.exchange(token, SubjectKind.JWT, Audience.GATEWAY, [])
        return (await self.auth.verify(signed.token)).identity()


@pytest.fixture
async def office(auth: Auth) -> AsyncIterator[Office]:
    await auth.tenant()
    async with MockProvider() as provider:
        await auth.put(IdentityProvider("corp", provider.issuer, AUDIENCE, "acme", claim_rules=RULES))
        providers = ProviderTokens(auth.store, auth.clock, Fetcher(), own_issuer=OWN_ISSUER)
        proofs = Proofs(
            auth.store,
            auth.clock,
            Assertions(auth.store, auth.clock, audiences=frozenset()),
            auth.last_use,
            {},
        )
        own = OwnTokens(auth.store, auth.ring, auth.clock, issuer=OWN_ISSUER)
        yield Office(auth, provider, Exchange(auth.store, proofs, own, auth.issuer, auth.clock, providers))
        await providers.stop()


async def test_a_person_becomes_a_client_with_the_mapped_roles(office: Office) -> None:
    identity = await office.identity()
    assert (identity.tenant_id, identity.roles) == ("acme", {"user"})
    assert identity.scopes == {"generate", "models.read"}
    assert identity.direct_scopes == frozenset()
    stored = await office.auth.store.get(Kind.CLIENT, identity.client_id)
    assert stored is not None
    assert isinstance(stored.resource, Client)
    assert stored.resource.display_name == "Alice"
    assert stored.resource.external_subject == "corp 00u1-alice"


async def test_what_the_provider_says_later_counts_from_then_on(office: Office) -> None:
    first = await office.identity()
    promoted = await office.identity(groups=["admins"])
    assert (promoted.client_id, promoted.roles) == (first.client_id, {"tenant-admin"})
    with pytest.raises(PolicyDenied):
        await office.identity(groups=[])


async def test_a_role_with_conditions(office: Office) -> None:
    rule = Rule("all", Effect.ALLOW, frozenset({"generate"}))
    await office.auth.put(Role("night", "acme", rules=(rule,)))
    await office.auth.change(
        Kind.IDENTITY_PROVIDER, "corp", claim_rules=(ClaimRule("groups", "ml", "night"),)
    )
    identity = await office.identity()
    assert (identity.roles, identity.scopes, identity.direct_scopes) == ({"night"}, {"generate"}, frozenset())


async def test_two_providers_may_use_one_subject_for_two_people(office: Office) -> None:
    async with MockProvider(number=1) as other:
        await office.auth.put(IdentityProvider("other", other.issuer, AUDIENCE, "acme", claim_rules=RULES))
        theirs = await replace(office, provider=other).identity()
        assert theirs.client_id != (await office.identity()).client_id


async def test_a_provider_speaks_for_its_tenant_alone(office: Office) -> None:
    identity = await office.identity(tenant_id="default", roles=["admin"], scope="admin", client_id="admin")
    assert (identity.tenant_id, identity.roles) == ("acme", {"user"})
    assert identity.client_id != "admin"


async def test_our_own_token_is_none_of_a_provider(office: Office) -> None:
    signed = await office.exchange.exchange(
        office.provider.token(office.auth.clock.now()), SubjectKind.JWT, Audience.GATEWAY, []
    )
    with pytest.raises(CredentialInvalid, match="not one that this platform trusts"):
        await office.exchange.exchange(signed.token, SubjectKind.JWT, Audience.GATEWAY, [])
