"""The token methods of auth over gRPC: as the port of the HTTP edge, and as they are for the gRPC edge."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC

from llmos.auth.v1 import token_service_pb2, token_service_pb2_grpc
from llmos.common.v1 import identity_pb2

from services.gateway.oauth.ports import ClientProof, Granted, Introspected, SubjectKind, TokenFacts
from services.mesh.access_token import SERVICE_PREFIX, Audience
from services.mesh.channel import Channel
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import CredentialInvalid

JWKS_AGE_S = 5.0
"""So long a key set is given out again without asking auth: keys are published well before they sign."""

_AUDIENCES = {
    Audience.GATEWAY: token_service_pb2.AUDIENCE_GATEWAY,
    Audience.AUTH: token_service_pb2.AUDIENCE_AUTH,
    Audience.INFERENCE: token_service_pb2.AUDIENCE_INFERENCE,
    Audience.LOGGING: token_service_pb2.AUDIENCE_LOGGING,
}
_SUBJECTS = {
    SubjectKind.API_KEY: token_service_pb2.SUBJECT_TOKEN_TYPE_API_KEY,
    SubjectKind.ACCESS_TOKEN: token_service_pb2.SUBJECT_TOKEN_TYPE_ACCESS_TOKEN,
    SubjectKind.JWT: token_service_pb2.SUBJECT_TOKEN_TYPE_JWT,
}


class AuthTokens:
    """The methods as they are: messages in, messages out. A client of the platform is none of its services:
    those ask auth themselves, from inside the mesh, so their ids are refused here."""

    def __init__(self, channel: Channel, clock: Clock, *, timeout_s: float = 10.0) -> None:
        self._stub = token_service_pb2_grpc.TokenServiceStub(channel)
        self._clock = clock
        self._timeout_s = timeout_s
        self._jwks: tuple[float, token_service_pb2.GetJwksResponse] | None = None

    async def issue(
        self, request: token_service_pb2.IssueTokenRequest
    ) -> token_service_pb2.IssueTokenResponse:
        _refuse_service(request.client_id)
        response: token_service_pb2.IssueTokenResponse = await self._stub.IssueToken(
            request, timeout=self._timeout_s
        )
        return response

    async def exchange(
        self, request: token_service_pb2.ExchangeTokenRequest
    ) -> token_service_pb2.ExchangeTokenResponse:
        response: token_service_pb2.ExchangeTokenResponse = await self._stub.ExchangeToken(
            request, timeout=self._timeout_s
        )
        return response

    async def introspect(
        self, request: token_service_pb2.IntrospectTokenRequest
    ) -> token_service_pb2.IntrospectTokenResponse:
        _refuse_service(request.client.client_id)
        response: token_service_pb2.IntrospectTokenResponse = await self._stub.IntrospectToken(
            request, timeout=self._timeout_s
        )
        return response

    async def revoke(
        self, request: token_service_pb2.RevokeTokenRequest
    ) -> token_service_pb2.RevokeTokenResponse:
        _refuse_service(request.client.client_id)
        response: token_service_pb2.RevokeTokenResponse = await self._stub.RevokeToken(
            request, timeout=self._timeout_s
        )
        return response

    async def jwks(self) -> token_service_pb2.GetJwksResponse:
        now_s = self._clock.monotonic()
        if self._jwks is None or now_s - self._jwks[0] >= JWKS_AGE_S:
            response = await self._stub.GetJwks(token_service_pb2.GetJwksRequest(), timeout=self._timeout_s)
            self._jwks = now_s, response
        return self._jwks[1]


class GrpcTokens:
    """A `TokensPort` over them."""

    def __init__(self, tokens: AuthTokens) -> None:
        self._tokens = tokens

    async def issue(self, client: ClientProof, audience: Audience, scopes: Sequence[str]) -> Granted:
        request = token_service_pb2.IssueTokenRequest(
            client_id=client.client_id,
            client_secret=client.secret,
            client_assertion=client.assertion,
            audience=_AUDIENCES[audience],
            scopes=scopes,
        )
        return _granted(await self._tokens.issue(request))

    async def exchange(
        self, subject_token: str, kind: SubjectKind, audience: Audience, scopes: Sequence[str]
    ) -> Granted:
        request = token_service_pb2.ExchangeTokenRequest(
            subject_token=subject_token,
            subject_token_type=_SUBJECTS[kind],
            audience=_AUDIENCES[audience],
            scopes=scopes,
        )
        return _granted(await self._tokens.exchange(request))

    async def introspect(self, client: ClientProof, token: str) -> Introspected:
        request = token_service_pb2.IntrospectTokenRequest(client=_proof(client), token=token)
        found = await self._tokens.introspect(request)
        asked_by = identity_of(found)
        if not found.active:
            return Introspected(None, asked_by)
        facts = TokenFacts(
            issuer=found.issuer,
            audience=found.audience,
            subject=found.subject,
            client_id=found.client_id,
            tenant_id=found.tenant_id,
            key_id=found.key_id,
            scopes=tuple(found.scopes),
            roles=tuple(found.roles),
            token_id=found.token_id,
            issued_at_s=found.issue_time.seconds,
            expires_at_s=found.expire_time.seconds,
        )
        return Introspected(facts, asked_by)

    async def revoke(self, client: ClientProof, token: str) -> Identity | None:
        request = token_service_pb2.RevokeTokenRequest(client=_proof(client), token=token)
        return identity_of(await self._tokens.revoke(request))

    async def jwks_json(self) -> str:
        return (await self._tokens.jwks()).jwks_json


def identity_of(
    response: token_service_pb2.IssueTokenResponse
    | token_service_pb2.ExchangeTokenResponse
    | token_service_pb2.IntrospectTokenResponse
    | token_service_pb2.RevokeTokenResponse,
) -> Identity | None:
    """Whose request it was that auth has answered; None: a service's."""
    field = "identity" if "identity" in response.DESCRIPTOR.fields_by_name else "asked_by"
    if not response.HasField(field):  # type: ignore[arg-type]
        return None
    found: identity_pb2.Identity = getattr(response, field)
    return Identity(
        tenant_id=found.tenant_id,
        client_id=found.client_id,
        key_id=found.key_id,
        scopes=frozenset(found.scopes),
        roles=frozenset(found.roles),
        token_id=found.token_id,
        issued_at_s=found.issue_time.seconds,
    )


def _refuse_service(client_id: str) -> None:
    if client_id.startswith(SERVICE_PREFIX):
        raise CredentialInvalid(
            "The client id or its secret is wrong.",
            hint="Check both; a secret is shown only when it is made.",
        )


def _proof(client: ClientProof) -> token_service_pb2.ClientCredential:
    if client.assertion:
        return token_service_pb2.ClientCredential(
            client_id=client.client_id, client_assertion=client.assertion
        )
    return token_service_pb2.ClientCredential(client_id=client.client_id, client_secret=client.secret)


def _granted(
    response: token_service_pb2.IssueTokenResponse | token_service_pb2.ExchangeTokenResponse,
) -> Granted:
    issued = response.access_token
    return Granted(
        issued.token,
        issued.expire_time.ToDatetime(tzinfo=UTC),
        tuple(response.scopes),
        identity_of(response),
    )
