"""Who may call which method of auth: every method of its services against every credential (R26)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor import FileDescriptor
from llmos.auth.v1 import admin_service_pb2, token_service_pb2

from services.auth.access import OPEN_METHODS, RULES
from services.auth.first_start import CLIENT, TENANT
from services.auth.tokens import Grant
from services.mesh.context import Caller, Identity
from services.mesh.errors import CredentialExpired, CredentialInvalid, CredentialMissing, LlmosError, Status
from services.mesh.tokens import Audience

if TYPE_CHECKING:
    from conftest import Auth

U, D, OK = Status.UNAUTHENTICATED, Status.PERMISSION_DENIED, Status.OK
CREDENTIALS = ("none", "garbage", "expired", "for the gateway", "user", "admin", "service")
MATRIX = {
    "/llmos.auth.v1.TokenService/IssueToken": (OK, OK, OK, OK, OK, OK, OK),
    "/llmos.auth.v1.TokenService/GetJwks": (OK, OK, OK, OK, OK, OK, OK),
    "/llmos.auth.v1.TokenService/VerifyApiKey": (U, U, U, U, D, D, OK),
    "/llmos.auth.v1.AdminService/CreateTenant": (U, U, U, U, D, OK, D),
    "/llmos.auth.v1.AdminService/CreateClient": (U, U, U, U, D, OK, D),
    "/llmos.auth.v1.AdminService/CreateApiKey": (U, U, U, U, D, OK, D),
    "/llmos.auth.v1.TokenService/NoSuchMethod": (U, U, U, U, D, D, D),
    "/llmos.gateway.v1.GenerationService/Generate": (U, U, U, U, D, D, D),
}


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
    assert set(OPEN_METHODS) == {
        "/llmos.auth.v1.TokenService/IssueToken",
        "/llmos.auth.v1.TokenService/GetJwks",
    }


async def credential(auth: Auth, kind: str) -> str | None:
    await auth.administration.create_tenant(TENANT)
    secret = await auth.administration.create_client(TENANT, CLIENT, ["admin", "generate"])
    gateway_secret = "secret-of-gateway-".ljust(40, "x")
    if kind == "none":
        return None
    if kind == "garbage":
        return "Bearer garbage"
    if kind == "service":
        issued, _ = await auth.exchange.by_secret("service:gateway", gateway_secret, Audience.AUTH, [])
    elif kind == "for the gateway":
        issued, _ = await auth.exchange.by_secret(CLIENT, secret, Audience.GATEWAY, [])
    elif kind == "user":
        # no such token is issued today; should one exist, it opens nothing
        issued = auth.exchange._issuer.issue(Grant("app", Audience.AUTH, frozenset({"generate"}), TENANT))
    else:
        issued, _ = await auth.exchange.by_secret(CLIENT, secret, Audience.AUTH, [])
    if kind == "expired":
        await auth.clock.advance(400)
    return f"Bearer {issued.token}"


@pytest.mark.parametrize(("method", "kind"), list(itertools.product(MATRIX, CREDENTIALS)))
async def test_r26_the_matrix(auth: Auth, method: str, kind: str) -> None:
    entry = await credential(auth, kind)
    metadata: dict[str, str | bytes] = {} if entry is None else {"authorization": entry}
    expected = MATRIX[method][CREDENTIALS.index(kind)]
    try:
        await auth.access(method, metadata, "127.0.0.1")
        status = Status.OK
    except LlmosError as error:
        status = error.status
    assert status == expected


async def test_says_which_way_it_is_refused(auth: Auth) -> None:
    method = "/llmos.auth.v1.AdminService/CreateTenant"
    expired = await credential(auth, "expired")
    assert expired is not None
    for metadata, error in (
        ({}, CredentialMissing),
        ({"authorization": "Bearer x"}, CredentialInvalid),
        ({"authorization": expired}, CredentialExpired),
    ):
        with pytest.raises(error):
            await auth.access(method, metadata, "")


async def test_tells_who_calls(auth: Auth) -> None:
    admin = await credential(auth, "admin")
    assert admin is not None
    caller = await auth.access("/llmos.auth.v1.AdminService/CreateTenant", {"authorization": admin}, "")
    assert caller == Caller(Identity(TENANT, CLIENT, "", frozenset({"admin", "generate"})))
