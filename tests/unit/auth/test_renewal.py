"""Whether somebody may still act who is known by identity only: what `RenewIdentity` answers."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import structs

from services.auth.administration.revoking import revocation
from services.auth.store import Batch, Client, Delete, Kind, NewRevocation
from services.mesh.context import Identity
from services.mesh.errors import CredentialExpired, CredentialInvalid, CredentialRevoked, LlmosError
from services.mesh.policy import RevocationKind, Role
from services.mesh.tokens import Audience

if TYPE_CHECKING:
    from conftest import Auth

SCOPES = ("generate", "models.read", "audit.read")


@pytest.fixture
async def by_key(auth: Auth) -> Identity:
    """Of `key_0` of the client `app` in the tenant `acme`."""
    await auth.tenant()
    await auth.client()
    signed = await auth.exchange.by_api_key(await auth.key())
    assert signed.identity is not None
    return signed.identity


async def by_secret(auth: Auth) -> Identity:
    await auth.tenant()
    signed = await auth.exchange.by_secret("app", await auth.client(), Audience.GATEWAY, [])
    assert signed.identity is not None
    return signed.identity


async def revoke(auth: Auth, kind: RevocationKind, subject_id: str) -> None:
    news = revocation(kind, subject_id, auth.clock.now(), cut_streams=False)
    await auth.store.commit(Batch(auth.clock.now(), "acme/root", revocations=[news]))


async def test_a_day_later_it_acts_with_a_new_token(auth: Auth, by_key: Identity) -> None:
    await auth.clock.advance(86_000)
    signed = await auth.renewal.renew(by_key)
    verified = await auth.verify(signed.token)
    assert verified.identity() == signed.identity
    assert signed.identity == structs.replace(
        by_key, token_id=verified.token_id, issued_at_s=int(auth.clock.now().timestamp())
    )
    assert signed.expires_at == auth.clock.now() + timedelta(seconds=300)


async def test_no_scope_comes_back_that_the_identity_had_not(auth: Auth, by_key: Identity) -> None:
    await auth.change(Kind.CLIENT, "app", scopes=frozenset(SCOPES))
    signed = await auth.renewal.renew(structs.replace(by_key, scopes=frozenset({"generate"})))
    assert signed.scopes == {"generate"}
    signed = await auth.renewal.renew(structs.replace(by_key, scopes=frozenset()))
    assert signed.scopes == frozenset()


async def test_roles_and_limits_are_those_of_today(auth: Auth, by_key: Identity) -> None:
    await auth.put(Role("reader", tenant_id="acme", scopes=frozenset({"audit.read"})))
    await auth.change(Kind.CLIENT, "app", scopes=frozenset({"models.read"}), roles=frozenset({"reader"}))
    limits: dict[str, Any] = {"models": ("small-*",), "addresses": (ip_network("10.0.0.0/8"),)}
    await auth.change(Kind.API_KEY, "key_0", **limits)
    identity = (await auth.renewal.renew(structs.replace(by_key, scopes=frozenset(SCOPES)))).identity
    assert identity is not None
    assert identity.scopes == {"models.read", "audit.read"}
    assert identity.direct_scopes == {"models.read"}
    assert (identity.roles, identity.models) == ({"reader"}, ("small-*",))
    assert identity.addresses == (ip_network("10.0.0.0/8"),)


async def test_a_key_that_was_narrowed_holds_only_what_it_has_now(auth: Auth, by_key: Identity) -> None:
    """The revocation of its old tokens does not refuse it: it would be accepted, if it were shown."""
    await auth.change(Kind.API_KEY, "key_0", scopes=frozenset({"models.read"}))
    await revoke(auth, RevocationKind.API_KEY, "key_0")
    assert (await auth.renewal.renew(by_key)).scopes == {"models.read"}


@pytest.mark.parametrize(
    ("kind", "resource_id"),
    [(Kind.API_KEY, "key_0"), (Kind.CLIENT, "app"), (Kind.TENANT, "acme")],
)
async def test_what_was_disabled_acts_no_more(
    auth: Auth, by_key: Identity, kind: Kind, resource_id: str
) -> None:
    await auth.change(kind, resource_id, disabled=True)
    with pytest.raises(CredentialRevoked):
        await auth.renewal.renew(by_key)


async def test_a_project_of_a_disabled_organisation_acts_no_more(auth: Auth) -> None:
    await auth.tenant("org")
    await auth.tenant("project", parent_id="org")
    await auth.client("app", "project")
    signed = await auth.exchange.by_api_key(await auth.key())
    assert signed.identity is not None
    await auth.change(Kind.TENANT, "org", disabled=True)
    with pytest.raises(CredentialRevoked):
        await auth.renewal.renew(signed.identity)


@pytest.mark.parametrize("kind", [Kind.API_KEY, Kind.CLIENT])
async def test_what_was_deleted_acts_no_more(auth: Auth, by_key: Identity, kind: Kind) -> None:
    resource_id = "key_0" if kind is Kind.API_KEY else "app"
    writes = [Delete(Kind.API_KEY, "key_0")]
    if kind is Kind.CLIENT:
        writes.append(Delete(Kind.CLIENT, resource_id))
    await auth.store.commit(Batch(auth.clock.now(), "acme/root", writes=writes))
    with pytest.raises(CredentialRevoked):
        await auth.renewal.renew(by_key)


async def test_a_key_that_has_expired(auth: Auth, by_key: Identity) -> None:
    await auth.change(Kind.API_KEY, "key_0", expires_at=auth.clock.now() + timedelta(seconds=60))
    signed = await auth.renewal.renew(by_key)
    assert signed.expires_at == auth.clock.now() + timedelta(seconds=60)
    await auth.clock.advance(60)
    with pytest.raises(CredentialExpired):
        await auth.renewal.renew(by_key)


@pytest.mark.parametrize(
    ("kind", "subject_id"), [(RevocationKind.CLIENT, "app"), (RevocationKind.TENANT, "acme")]
)
async def test_what_was_proven_before_a_revocation_is_refused(
    auth: Auth, by_key: Identity, kind: RevocationKind, subject_id: str
) -> None:
    await auth.clock.advance(10)
    await revoke(auth, kind, subject_id)
    with pytest.raises(CredentialRevoked):
        await auth.renewal.renew(by_key)
    await auth.renewal.renew(structs.replace(by_key, issued_at_s=int(auth.clock.now().timestamp()) + 1))


async def test_a_token_that_was_revoked(auth: Auth) -> None:
    identity = await by_secret(auth)
    news = NewRevocation(
        RevocationKind.TOKEN, identity.token_id, auth.clock.now(), auth.clock.now() + timedelta(seconds=310)
    )
    await auth.store.commit(Batch(auth.clock.now(), "acme/app", revocations=[news]))
    with pytest.raises(CredentialRevoked):
        await auth.renewal.renew(identity)
    await auth.renewal.renew(structs.replace(identity, token_id="another"))


@pytest.mark.parametrize(
    "change", [{"tenant_id": "other"}, {"client_id": "service:gateway"}, {"client_id": "other"}]
)
async def test_r22_nobody_takes_what_is_anothers(
    auth: Auth, by_key: Identity, change: dict[str, str]
) -> None:
    """A stored identity that mixes two clients, or names a service, gets nothing."""
    await auth.put(Client("other", "acme", scopes=frozenset({"admin"})))
    with pytest.raises(CredentialInvalid):
        await auth.renewal.renew(structs.replace(by_key, scopes=frozenset({"admin"}), **change))  # type: ignore[arg-type]


async def test_refusals_are_of_the_credential(auth: Auth, by_key: Identity) -> None:
    """So that a job that meets one fails at once, and says why."""
    await auth.change(Kind.API_KEY, "key_0", disabled=True)
    with pytest.raises(LlmosError) as refused:
        await auth.renewal.renew(by_key)
    assert (refused.value.reason, refused.value.retryable) == ("CREDENTIAL_REVOKED", False)
