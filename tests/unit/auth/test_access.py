"""Who may call which method of auth: every method of its services against every credential (R26)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor import FileDescriptor
from llmos.auth.v1 import admin_service_pb2, token_service_pb2

from services.auth.access import OPEN_METHODS, RULES, AccessControl
from services.auth.grants.tokens import Grant
from services.auth.store import Kind
from services.mesh.channel import IDENTITY_KEY, pack_identity
from services.mesh.context import Identity
from services.mesh.errors import (
    CredentialExpired,
    CredentialInvalid,
    CredentialMissing,
    CredentialRevoked,
    LlmosError,
    PolicyDenied,
    ScopeMissing,
    Status,
)
from services.mesh.policy import AddressRule, Condition, Effect, Role, Rule
from services.mesh.policy_codec import network_of
from services.mesh.tokens import Audience, Verifier

if TYPE_CHECKING:
    from conftest import Auth

TENANT, CLIENT = "acme", "boss"
ADMIN = frozenset({"admin", "generate"})
GET = "/llmos.auth.v1.AdminService/GetResource"
U, D, OK = Status.UNAUTHENTICATED, Status.PERMISSION_DENIED, Status.OK
CREDENTIALS = (
    *("none", "garbage", "expired", "for the gateway", "user", "tenant admin", "admin", "service"),
    *("asserted user", "asserted tenant admin", "asserted admin", "asserted by inference"),
)
OPEN = (OK,) * 12
SERVICE = (U, U, U, U, D, D, D, OK, OK, OK, OK, OK)
ADMINISTRATOR = (U, U, U, U, D, OK, OK, D, D, OK, OK, D)
NOBODY = (U, U, U, U, D, D, D, D, D, D, D, D)
MATRIX = {
    **{
        f"/llmos.auth.v1.TokenService/{method}": OPEN
        for method in ("IssueToken", "ExchangeToken", "IntrospectToken", "RevokeToken", "GetJwks")
    },
    **{
        f"/llmos.auth.v1.TokenService/{method}": SERVICE
        for method in ("VerifyApiKey", "WatchRevocations", "WatchPolicy")
    },
    "/llmos.auth.v1.TokenService/RenewIdentity": (U, U, U, U, D, D, D, OK, OK, OK, OK, D),
    **{
        f"/llmos.auth.v1.AdminService/{method}": ADMINISTRATOR
        for method in (
            *("CreateResource", "GetResource", "ListResources", "UpdateResource", "DeleteResource"),
            *("RotateSecret", "Revoke", "ListChanges", "ExplainDecision"),
            *("ExportConfiguration", "ApplyConfiguration"),
        )
    },
    "/llmos.auth.v1.TokenService/NoSuchMethod": NOBODY,
    "/llmos.gateway.v1.GenerationService/Generate": NOBODY,
}
SCOPES = {"user": frozenset({"generate"}), "tenant admin": frozenset({"tenant.admin"}), "admin": ADMIN}


def methods(*files: FileDescriptor) -> set[str]:
    return {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


def test_r26_every_method_of_the_contract_has_a_rule() -> None:
    assert methods(token_service_pb2.DESCRIPTOR, admin_service_pb2.DESCRIPTOR) == set(RULES)
    assert set(RULES) < set(MATRIX)
    assert set(OPEN_METHODS) == {method for method, row in MATRIX.items() if row is OPEN}


def token(auth: Auth, audience: Audience, client_id: str, scopes: frozenset[str] = frozenset()) -> str:
    tenant_id = "" if client_id.startswith("service:") else TENANT
    return str(auth.issuer.issue(Grant(client_id, audience, scopes, tenant_id)).token)


async def credential(auth: Auth, kind: str) -> dict[str, str | bytes]:
    """Metadata with the credential, of a client that exists."""
    if kind == "none":
        return {}
    if kind == "garbage":
        return {"authorization": "Bearer garbage"}
    who = kind.removeprefix("asserted ")
    scopes = SCOPES.get(who, ADMIN)
    await auth.tenant(TENANT)
    await auth.client(CLIENT, TENANT, scopes=scopes)
    if kind == "service":
        return {"authorization": f"Bearer {token(auth, Audience.AUTH, 'service:gateway')}"}
    if kind.startswith("asserted"):
        service = "service:inference" if who == "by inference" else "service:gateway"
        identity = Identity(TENANT, CLIENT, scopes=scopes, token_id="t", issued_at_s=1)
        return {
            "authorization": f"Bearer {token(auth, Audience.AUTH, service)}",
            IDENTITY_KEY: pack_identity(identity),
        }
    audience = Audience.GATEWAY if kind == "for the gateway" else Audience.AUTH
    entry = token(auth, audience, CLIENT, scopes)
    if kind == "expired":
        await auth.clock.advance(400)
    return {"authorization": f"Bearer {entry}"}


@pytest.mark.parametrize(("method", "kind"), list(itertools.product(MATRIX, CREDENTIALS)))
async def test_r26_the_matrix(auth: Auth, method: str, kind: str) -> None:
    metadata = await credential(auth, kind)
    expected = MATRIX[method][CREDENTIALS.index(kind)]
    try:
        await auth.access(method, metadata, "127.0.0.1")
        status = Status.OK
    except LlmosError as error:
        status = error.status
    assert status == expected


async def test_says_which_way_it_is_refused(auth: Auth) -> None:
    expired = await credential(auth, "expired")
    for metadata, error in (
        ({}, CredentialMissing),
        ({"authorization": "Bearer x"}, CredentialInvalid),
        (expired, CredentialExpired),
    ):
        with pytest.raises(error):
            await auth.access(GET, metadata, "")


async def test_tells_who_calls(auth: Auth) -> None:
    caller = await auth.access(GET, await credential(auth, "admin"), "")
    assert caller.peer_service is None
    assert caller.identity is not None
    assert (caller.identity.tenant_id, caller.identity.client_id) == (TENANT, CLIENT)
    assert caller.identity.scopes == ADMIN


@pytest.mark.parametrize("kind", ["admin", "asserted admin"])
async def test_r23_an_administrator_who_was_demoted_is_out_at_once(auth: Auth, kind: str) -> None:
    metadata = await credential(auth, kind)
    await auth.access(GET, metadata, "")
    await auth.change(Kind.CLIENT, CLIENT, scopes=frozenset({"generate"}))
    with pytest.raises(ScopeMissing):
        await auth.access(GET, metadata, "")
    await auth.change(Kind.CLIENT, CLIENT, scopes=ADMIN, disabled=True)
    with pytest.raises(CredentialRevoked):
        await auth.access(GET, metadata, "")
    await auth.change(Kind.CLIENT, CLIENT, disabled=False)
    await auth.change(Kind.TENANT, TENANT, disabled=True)
    with pytest.raises(CredentialRevoked):
        await auth.access(GET, metadata, "")


async def test_r23_an_asserted_identity_is_held_against_what_is_revoked(auth: Auth) -> None:
    def revoked(identity: Identity) -> None:
        if identity.token_id == "t":
            raise CredentialRevoked("The access token was revoked.")

    metadata = await credential(auth, "asserted admin")
    verifier = Verifier(auth.ring, issuer="https://auth.example", audience=Audience.AUTH, clock=auth.clock)
    access = AccessControl(verifier, auth.store, auth.clock, revoked)
    with pytest.raises(CredentialRevoked):
        await access(GET, metadata, "")


async def test_address_rules_hold_for_those_who_come_without_the_gateway(auth: Auth) -> None:
    metadata = await credential(auth, "admin")
    await auth.put(AddressRule("office", Effect.ALLOW, network_of("10.0.0.0/8", "cidr"), TENANT))
    await auth.access(GET, metadata, "10.1.2.3")
    with pytest.raises(PolicyDenied):
        await auth.access(GET, metadata, "127.0.0.1")


async def test_r26_a_scope_that_hangs_on_a_condition_counts_only_where_it_holds(auth: Auth) -> None:
    """`tenant.admin` lets in from anywhere; the scope `admin` is for the office alone."""
    await auth.tenant(TENANT)
    office = Condition(addresses=(network_of("10.0.0.0/8", "cidr"),))
    rule = Rule("office", Effect.ALLOW, frozenset({"admin"}), office)
    await auth.put(Role("boss", TENANT, scopes=frozenset({"tenant.admin"}), rules=(rule,)))
    await auth.client(CLIENT, TENANT, scopes=frozenset(), roles=frozenset({"boss"}))
    grant = Grant(
        CLIENT, Audience.AUTH, frozenset({"admin", "tenant.admin"}), TENANT, roles=frozenset({"boss"})
    )
    metadata = {"authorization": f"Bearer {auth.issuer.issue(grant).token}"}
    there = await auth.access(GET, metadata, "10.1.2.3")
    assert there.identity is not None
    assert there.identity.scopes == {"admin", "tenant.admin"}
    elsewhere = await auth.access(GET, metadata, "127.0.0.1")
    assert elsewhere.identity is not None
    assert elsewhere.identity.scopes == {"tenant.admin"}
