"""Other people's software against our OAuth2: Authlib, openid-client, and a verifier in Go."""

from __future__ import annotations

import asyncio
import json
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from authlib.integrations.httpx_client import AsyncOAuth2Client
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from authlib.oauth2.rfc8414 import get_well_known_url
from joserfc.jwk import ECKey, OKPKey
from llmos.auth.v1 import admin_service_pb2, admin_service_pb2_grpc, resource_pb2, token_service_pb2
from llmos.auth.v1.token_service_pb2_grpc import TokenServiceStub

from services.mesh.channel import Channel
from services.mesh.clock import SystemClock
from services.mesh.errors import CredentialInvalid, LlmosError, Status
from services.mesh.tokens import Audience
from tests.framework.access_tokens import AUDIENCE, ISSUER, KID, forgeries, honest_claims, jwks_of, signed
from tests.framework.foreign_verifier import GoUnavailable, built, serving_jwks, verdicts
from tests.framework.mesh import MeshHarness
from tests.framework.node_packages import NodeUnavailable, installed

CLOCK = SystemClock()
NODE_CLIENT = Path(__file__).parent / "oauth"
NODE_TIMEOUT_S = 60
REVOKED_WITHIN_S = 5
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"
API_KEY_TYPE = "urn:llmos:params:oauth:token-type:api_key"
OURS_ALONE = (
    # what only our own profile says of claims that other issuers do not have
    *("tenant_id ", "key_id ", "scope ", "roles ", "direct_scope ", "models ", "addresses ", "no tenant_id"),
    *("sub ", "client_id ", "jti ", "iat '", "exp '"),
    # what the standards allow, and our own verifier does not
    *("typ 'AT+JWT'", "typ 'application/at+jwt'", 'aud "[', "signature spelt otherwise"),
    # what JSON readers take in one way or another
    *("alg twice", "a newline after"),
)
"""Truly signed by the issuer, who never signs such: a foreign verifier may take them."""


@dataclass
class Platform:
    """A mesh whose issuer is its gateway, and a client of it."""

    mesh: MeshHarness
    issuer: str
    secret: str
    key: ECKey

    async def metadata(self) -> dict[str, Any]:
        async with httpx.AsyncClient() as http:
            response = await http.get(get_well_known_url(self.issuer, external=True))
        found: dict[str, Any] = response.raise_for_status().json()
        return found

    async def lists_models(self, token: str) -> bool:
        """Whether the gateway takes the token."""
        async with httpx.AsyncClient(base_url=self.issuer) as http:
            response = await http.get("/v1/models", headers={"authorization": f"Bearer {token}"})
        assert response.status_code in (200, 401), response.text
        return response.status_code == 200


