"""Tokens of a certified OpenID Connect provider, exchanged for ours with the roles that its groups are mapped
to (RFC 8693)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from llmos.auth.v1 import admin_service_pb2, admin_service_pb2_grpc, resource_pb2, token_service_pb2
from llmos.auth.v1.token_service_pb2_grpc import TokenServiceStub

from services.mesh.auth_client import GrpcJwks
from services.mesh.channel import Channel
from services.mesh.clock import SystemClock
from services.mesh.context import Identity
from services.mesh.errors import CredentialInvalid, DependencyUnavailable, PolicyDenied
from services.mesh.jwks import JwksCache
from services.mesh.tokens import Audience, Verifier
from tests.framework.mesh import MeshHarness
from tests.framework.node_packages import NodeUnavailable
from tests.framework.real_oidc_provider import RealProvider

CLOCK = SystemClock()
GROUPS = {"ml": "user", "programs": "user", "audit": "auditor"}


class Fixed:
    """A TokenSource with one token."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def token(self, audience: str) -> str:
        return self._token


class Corporation:
    """A tenant whose people and programs have an identity already."""

    def __init__(self, mesh: MeshHarness, provider: RealProvider) -> None:
        self.mesh = mesh
        self.provider = provider
        self._channel = Channel(mesh.target("auth"), clock=CLOCK)
        self._jwks = JwksCache(GrpcJwks(self._channel), CLOCK, min_interval_s=0)

    async def trust(self, **changes: Any) -> None:
        """The administrator makes a tenant, and trusts the provider for it."""
        fields = {
            "id": "corp",
            "issuer": self.provider.issuer,
            "audience": self.provider.audience,
            "tenant_id": "acme",
            "claim_rules": [
                {"claim": "groups", "value": group, "role_id": GROUPS[group]} for group in GROUPS
            ],
        } | changes
        token = await TokenServiceStub(self._channel).IssueToken(
            token_service_pb2.IssueTokenRequest(
                client_id="admin",
                client_secret=self.mesh.admin_key,
                audience=token_service_pb2.AUDIENCE_AUTH,
            )
        )
        own = Fixed(token.access_token.token)
        channel = Channel(self.mesh.target("auth"), clock=CLOCK, tokens=own, audience=Audience.AUTH)
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        try:
            for resource in (
                resource_pb2.Resource(tenant=resource_pb2.Tenant(id="acme")),
                resource_pb2.Resource(identity_provider=resource_pb2.IdentityProvider(**fields)),
            ):
                await stub.CreateResource(admin_service_pb2.CreateResourceRequest(resource=resource))
        finally:
            await channel.close()

    async def exchange(self, token: str) -> Identity:
        """As anybody with a token of the provider would; the identity is what our token says."""
        response = await TokenServiceStub(self._channel).ExchangeToken(
            token_service_pb2.ExchangeTokenRequest(
                subject_token=token,
                subject_token_type=token_service_pb2.SUBJECT_TOKEN_TYPE_JWT,
                audience=token_service_pb2.AUDIENCE_GATEWAY,
            )
        )
        issuer = "https://auth.llmos.internal"
        verifier = Verifier(self._jwks, issuer=issuer, audience=Audience.GATEWAY, clock=CLOCK)
        verified = await verifier.verify(response.access_token.token)
        assert set(response.scopes) == verified.identity().scopes
        return verified.identity()

    async def close(self) -> None:
        await self._jwks.close()
        await self._channel.close()


@pytest.fixture
async def corporation(make_mesh: Any) -> AsyncIterator[Corporation]:
    provider = RealProvider()
    try:
        await provider.start()
    except NodeUnavailable as error:
        pytest.skip(str(error))
    try:
        mesh = make_mesh(None)
        await mesh.start("auth")
        made = Corporation(mesh, provider)
        yield made
        await made.close()
    finally:
        await provider.stop()


async def test_people_and_programs_of_a_corporation(corporation: Corporation) -> None:
    corp, provider = corporation, corporation.provider
    alice = await provider.token_of("alice")
    with pytest.raises(CredentialInvalid, match="not one that this platform trusts"):
        await corp.exchange(alice)
    await corp.trust()

    person = await corp.exchange(alice)
    assert (person.tenant_id, person.roles) == ("acme", {"user"})
    assert person.scopes == {"generate", "models.read"}
    assert person.client_id.startswith("user:")
    # one person is one client, in each exchange and from each sign-in
    assert (await corp.exchange(await provider.token_of("alice"))).client_id == person.client_id

    program = await corp.exchange(await provider.token_of_a_program())
    assert (program.tenant_id, program.roles) == ("acme", {"user"})
    assert program.client_id != person.client_id

    for login in ("bob", "mallory"):
        with pytest.raises(PolicyDenied, match="nothing that gives you a role"):
            await corp.exchange(await provider.token_of(login))
    head, body, signature = alice.split(".")
    with pytest.raises(CredentialInvalid, match="signature"):
        await corp.exchange(f"{head}.{body}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}")

    log = corp.mesh.log("auth")
    assert alice not in log
    assert signature not in log


async def test_a_provider_that_is_away(corporation: Corporation) -> None:
    await corporation.trust()
    alice = await corporation.provider.token_of("alice")
    await corporation.provider.stop()
    with pytest.raises(DependencyUnavailable, match="identity provider does not answer"):
        await corporation.exchange(alice)


async def test_keys_at_hand_do_while_the_provider_is_away(corporation: Corporation) -> None:
    await corporation.trust()
    alice, program = (
        await corporation.provider.token_of("alice"),
        await corporation.provider.token_of_a_program(),
    )
    await corporation.exchange(alice)
    await corporation.provider.stop()
    assert (await corporation.exchange(program)).roles == {"user"}


async def test_over_http_at_the_gateway(corporation: Corporation) -> None:
    mesh, provider = corporation.mesh, corporation.provider
    await corporation.trust()
    await mesh.start("inference", "gateway")
    async with httpx.AsyncClient(base_url=mesh.http_url(), trust_env=False, timeout=30) as client:

        async def exchange(token: str, kind: str) -> httpx.Response:
            form = {
                "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
                "subject_token": token,
                "subject_token_type": f"urn:ietf:params:oauth:token-type:{kind}",
            }
            return await client.post("/oauth2/token", data=form)

        for token, kind in (
            (await provider.token_of("alice"), "id_token"),
            (await provider.token_of_a_program(), "jwt"),
        ):
            answer = await exchange(token, kind)
            assert answer.status_code == 200, answer.text
            said = answer.json()
            assert said["token_type"] == "Bearer"
            assert set(said["scope"].split()) == {"generate", "models.read"}
            headers = {"authorization": f"Bearer {said['access_token']}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200

        refused = await exchange(await provider.token_of("bob"), "id_token")
        assert refused.status_code == 400
        assert "nothing that gives you a role" in refused.text
