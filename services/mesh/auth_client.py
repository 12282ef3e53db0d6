"""The auth service over gRPC, as the ports that `JwksCache` and `ServiceTokens` ask for."""

from __future__ import annotations

from datetime import UTC

from llmos.auth.v1 import token_service_pb2, token_service_pb2_grpc

from services.mesh.channel import Channel
from services.mesh.tokens import Audience, IssuedToken

_AUDIENCES = {
    Audience.GATEWAY: token_service_pb2.AUDIENCE_GATEWAY,
    Audience.AUTH: token_service_pb2.AUDIENCE_AUTH,
    Audience.INFERENCE: token_service_pb2.AUDIENCE_INFERENCE,
    Audience.LOGGING: token_service_pb2.AUDIENCE_LOGGING,
}


class GrpcJwks:
    """A `JwksPort`."""

    def __init__(self, channel: Channel, *, timeout_s: float = 5.0) -> None:
        self._stub = token_service_pb2_grpc.TokenServiceStub(channel)
        self._timeout_s = timeout_s

    async def fetch(self) -> str:
        response = await self._stub.GetJwks(token_service_pb2.GetJwksRequest(), timeout=self._timeout_s)
        return response.jwks_json


class GrpcServiceTokens:
    """A `TokenPort`. The client secret is the only credential that it sends."""

    def __init__(
        self, channel: Channel, *, client_id: str, client_secret: str, timeout_s: float = 5.0
    ) -> None:
        self._stub = token_service_pb2_grpc.TokenServiceStub(channel)
        self._client_id = client_id
        self._client_secret = client_secret
        self._timeout_s = timeout_s

    async def issue(self, audience: Audience) -> IssuedToken:
        request = token_service_pb2.IssueTokenRequest(
            client_id=self._client_id, client_secret=self._client_secret, audience=_AUDIENCES[audience]
        )
        response = await self._stub.IssueToken(request, timeout=self._timeout_s)
        issued = response.access_token
        return IssuedToken(issued.token, issued.expire_time.ToDatetime(tzinfo=UTC))