class Fixed:
    """A TokenSource with one token."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def token(self, audience: str) -> str:
        return self._token


@pytest.fixture
async def platform(make_mesh: Any) -> Platform:
    mesh: MeshHarness = make_mesh(None)
    issuer = mesh.http_url()
    for name in ("auth", "inference", "gateway"):
        mesh.configure(name, issuer=issuer)
    await mesh.start("auth", "inference", "gateway")
    key = ECKey.generate_key("P-256", parameters={"kid": "laptop"})
    return Platform(mesh, issuer, await _client(mesh, key), key)


async def _client(mesh: MeshHarness, key: ECKey) -> str:
    """Makes the client `app` of the tenant `acme`, and returns its secret."""
    open_to_all = Channel(mesh.target("auth"), clock=CLOCK)
    issued = await TokenServiceStub(open_to_all).IssueToken(
        token_service_pb2.IssueTokenRequest(
            client_id="admin", client_secret=mesh.admin_key, audience=token_service_pb2.AUDIENCE_AUTH
        )
    )
    own = Fixed(issued.access_token.token)
    channel = Channel(mesh.target("auth"), clock=CLOCK, tokens=own, audience=Audience.AUTH)
    stub = admin_service_pb2_grpc.AdminServiceStub(channel)
    client = resource_pb2.Client(
        id="app",
        tenant_id="acme",
        roles=["user"],
        scopes=["generate"],
        jwks_json=json.dumps({"keys": [key.as_dict(private=False)]}),
    )
    for resource in (
        resource_pb2.Resource(tenant=resource_pb2.Tenant(id="acme")),
        resource_pb2.Resource(client=client),
    ):
        made = await stub.CreateResource(admin_service_pb2.CreateResourceRequest(resource=resource))
    await channel.close()
    await open_to_all.close()
    secret: str = made.secret
    return secret


def authlib_client(platform: Platform, endpoint: str, method: str) -> AsyncOAuth2Client:
    secret = platform.key if method == "private_key_jwt" else platform.secret
    client = AsyncOAuth2Client(
        "app",
        secret,
        token_endpoint_auth_method=method,
        revocation_endpoint_auth_method=method,
        token_endpoint=endpoint,
    )
    if method == "private_key_jwt":
        client.register_client_auth_method(PrivateKeyJWT(endpoint, alg="ES256"))
    return client


async def test_authlib(platform: Platform) -> None:
    found = await platform.metadata()
    assert found["issuer"] == platform.issuer
    for method in found["token_endpoint_auth_methods_supported"]:
        async with authlib_client(platform, found["token_endpoint"], method) as client:
            first = await client.fetch_token(grant_type="client_credentials", scope="generate models.read")
            assert first["token_type"] == "Bearer"
            assert first["scope"] == "generate models.read"
            assert 0 < first["expires_in"] <= 300
            assert await platform.lists_models(first["access_token"])

            second = await client.fetch_token(
                grant_type=TOKEN_EXCHANGE,
                subject_token=first["access_token"],
                subject_token_type=ACCESS_TOKEN_TYPE,
                scope="generate",
            )
            assert (second["scope"], second["issued_token_type"]) == ("generate", ACCESS_TOKEN_TYPE)

            token = first["access_token"]
            known = await client.introspect_token(found["introspection_endpoint"], token=token)
            assert known.json()["active"] is True
            assert known.json()["roles"] == ["user"]
            revoked = await client.revoke_token(found["revocation_endpoint"], token=token)
            assert revoked.status_code == 200
            known = await client.introspect_token(found["introspection_endpoint"], token=token)
            assert known.json() == {"active": False}
            async with asyncio.timeout(REVOKED_WITHIN_S):
                while await platform.lists_models(token):
                    pass


async def test_the_same_on_grpc(platform: Platform) -> None:
    channel = Channel(platform.mesh.target(), clock=CLOCK)
    stub = TokenServiceStub(channel)
    audience = token_service_pb2.AUDIENCE_GATEWAY
    issued = await stub.IssueToken(
        token_service_pb2.IssueTokenRequest(client_id="app", client_secret=platform.secret, audience=audience)
    )
    assert await platform.lists_models(issued.access_token.token)
    proof = token_service_pb2.ClientCredential(client_id="app", client_secret=platform.secret)
    token = issued.access_token.token
    found = await stub.IntrospectToken(token_service_pb2.IntrospectTokenRequest(client=proof, token=token))
    assert (found.active, found.client_id, found.asked_by.client_id) == (True, "app", "app")
    await stub.RevokeToken(token_service_pb2.RevokeTokenRequest(client=proof, token=token))
    found = await stub.IntrospectToken(token_service_pb2.IntrospectTokenRequest(client=proof, token=token))
    assert not found.active
    assert not found.subject
    # what is for services is refused at the edge: their secrets, and their methods
    own = (platform.mesh.state.secrets / "inference").read_text().strip()
    with pytest.raises(CredentialInvalid):
        await stub.IssueToken(
            token_service_pb2.IssueTokenRequest(
                client_id="service:inference",
                client_secret=own,
                audience=token_service_pb2.AUDIENCE_AUTH,
            )
        )
    with pytest.raises(LlmosError) as caught:
        await stub.VerifyApiKey(token_service_pb2.VerifyApiKeyRequest(api_key=platform.mesh.admin_key))
    assert caught.value.status in (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED)
    await channel.close()


async def test_openid_client(platform: Platform) -> None:
    try:
        folder = installed(NODE_CLIENT)
    except NodeUnavailable as error:
        pytest.skip(str(error))
    given = {
        "issuer": platform.issuer,
        "client_id": "app",
        "client_secret": platform.secret,
        "private_jwk": platform.key.as_dict(private=True),
    }
    ran = await asyncio.to_thread(
        subprocess.run,
        ["node", "client.mjs"],
        cwd=folder,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=NODE_TIMEOUT_S,
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    for method in ("basic", "post", "private_key_jwt"):
        done = said[method]
        assert done["issuer"] == platform.issuer
        assert (done["second_scope"], done["second_type"]) == ("generate", ACCESS_TOKEN_TYPE)
        assert done["before"]["active"] is True
        assert done["before"]["client_id"] == "app"
        assert done["after"] == {"active": False}
        assert await platform.lists_models(done["first"]) is False
    assert said["wrong"] == {"code": "invalid_client", "status": 400}


async def test_a_verifier_in_go_takes_the_keys_url_alone(platform: Platform) -> None:
    _go()
    found = await platform.metadata()
    async with authlib_client(platform, found["token_endpoint"], "client_secret_post") as client:
        ours = (await client.fetch_token(grant_type="client_credentials"))["access_token"]
    head, body, signature = ours.split(".")
    flipped = ("B" if signature[0] == "A" else "A") + signature[1:]
    other = signed(OKPKey.generate_key("Ed25519"), honest_claims(datetime.now(UTC), iss=platform.issuer))
    said = await asyncio.to_thread(
        verdicts,
        [ours, f"{head}.{body}.{flipped}", f"{head}.{body}.", other],
        jwks_url=found["jwks_uri"],
        issuer=platform.issuer,
        audience=AUDIENCE,
    )
    assert said[0] == "accepted app"
    assert [verdict.split()[0] for verdict in said[1:]] == ["refused"] * 3


def test_r21_a_verifier_in_go_refuses_our_forgeries() -> None:
    _go()
    key, now = OKPKey.generate_key("Ed25519"), datetime.now(UTC)
    made = dict(forgeries(key, now))
    with serving_jwks(jwks_of({KID: key})) as url:
        said = verdicts(
            [signed(key, honest_claims(now)), *made.values()],
            jwks_url=url,
            issuer=ISSUER,
            audience=AUDIENCE,
        )
    assert said[0] == "accepted app"
    accepted = {name for name, verdict in zip(made, said[1:], strict=True) if verdict.startswith("accepted")}
    assert [name for name in accepted if not name.startswith(OURS_ALONE)] == []
    assert len(made) - len(accepted) > 80


def _go() -> None:
    try:
        built()
    except GoUnavailable as error:
        pytest.skip(str(error))
