"""The OAuth2 endpoints: the RFCs' forms to the letter, and one audit record for each success."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote_plus

import httpx
import pytest

from services.gateway.oauth.forms import ASSERTION_TYPE, JWT_TYPE, TOKEN_EXCHANGE
from services.gateway.oauth.ports import SubjectKind
from services.mesh import errors
from services.mesh.access_token import Audience
from services.mesh.clock import ManualClock
from services.mesh.events import Outcome
from tests.framework.gateway_fakes import Bench, FakeReplica
from tests.framework.gateway_http import ISSUER, serving
from tests.framework.oauth_fakes import FakeTokens

SECRET = "s3cret:+ %"
POST = {"client_id": "app", "client_secret": SECRET}
API_KEY_TYPE = "urn:llmos:params:oauth:token-type:api_key"


class Edge:
    """A running edge over a fake auth."""

    def __init__(self, bench: Bench, http: httpx.AsyncClient, tokens: FakeTokens) -> None:
        self.bench, self.http, self.tokens = bench, http, tokens

    async def token(self, *, auth: str = "", **fields: str) -> httpx.Response:
        headers = {"authorization": auth} if auth else {}
        return await self.http.post("/oauth2/token", data=fields, headers=headers)

    @property
    def outcomes(self) -> list[tuple[str, str, Outcome]]:
        return [
            (event.facts.method.rpartition("/")[2], event.facts.identity.client_id, event.outcome)
            for event in self.bench.audit.ended
        ]


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    tokens = FakeTokens()
    bench = Bench([FakeReplica()], clock=ManualClock(datetime(2030, 1, 1, tzinfo=UTC)))
    async with serving(bench, tokens=tokens) as running, httpx.AsyncClient(base_url=running.url) as http:
        yield Edge(bench, http, tokens)


def basic(client_id: str, secret: str) -> str:
    pair = f"{quote_plus(client_id)}:{quote_plus(secret)}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def refused(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]) == (status, code), response.text
    assert response.headers["cache-control"] == "no-store"
    assert ("www-authenticate" in response.headers) == (status == 401)
    assert all(" " <= c <= "~" and c not in '"\\' for c in response.json()["error_description"])


class TestPublic:
    async def test_metadata(self, edge: Edge) -> None:
        # below the issuer's path (RFC 8414, section 3.1)
        response = await edge.http.get("/.well-known/oauth-authorization-server/one")
        found = response.json()
        assert found["issuer"] == ISSUER
        assert found["token_endpoint"] == "https://api.llmos.example/oauth2/token"
        assert found["jwks_uri"] == "https://api.llmos.example/oauth2/jwks"
        assert found["introspection_endpoint"] == "https://api.llmos.example/oauth2/introspect"
        assert found["revocation_endpoint"] == "https://api.llmos.example/oauth2/revoke"
        assert found["grant_types_supported"] == ["client_credentials", TOKEN_EXCHANGE]
        assert found["response_types_supported"] == []
        assert "private_key_jwt" in found["token_endpoint_auth_methods_supported"]
        assert (await edge.http.get("/.well-known/oauth-authorization-server")).status_code == 404

    async def test_jwks(self, edge: Edge) -> None:
        response = await edge.http.get("/oauth2/jwks")
        assert (response.status_code, response.json()) == (200, {"keys": []})
        assert response.headers["content-type"] == "application/json"

    async def test_neither_leaves_a_record(self, edge: Edge) -> None:
        await edge.http.get("/.well-known/oauth-authorization-server/one")
        await edge.http.get("/oauth2/jwks")
        assert edge.outcomes == []

    async def test_other_methods_are_refused(self, edge: Edge) -> None:
        assert (await edge.http.get("/oauth2/token")).status_code == 405
        assert (await edge.http.post("/oauth2/jwks")).status_code == 405


class TestClientCredentials:
    async def test_by_post(self, edge: Edge) -> None:
        response = await edge.token(grant_type="client_credentials", **POST)
        assert response.status_code == 200
        assert response.json() == {
            "access_token": "the-token",
            "token_type": "Bearer",
            "expires_in": int((edge.tokens.expires_at - edge.bench.clock.now()).total_seconds()),
            "scope": "generate models.read",
        }
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["pragma"] == "no-cache"
        assert edge.tokens.asked == [("issue", Audience.GATEWAY, ())]
        assert edge.outcomes == [("IssueToken", "app", Outcome.SUCCEEDED)]

    async def test_by_basic(self, edge: Edge) -> None:
        response = await edge.token(auth=basic("app", SECRET), grant_type="client_credentials")
        assert response.status_code == 200

    async def test_by_assertion(self, edge: Edge) -> None:
        fields = {"client_assertion_type": ASSERTION_TYPE, "client_assertion": "e30.eyJzdWIiOiJhcHAifQ.e30"}
        for more in ({}, {"client_id": "app"}):
            response = await edge.token(grant_type="client_credentials", **fields, **more)
            assert response.status_code == 200

    async def test_scopes_and_audience(self, edge: Edge) -> None:
        await edge.token(
            grant_type="client_credentials", scope="generate audit.read", audience="llmos-auth", **POST
        )
        assert edge.tokens.asked == [("issue", Audience.AUTH, ("generate", "audit.read"))]

    @pytest.mark.parametrize(
        ("auth", "fields"),
        [
            ("", {}),
            ("", {"client_id": "app"}),
            ("", {"client_id": "app", "client_secret": "wrong"}),
            ("", {"client_id": "nobody", "client_secret": SECRET}),
            (basic("app", "wrong"), {}),
            ("Basic !!!", {}),
            ("Basic " + base64.b64encode(b"app").decode(), {}),
            ("Basic " + base64.b64encode(b"\xff:x").decode(), {}),
            ("Basic " + base64.b64encode(b":x").decode(), {}),
            ("Bearer the-token", {}),
            ("", {"client_assertion_type": ASSERTION_TYPE, "client_assertion": "x.y.z"}),
            ("", {"client_assertion_type": ASSERTION_TYPE, "client_assertion": "e30.e30.e30"}),
        ],
    )
    async def test_r24_who_does_not_prove_itself_is_refused(
        self, edge: Edge, auth: str, fields: dict[str, str]
    ) -> None:
        response = await edge.token(auth=auth, grant_type="client_credentials", **fields)
        in_the_body = "client_secret" in fields or "client_assertion" in fields
        refused(response, 400 if in_the_body else 401, "invalid_client")
        assert in_the_body or response.headers["www-authenticate"].startswith("Basic")
        assert edge.outcomes == []

    @pytest.mark.parametrize(
        ("auth", "fields", "code"),
        [
            (basic("app", SECRET), POST, "invalid_request"),
            (basic("app", SECRET), {"client_id": "other"}, "invalid_request"),
            ("", {**POST, "client_assertion": "x"}, "invalid_request"),
            ("", {"client_assertion": "x", "client_assertion_type": "other"}, "invalid_request"),
            ("", {"client_secret": SECRET}, "invalid_request"),
            ("", {**POST, "audience": "llmos-inference"}, "invalid_target"),
            ("", {**POST, "resource": "https://x"}, "invalid_target"),
            ("", {**POST, "scope": " ".join(f"s{n}" for n in range(65))}, "invalid_scope"),
            ("", {**POST, "grant_type": "password"}, "unsupported_grant_type"),
            ("", {**POST, "grant_type": ""}, "invalid_request"),
        ],
    )
    async def test_requests_that_are_wrong(
        self, edge: Edge, auth: str, fields: dict[str, str], code: str
    ) -> None:
        refused(await edge.token(auth=auth, **({"grant_type": "client_credentials"} | fields)), 400, code)

    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (errors.ScopeMissing('lacks `a` "b" \\ ü'), 400, "invalid_scope"),
            (
                errors.RequestInvalid("no", violations=[errors.Violation("scopes", "no scope")]),
                400,
                "invalid_scope",
            ),
            (errors.RequestInvalid("no"), 400, "invalid_request"),
            (errors.PolicyDenied("no"), 400, "unauthorized_client"),
            (errors.CredentialRevoked("gone"), 400, "invalid_client"),
            (errors.StateConflict("too many"), 400, "invalid_request"),
            (errors.RateLimit("slow", retry_after_s=2), 429, "temporarily_unavailable"),
            (errors.DependencyUnavailable("down"), 503, "temporarily_unavailable"),
            (errors.Internal("secret cause"), 500, "server_error"),
        ],
    )
    async def test_errors_of_auth(self, edge: Edge, error: errors.LlmosError, status: int, code: str) -> None:
        edge.tokens.error = error
        response = await edge.token(grant_type="client_credentials", **POST)
        refused(response, status, code)
        assert "secret cause" not in response.text
        assert edge.outcomes == []
        if isinstance(error, errors.RateLimit):
            assert response.headers["retry-after"] == "2"

    async def test_no_token_without_a_record(self, edge: Edge) -> None:
        edge.bench.audit.start_error = errors.AuditUnavailable("full")
        refused(await edge.token(grant_type="client_credentials", **POST), 503, "temporarily_unavailable")


class TestForms:
    async def post(self, edge: Edge, content: bytes, content_type: str = "") -> httpx.Response:
        headers = {"content-type": content_type or "application/x-www-form-urlencoded"}
        return await edge.http.post("/oauth2/token", content=content, headers=headers)

    async def test_repeated_parameters_are_refused(self, edge: Edge) -> None:
        body = b"grant_type=client_credentials&grant_type=password&client_id=app&client_secret=x"
        refused(await self.post(edge, body), 400, "invalid_request")

    @pytest.mark.parametrize("body", [b"", b"\xff", b"grant_type=%ff", b"&".join([b"a=b"] * 40)])
    async def test_what_is_no_form_is_refused(self, edge: Edge, body: bytes) -> None:
        refused(await self.post(edge, body), 400, "invalid_request")

    async def test_other_types_are_refused(self, edge: Edge) -> None:
        refused(await self.post(edge, b"{}", "application/json"), 400, "invalid_request")

    async def test_large_ones_are_refused(self, edge: Edge) -> None:
        refused(await self.post(edge, b"a=" + b"x" * 64 * 1024), 413, "invalid_request")


class TestTokenExchange:
    async def exchange(self, edge: Edge, auth: str = "", **fields: str) -> httpx.Response:
        given = {
            "grant_type": TOKEN_EXCHANGE,
            "subject_token": "first",
            "subject_token_type": JWT_TYPE,
        } | fields
        return await edge.token(auth=auth, **given)

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("urn:ietf:params:oauth:token-type:access_token", SubjectKind.ACCESS_TOKEN),
            ("urn:ietf:params:oauth:token-type:jwt", SubjectKind.JWT),
            ("urn:ietf:params:oauth:token-type:id_token", SubjectKind.JWT),
            (API_KEY_TYPE, SubjectKind.API_KEY),
        ],
    )
    async def test_each_kind(self, edge: Edge, kind: str, expected: SubjectKind) -> None:
        response = await self.exchange(edge, subject_token_type=kind, scope="generate")
        assert response.status_code == 200
        assert response.json()["issued_token_type"] == "urn:ietf:params:oauth:token-type:access_token"
        assert edge.tokens.asked == [("exchange", "first", expected, Audience.GATEWAY, ("generate",))]
        assert edge.outcomes == [("ExchangeToken", "app", Outcome.SUCCEEDED)]

    async def test_a_client_that_proves_itself_must_do_so_rightly(self, edge: Edge) -> None:
        assert (await self.exchange(edge, auth=basic("app", SECRET))).status_code == 200
        refused(await self.exchange(edge, auth=basic("app", "wrong")), 401, "invalid_client")

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({"subject_token": "wrong"}, "invalid_request"),
            ({"subject_token": ""}, "invalid_request"),
            ({"subject_token_type": "urn:ietf:params:oauth:token-type:saml2"}, "invalid_request"),
            ({"requested_token_type": "urn:ietf:params:oauth:token-type:id_token"}, "invalid_request"),
            ({"actor_token": "x", "actor_token_type": JWT_TYPE}, "invalid_request"),
            ({"audience": "elsewhere"}, "invalid_target"),
            ({"resource": "https://x"}, "invalid_target"),
        ],
    )
    async def test_what_is_wrong(self, edge: Edge, fields: dict[str, str], code: str) -> None:
        refused(await self.exchange(edge, **fields), 400, code)
        assert edge.outcomes == []


class TestIntrospectionAndRevocation:
    async def post(self, edge: Edge, path: str, **fields: Any) -> httpx.Response:
        return await edge.http.post(path, data=fields)

    async def test_r23_active(self, edge: Edge) -> None:
        response = await self.post(edge, "/oauth2/introspect", token="the-token", token_type_hint="x", **POST)
        assert response.json() == {
            "active": True,
            "iss": "https://login",
            "aud": "llmos-gateway",
            "sub": "app",
            "client_id": "app",
            "scope": "generate",
            "token_type": "Bearer",
            "jti": "t1",
            "iat": 1,
            "exp": 301,
            "tenant_id": "acme",
            "roles": ["user"],
        }
        assert response.headers["cache-control"] == "no-store"
        assert edge.outcomes == [("IntrospectToken", "app", Outcome.SUCCEEDED)]

    async def test_r23_inactive_is_exactly_that(self, edge: Edge) -> None:
        response = await self.post(edge, "/oauth2/introspect", token="other", **POST)
        assert (response.status_code, response.json()) == (200, {"active": False})

    async def test_r23_revoked(self, edge: Edge) -> None:
        response = await self.post(edge, "/oauth2/revoke", token="any", **POST)
        assert (response.status_code, response.content) == (200, b"")
        assert edge.tokens.revoked == ["any"]
        assert edge.outcomes == [("RevokeToken", "app", Outcome.SUCCEEDED)]

    async def test_r23_what_cannot_be_revoked(self, edge: Edge) -> None:
        response = await self.post(edge, "/oauth2/revoke", token="llmos_x", **POST)
        refused(response, 400, "unsupported_token_type")
        edge.tokens.error = errors.PolicyDenied("another's")
        response = await self.post(edge, "/oauth2/revoke", token="any", **POST)
        refused(response, 400, "unauthorized_client")

    @pytest.mark.parametrize("path", ["/oauth2/introspect", "/oauth2/revoke"])
    async def test_both_need_a_client_and_a_token(self, edge: Edge, path: str) -> None:
        refused(await self.post(edge, path, token="any"), 401, "invalid_client")
        wrong = POST | {"client_secret": "x"}
        refused(await self.post(edge, path, token="any", **wrong), 400, "invalid_client")
        refused(await self.post(edge, path, **POST), 400, "invalid_request")
        assert edge.tokens.revoked == []
