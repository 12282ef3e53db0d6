"""The auth service as a process: first start, tokens, administration, restart, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from llmos.auth.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    resource_pb2,
    token_service_pb2,
    token_service_pb2_grpc,
)

from deploy.dev.environment import ROOT
from services.mesh.auth_client import GrpcJwks, GrpcServiceTokens
from services.mesh.channel import Channel
from services.mesh.clock import SystemClock
from services.mesh.errors import CredentialInvalid, CredentialMissing, PolicyDenied, RequestInvalid
from services.mesh.jwks import JwksCache
from services.mesh.policy import SCOPES
from services.mesh.tokens import Audience, ServiceTokens, VerifiedToken, Verifier
from tests.framework.mesh import MeshHarness

ISSUER = "https://auth.llmos.internal"
CLOCK = SystemClock()
ACME = admin_service_pb2.CreateResourceRequest(
    resource=resource_pb2.Resource(tenant=resource_pb2.Tenant(id="acme"))
)
APP = admin_service_pb2.CreateResourceRequest(
    resource=resource_pb2.Resource(
        client=resource_pb2.Client(id="app", tenant_id="acme", scopes=["generate"])
    )
)
KEY = admin_service_pb2.CreateResourceRequest(
    resource=resource_pb2.Resource(api_key=resource_pb2.ApiKey(client_id="app"))
)


class AuthClient:
    """What the gateway and an administrator do with auth."""

    def __init__(self, mesh: MeshHarness) -> None:
        self.mesh = mesh
        self.open = Channel(mesh.target("auth"), clock=CLOCK)
        secret = (mesh.state.secrets / "gateway").read_text().strip()
        self.own = ServiceTokens(
            GrpcServiceTokens(self.open, client_id="service:gateway", client_secret=secret), CLOCK
        )
        self.gateway = Channel(mesh.target("auth"), clock=CLOCK, tokens=self.own, audience=Audience.AUTH)
        self.jwks = JwksCache(GrpcJwks(self.open), CLOCK, min_interval_s=0)

    async def verify(self, token: str, audience: Audience = Audience.GATEWAY) -> VerifiedToken:
        return await Verifier(self.jwks, issuer=ISSUER, audience=audience, clock=CLOCK).verify(token)

    async def verify_api_key(self, key: str) -> token_service_pb2.VerifyApiKeyResponse:
        stub = token_service_pb2_grpc.TokenServiceStub(self.gateway)
        return await stub.VerifyApiKey(token_service_pb2.VerifyApiKeyRequest(api_key=key))

    async def issue(
        self, client_id: str, secret: str, audience: int, channel: Channel | None = None
    ) -> token_service_pb2.IssueTokenResponse:
        request = token_service_pb2.IssueTokenRequest(
            client_id=client_id,
            client_secret=secret,
            audience=audience,  # type: ignore[arg-type]
        )
        return await token_service_pb2_grpc.TokenServiceStub(channel or self.open).IssueToken(request)

    async def administer(self, method: str, request: Message) -> Any:
        """As the administrator: the key for a token, the token for the method."""
        issued = await self.issue("admin", self.mesh.admin_key, token_service_pb2.AUDIENCE_AUTH)
        channel = Channel(
            self.mesh.target("auth"),
            clock=CLOCK,
            tokens=Fixed(issued.access_token.token),
            audience="llmos-auth",
        )
        try:
            return await getattr(admin_service_pb2_grpc.AdminServiceStub(channel), method)(request)
        finally:
            await channel.close()

    async def close(self) -> None:
        await self.own.close()
        await self.jwks.close()
        await self.open.close()
        await self.gateway.close()


class Fixed:
    """A TokenSource with one token."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def token(self, audience: str) -> str:
        return self._token


@pytest.fixture
async def auth(make_mesh: Any) -> AsyncIterator[AuthClient]:
    mesh = make_mesh(None)
    await mesh.start("auth")
    client = AuthClient(mesh)
    yield client
    await client.close()


async def test_the_administrators_key_becomes_a_token(auth: AuthClient) -> None:
    response = await auth.verify_api_key(auth.mesh.admin_key)
    verified = await auth.verify(response.access_token.token)
    assert (verified.tenant_id, verified.client_id) == ("default", "admin")
    assert verified.scopes == set(response.identity.scopes) == set(SCOPES)
    assert verified.key_id == response.identity.key_id


