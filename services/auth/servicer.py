"""The gRPC methods: messages in, our own types through, messages out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from llmos.auth.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    token_service_pb2,
    token_service_pb2_grpc,
)
from llmos.common.v1 import identity_pb2

from services.auth.admin import Administration
from services.auth.exchange import Exchange
from services.auth.signing import KeyRing
from services.mesh.access_token import Audience
from services.mesh.errors import RequestInvalid, Violation
from services.mesh.tokens import IssuedToken

_AUDIENCES = {
    token_service_pb2.AUDIENCE_GATEWAY: Audience.GATEWAY,
    token_service_pb2.AUDIENCE_AUTH: Audience.AUTH,
    token_service_pb2.AUDIENCE_INFERENCE: Audience.INFERENCE,
    token_service_pb2.AUDIENCE_LOGGING: Audience.LOGGING,
}


class TokenServicer(token_service_pb2_grpc.TokenServiceServicer):
    """llmos.auth.v1.TokenService"""

    def __init__(self, exchange: Exchange, ring: KeyRing) -> None:
        self._exchange = exchange
        self._ring = ring

    async def IssueToken(
        self, request: token_service_pb2.IssueTokenRequest, context: Any
    ) -> token_service_pb2.IssueTokenResponse:
        token, scopes = await self._exchange.by_secret(
            request.client_id, request.client_secret, _AUDIENCES[request.audience], request.scopes
        )
        return token_service_pb2.IssueTokenResponse(access_token=_access_token(token), scopes=sorted(scopes))

    async def VerifyApiKey(
        self, request: token_service_pb2.VerifyApiKeyRequest, context: Any
    ) -> token_service_pb2.VerifyApiKeyResponse:
        token, identity = await self._exchange.by_api_key(request.api_key)
        return token_service_pb2.VerifyApiKeyResponse(
            access_token=_access_token(token),
            identity=identity_pb2.Identity(
                tenant_id=identity.tenant_id,
                client_id=identity.client_id,
                key_id=identity.key_id,
                scopes=sorted(identity.scopes),
            ),
        )

    async def GetJwks(
        self, request: token_service_pb2.GetJwksRequest, context: Any
    ) -> token_service_pb2.GetJwksResponse:
        return token_service_pb2.GetJwksResponse(jwks_json=self._ring.jwks_json())


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """llmos.auth.v1.AdminService"""

    def __init__(self, administration: Administration) -> None:
        self._administration = administration

    async def CreateTenant(
        self, request: admin_service_pb2.CreateTenantRequest, context: Any
    ) -> admin_service_pb2.CreateTenantResponse:
        await self._administration.create_tenant(request.tenant_id)
        return admin_service_pb2.CreateTenantResponse()

    async def CreateClient(
        self, request: admin_service_pb2.CreateClientRequest, context: Any
    ) -> admin_service_pb2.CreateClientResponse:
        secret = await self._administration.create_client(
            request.tenant_id, request.client_id, request.scopes
        )
        return admin_service_pb2.CreateClientResponse(client_secret=secret)

    async def CreateApiKey(
        self, request: admin_service_pb2.CreateApiKeyRequest, context: Any
    ) -> admin_service_pb2.CreateApiKeyResponse:
        expires_at = _moment(request.expire_time) if request.HasField("expire_time") else None
        key, key_id = await self._administration.create_api_key(request.client_id, request.scopes, expires_at)
        return admin_service_pb2.CreateApiKeyResponse(api_key=key, key_id=key_id)


def _access_token(issued: IssuedToken) -> token_service_pb2.AccessToken:
    message = token_service_pb2.AccessToken(token=issued.token)
    message.expire_time.FromDatetime(issued.expires_at)
    return message


def _moment(timestamp: Timestamp) -> datetime:
    try:
        return timestamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise RequestInvalid(
            "The time is out of range.", violations=[Violation("expire_time", "must be a date")]
        ) from None
