"""Two auth processes on one PostgreSQL: one administrator, one set of keys; what one does counts at both."""

from __future__ import annotations

import re

import grpc
import pytest
from llmos.auth.v1 import token_service_pb2, token_service_pb2_grpc
from llmos.gateway.v1 import model_service_pb2, model_service_pb2_grpc

from tests.conftest import MeshFactory
from tests.framework import calls
from tests.framework.identities import Identities, Kind, bearer
from tests.framework.mesh import MeshHarness
from tests.framework.postgres import PostgresServer
from tests.framework.waiting import eventually

AUTHS = ("auth", "auth-1")
GATEWAYS = {"gateway": "auth", "gateway-1": "auth-1"}
"""Each asks one of the two."""
WITHIN_S = 5.0
TIMEOUT_S = 10.0


async def refusal(mesh: MeshHarness, gateway: str, credential: str) -> str:
    """The reason why a gateway refuses the credential; empty: it answers."""
    stub = model_service_pb2_grpc.ModelServiceStub(mesh.channel(gateway))
    try:
        await stub.ListModels(
            model_service_pb2.ListModelsRequest(), metadata=bearer(credential), timeout=TIMEOUT_S
        )
    except grpc.aio.AioRpcError as error:
        return calls.reason_of(error) or error.code().name
    return ""


async def two_auths(mesh: MeshHarness, postgres: PostgresServer) -> None:
    """Starts all of it; the first starts of both auths happen at once."""
    url = postgres.url(await postgres.make_database()).render_as_string()
    for auth in AUTHS:
        mesh.configure(auth, db_url=url, signing_key_rotation_s=20, signing_key_publish_ahead_s=8)
        mesh.configure(auth, access_token_ttl_s=60, service_token_ttl_s=60)
    await mesh.start(*AUTHS)
    for gateway, auth in GATEWAYS.items():
        mesh.configure(gateway, auth_target=mesh.target(auth), jwks_refresh_s=2)
    mesh.configure("inference", jwks_refresh_s=2)
    await mesh.start("inference", *GATEWAYS)


def hand_over(mesh: MeshHarness) -> None:
    """One of the processes has made the administrator; where it was the second, its key is fetched."""
    files = [mesh.state.of(auth) / "admin-key" for auth in AUTHS]
    (made,) = [file for file in files if file.exists()]
    if made != mesh.state.admin_key:
        mesh.state.admin_key.write_text(made.read_text())


async def test_what_one_does_counts_at_both(make_mesh: MeshFactory, postgres: PostgresServer) -> None:
    mesh = make_mesh(None)
    await two_auths(mesh, postgres)
    hand_over(mesh)
    first, second = Identities(mesh), Identities(mesh, "auth-1")
    await first.tenant("acme")
    account = await second.client("acme", "app")
    _, key = await first.api_key(account.client_id)
    tokens = [await first.token(account), await second.token(account)]
    for gateway in GATEWAYS:
        assert [await refusal(mesh, gateway, one) for one in (key, *tokens)] == ["", "", ""]

    await second.revoke(Kind.RESOURCE_KIND_CLIENT, account.client_id)

    async def refused_everywhere() -> bool:
        reasons = {await refusal(mesh, gateway, one) for gateway in GATEWAYS for one in (key, *tokens)}
        return reasons == {"CREDENTIAL_REVOKED"}

    await eventually(refused_everywhere, timeout_s=WITHIN_S)


@pytest.mark.slow
async def test_r22_keys_rotate_once_for_both_and_one_of_them_may_die(
    make_mesh: MeshFactory, postgres: PostgresServer
) -> None:
    mesh = make_mesh(None)
    await two_auths(mesh, postgres)
    hand_over(mesh)
    first, second = Identities(mesh), Identities(mesh, "auth-1")
    await first.tenant("acme")
    account = await first.client("acme", "app")
    before = await second.token(account)
    assert await refusal(mesh, "gateway", before) == ""

    mesh.kill("auth")
    made = await second.client("acme", "late")
    late = await second.token(made)
    # A gateway that has lost its auth goes on with what it knows: keys, policy and its own tokens.
    for gateway in GATEWAYS:
        assert await refusal(mesh, gateway, late) == ""
    await mesh.start("auth")
    after = [await first.token(made), await second.token(made)]
    for gateway in GATEWAYS:
        assert [await refusal(mesh, gateway, one) for one in after] == ["", ""]

    async def publish_the_same() -> bool:
        published = [
            (
                await token_service_pb2_grpc.TokenServiceStub(mesh.channel(auth)).GetJwks(
                    token_service_pb2.GetJwksRequest(), timeout=TIMEOUT_S
                )
            ).jwks_json
            for auth in AUTHS
        ]
        return published[0] == published[1]

    await eventually(publish_the_same, timeout_s=WITHIN_S)
    made_keys = re.findall(r"signing key (\w+) was made", mesh.log("auth") + mesh.log("auth-1"))
    assert made_keys
    assert len(made_keys) == len(set(made_keys))