async def test_an_administrator_makes_a_tenant_a_client_and_a_key(auth: AuthClient) -> None:
    await auth.administer("CreateResource", ACME)
    made = await auth.administer("CreateResource", APP)
    issued = await auth.issue("app", made.secret, token_service_pb2.AUDIENCE_GATEWAY)
    assert (await auth.verify(issued.access_token.token)).scopes == {"generate"}
    key = await auth.administer("CreateResource", KEY)
    assert (await auth.verify_api_key(key.secret)).identity.key_id == key.resource.api_key.id


async def test_what_is_wrong_is_refused(auth: AuthClient) -> None:
    anonymous = token_service_pb2_grpc.TokenServiceStub(auth.open)
    with pytest.raises(CredentialMissing):
        await anonymous.VerifyApiKey(token_service_pb2.VerifyApiKeyRequest(api_key=auth.mesh.admin_key))
    with pytest.raises(CredentialInvalid):
        await auth.verify_api_key(auth.mesh.admin_key[:-1] + "!")
    with pytest.raises(CredentialInvalid):
        await auth.issue("admin", "wrong", token_service_pb2.AUDIENCE_GATEWAY)
    with pytest.raises(PolicyDenied):
        await auth.issue("admin", auth.mesh.admin_key, token_service_pb2.AUDIENCE_INFERENCE)
    with pytest.raises(RequestInvalid):
        await auth.issue("admin", auth.mesh.admin_key, 99)
    stub = admin_service_pb2_grpc.AdminServiceStub(auth.gateway)
    with pytest.raises(PolicyDenied):
        await stub.CreateResource(ACME)
    token = await auth.own.token(Audience.AUTH)
    with pytest.raises(CredentialInvalid):
        await auth.verify(token, Audience.INFERENCE)


async def test_r08_a_killed_service_forgets_nothing(auth: AuthClient) -> None:
    key = auth.mesh.admin_key
    before = await auth.verify_api_key(key)
    await auth.administer("CreateResource", ACME)
    await auth.verify(before.access_token.token)
    auth.mesh.kill("auth")
    # known keys go on without auth
    await auth.verify(before.access_token.token)
    await auth.mesh.start("auth")
    assert auth.mesh.admin_key == key
    after = await auth.verify_api_key(key)
    assert (await auth.verify(after.access_token.token)).client_id == "admin"
    assert (await auth.verify(before.access_token.token)).client_id == "admin"
    await auth.administer("CreateResource", APP)
    assert await auth.mesh.stop("auth") == 0


async def test_r32_no_secret_is_said(auth: AuthClient) -> None:
    key = auth.mesh.admin_key
    response = await auth.verify_api_key(key)
    with pytest.raises(CredentialInvalid):
        await auth.issue("admin", "CANARY-SECRET", token_service_pb2.AUDIENCE_GATEWAY)
    await auth.mesh.stop("auth")
    log = auth.mesh.log("auth")
    secrets = [(auth.mesh.state.secrets / name).read_text().strip() for name in ("gateway", "auth")]
    for secret in (key, key[14:], response.access_token.token, "CANARY-SECRET", *secrets):
        assert secret not in log


async def test_r33_without_secrets_it_refuses_to_start(tmp_path: Path) -> None:
    env = {
        "PATH": os.environ["PATH"],
        "LLMOS_AUTH_STATE_DIR": str(tmp_path / "state"),
        "LLMOS_AUTH_SERVICE_SECRETS_DIR": str(tmp_path / "nowhere"),
        "LLMOS_AUTH_GRPC_PORT": "0",
        "LLMOS_AUTH_METRICS_PORT": "0",
    }
    for python in ([sys.executable], [sys.executable, "-O"]):
        process = await asyncio.create_subprocess_exec(
            *python, "-m", "services.auth", cwd=ROOT, env=env, stdout=-1, stderr=-2
        )
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 1
        assert b"the secret of the service gateway cannot be read" in output
    assert list((tmp_path / "state").iterdir()) == []
