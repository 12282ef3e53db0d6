"""llmos.auth.v1.TokenService on the gRPC edge, forwarded to auth. What only services call is not offered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from llmos.auth.v1 import token_service_pb2, token_service_pb2_grpc

from services.gateway import request as requests
from services.gateway.oauth.clients import AuthTokens, identity_of
from services.gateway.oauth.outcomes import Outcomes
from services.mesh import context as request_context
from services.mesh.errors import PolicyDenied
from services.mesh.events import Edge

Context = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar(
    "Answer",
    token_service_pb2.IssueTokenResponse,
    token_service_pb2.ExchangeTokenResponse,
    token_service_pb2.IntrospectTokenResponse,
    token_service_pb2.RevokeTokenResponse,
)


class TokenServicer(token_service_pb2_grpc.TokenServiceServicer):
    """Open methods: the request holds the credential."""

    def __init__(self, tokens: AuthTokens, outcomes: Outcomes) -> None:
        self._tokens = tokens
        self._outcomes = outcomes

    async def IssueToken(
        self, request: token_service_pb2.IssueTokenRequest, context: Context
    ) -> token_service_pb2.IssueTokenResponse:
        return await self._forward(request, self._tokens.issue)

    async def ExchangeToken(
        self, request: token_service_pb2.ExchangeTokenRequest, context: Context
    ) -> token_service_pb2.ExchangeTokenResponse:
        return await self._forward(request, self._tokens.exchange)

    async def IntrospectToken(
        self, request: token_service_pb2.IntrospectTokenRequest, context: Context
    ) -> token_service_pb2.IntrospectTokenResponse:
        return await self._forward(request, self._tokens.introspect)

    async def RevokeToken(
        self, request: token_service_pb2.RevokeTokenRequest, context: Context
    ) -> token_service_pb2.RevokeTokenResponse:
        return await self._forward(request, self._tokens.revoke)

    async def GetJwks(
        self, request: token_service_pb2.GetJwksRequest, context: Context
    ) -> token_service_pb2.GetJwksResponse:
        return await self._tokens.jwks()

    async def VerifyApiKey(
        self, request: token_service_pb2.VerifyApiKeyRequest, context: Context
    ) -> token_service_pb2.VerifyApiKeyResponse:
        raise _for_services()

    async def RenewIdentity(
        self, request: token_service_pb2.RenewIdentityRequest, context: Context
    ) -> token_service_pb2.RenewIdentityResponse:
        raise _for_services()

    async def WatchRevocations(
        self, request: token_service_pb2.WatchRevocationsRequest, context: Context
    ) -> AsyncIterator[token_service_pb2.WatchRevocationsResponse]:
        nothing: Any
        for nothing in ():  # makes this a stream, as the method is one
            yield nothing
        raise _for_services()

    async def WatchPolicy(
        self, request: token_service_pb2.WatchPolicyRequest, context: Context
    ) -> AsyncIterator[token_service_pb2.WatchPolicyResponse]:
        nothing: Any
        for nothing in ():
            yield nothing
        raise _for_services()

    async def _forward(self, request: Any, call: Callable[[Any], Awaitable[Answer]]) -> Answer:
        requests.validate(request)
        method = request_context.require_current().method
        return await self._outcomes.of(Edge.GRPC, method, lambda: call(request), identity_of)


def _for_services() -> PolicyDenied:
    """The chain has refused such a call already."""
    return PolicyDenied("Only services call this method, at auth.")
