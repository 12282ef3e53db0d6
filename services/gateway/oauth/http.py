"""The OAuth2 endpoints on HTTP (RFC 6749, 7009, 7517, 7662, 8414, 8693), as routes of the edge's application.

Each stands for an open method of TokenService and passes the same chain as gRPC: limits, deadline, errors and
telemetry are not written twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from services.gateway.http_endpoint import Endpoint
from services.gateway.http_exchange import Exchange
from services.gateway.keys import is_api_key
from services.gateway.oauth import answers, forms
from services.gateway.oauth.forms import Form
from services.gateway.oauth.outcomes import Outcomes
from services.gateway.oauth.ports import ClientProof, TokensPort
from services.mesh.actions import GET_JWKS
from services.mesh.clock import Clock
from services.mesh.errors import CredentialMissing, LlmosError, PolicyDenied, RequestInvalid, Status
from services.mesh.events import Edge
from services.mesh.interceptors import Chain
from services.mesh.source_address import NO_PROXIES, TrustedProxies

_SERVICE = "/llmos.auth.v1.TokenService/"
ISSUE, EXCHANGE = f"{_SERVICE}IssueToken", f"{_SERVICE}ExchangeToken"
INTROSPECT, REVOKE = f"{_SERVICE}IntrospectToken", f"{_SERVICE}RevokeToken"


class OAuthRoutes:
    """Makes the routes."""

    def __init__(
        self,
        *,
        chain: Chain,
        tokens: TokensPort,
        outcomes: Outcomes,
        clock: Clock,
        issuer: str,
        public_url: str = "",
        proxies: TrustedProxies = NO_PROXIES,
    ) -> None:
        """`issuer` as in tokens; `public_url`, where clients find this edge, is the issuer if empty."""
        self._chain = chain
        self._tokens = tokens
        self._outcomes = outcomes
        self._clock = clock
        self._proxies = proxies
        self._metadata = answers.metadata(issuer, public_url or issuer)
        # the issuer's path, if it has one, follows (RFC 8414, section 3.1)
        self._metadata_path = answers.METADATA + urlsplit(issuer).path.rstrip("/")

    def routes(self) -> list[BaseRoute]:
        def open_to_all(method: str, serve: Callable[[Exchange], Awaitable[None]]) -> Endpoint:
            return Endpoint(self._chain, self._clock, self._proxies, method, serve, _fail)

        return [
            Route(self._metadata_path, self._describe, methods=["GET"]),
            Route(answers.JWKS, open_to_all(GET_JWKS, self._jwks), methods=["GET"]),
            Route(answers.TOKEN, open_to_all(ISSUE, self._token), methods=["POST"]),
            Route(answers.INTROSPECT, open_to_all(INTROSPECT, self._introspect), methods=["POST"]),
            Route(answers.REVOKE, open_to_all(REVOKE, self._revoke), methods=["POST"]),
        ]

    async def _describe(self, request: Request) -> Response:
        headers = {"cache-control": "public, max-age=300"}
        return Response(self._metadata, 200, headers=headers, media_type="application/json")

    async def _jwks(self, exchange: Exchange) -> None:
        jwks = await self._tokens.jwks_json()
        await exchange.respond(200, jwks.encode(), answers.JWKS_HEADERS)

    async def _token(self, exchange: Exchange) -> None:
        form = await _form(exchange)
        grant_type = form.require("grant_type")
        if grant_type == forms.TOKEN_EXCHANGE:
            await self._exchange(exchange, form)
            return
        if grant_type != forms.CLIENT_CREDENTIALS:
            forms.refuse("unsupported_grant_type", "The grant type is not supported.")
        audience, scopes = form.audience(), form.scopes()
        proof = forms.required_proof(form, exchange.headers.get("authorization"))
        granted = await self._outcomes.of(
            Edge.HTTP,
            ISSUE,
            lambda: self._tokens.issue(proof, audience, scopes),
            lambda found: found.identity,
        )
        body = answers.token(granted, now_s=self._clock.now().timestamp(), exchanged=False)
        await exchange.respond(200, body, (answers.JSON, *answers.NO_STORE))

    async def _exchange(self, exchange: Exchange, form: Form) -> None:
        """RFC 8693. A client need not prove itself, the subject token is the credential; if it does so
        wrongly, it is refused."""
        subject_token = form.require("subject_token")
        kind = forms.SUBJECT_TYPES.get(form.require("subject_token_type"))
        if kind is None:
            forms.refuse("invalid_request", "The subject_token_type is not supported.")
        if form.get("requested_token_type") not in ("", forms.ACCESS_TOKEN_TYPE, forms.JWT_TYPE):
            forms.refuse("invalid_request", "The requested_token_type is not supported.")
        form.refuse_any("actor_token", "actor_token_type")
        audience, scopes = form.audience(), form.scopes()
        proof = forms.client_proof(form, exchange.headers.get("authorization"))
        if proof is not None:
            await self._prove(proof)
        try:
            granted = await self._outcomes.of(
                Edge.HTTP,
                EXCHANGE,
                lambda: self._tokens.exchange(subject_token, kind, audience, scopes),
                lambda found: found.identity,
            )
        except LlmosError as error:
            if error.status is Status.UNAUTHENTICATED or isinstance(error, PolicyDenied):
                # of the subject token, not of the client (RFC 8693, section 2.2.2)
                error.metadata.setdefault(forms.OAUTH_ERROR, "invalid_request")
            raise
        body = answers.token(granted, now_s=self._clock.now().timestamp(), exchanged=True)
        await exchange.respond(200, body, (answers.JSON, *answers.NO_STORE))

    async def _prove(self, proof: ClientProof) -> None:
        """Auth proves a client where it asks something; it asks of nothing here."""
        await self._tokens.introspect(proof, "-")

    async def _introspect(self, exchange: Exchange) -> None:
        form = await _form(exchange)
        proof = forms.required_proof(form, exchange.headers.get("authorization"))
        token = form.require("token")
        found = await self._outcomes.of(
            Edge.HTTP,
            INTROSPECT,
            lambda: self._tokens.introspect(proof, token),
            lambda found: found.asked_by,
        )
        await exchange.respond(200, answers.introspection(found), (answers.JSON, *answers.NO_STORE))

    async def _revoke(self, exchange: Exchange) -> None:
        form = await _form(exchange)
        proof = forms.required_proof(form, exchange.headers.get("authorization"))
        token = form.require("token")
        try:
            await self._outcomes.of(
                Edge.HTTP, REVOKE, lambda: self._tokens.revoke(proof, token), lambda asked_by: asked_by
            )
        except LlmosError as error:
            if isinstance(error, RequestInvalid) and is_api_key(token):
                error.metadata.setdefault(forms.OAUTH_ERROR, "unsupported_token_type")  # RFC 7009, 2.2.1
            raise
        await exchange.respond(200, b"", answers.NO_STORE)


async def _form(exchange: Exchange) -> Form:
    body = await exchange.body(forms.MAX_BODY_BYTES)
    return Form(body, exchange.headers.get("content-type", ""))


async def _fail(exchange: Exchange, error: LlmosError) -> None:
    """Sends the error in OAuth2's form."""
    if not exchange.answered and not exchange.gone:
        by_body = "authorization" not in exchange.headers and not isinstance(error, CredentialMissing)
        status, body, headers = answers.error(error, by_body=by_body)
        await exchange.respond(status, body, headers)
