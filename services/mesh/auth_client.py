"""The auth service over gRPC, as the ports that `JwksCache` and `ServiceTokens` ask for, and this service's
own secret, which it proves itself to auth with."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path

from llmos.auth.v1 import token_service_pb2, token_service_pb2_grpc

from services.mesh.app import StartError
from services.mesh.channel import Channel
from services.mesh.clock import Clock
from services.mesh.settings import ServiceSettings
from services.mesh.tokens import Audience, IssuedToken, ServiceTokens

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


def own_tokens(settings: ServiceSettings, channel: Channel, clock: Clock) -> ServiceTokens:
    """This service's tokens, had by its secret over a channel without credential. Raises StartError."""
    port = GrpcServiceTokens(
        channel, client_id=f"service:{settings.service}", client_secret=_own_secret(settings)
    )
    return ServiceTokens(port, clock)


def _own_secret(settings: ServiceSettings) -> str:
    file = settings.service_secret_file
    if file == Path():
        raise StartError(
            f"this service has no secret: set LLMOS_{settings.service.upper()}_SERVICE_SECRET_FILE"
        )
    try:
        secret = file.read_text().strip()
    except OSError as error:
        raise StartError(f"this service's secret cannot be read: {file}: {error.strerror}") from None
    if not secret:
        raise StartError(f"this service's secret is empty: {file}")
    return secret
