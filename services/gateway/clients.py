"""The ports over gRPC: auth and logging, and the translation to and from their messages. That of inference
stands in `replica`."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from llmos.auth.v1 import token_service_pb2, token_service_pb2_grpc
from llmos.common.v1 import identity_pb2
from llmos.logging.v1 import audit_service_pb2, audit_service_pb2_grpc

from services.mesh.channel import Channel
from services.mesh.context import Identity
from services.mesh.errors import DeadlineExceeded, DependencyUnavailable


class GrpcAuth:
    """An `AuthPort`."""

    def __init__(self, channel: Channel, *, timeout_s: float = 5.0) -> None:
        self._stub = token_service_pb2_grpc.TokenServiceStub(channel)
        self._timeout_s = timeout_s

    async def exchange(self, api_key: str) -> str:
        request = token_service_pb2.VerifyApiKeyRequest(api_key=api_key)
        response = await self._stub.VerifyApiKey(request, timeout=self._timeout_s)
        token: str = response.access_token.token
        return token


class GrpcRenewal:
    """A `RenewalPort`."""

    def __init__(self, channel: Channel, *, timeout_s: float = 5.0) -> None:
        self._stub = token_service_pb2_grpc.TokenServiceStub(channel)
        self._timeout_s = timeout_s

    async def renew(self, identity: Identity) -> str:
        message = identity_pb2.Identity(
            tenant_id=identity.tenant_id,
            client_id=identity.client_id,
            key_id=identity.key_id,
            scopes=sorted(identity.scopes),
            roles=sorted(identity.roles),
            token_id=identity.token_id,
        )
        message.issue_time.seconds = identity.issued_at_s
        request = token_service_pb2.RenewIdentityRequest(identity=message)
        try:
            response = await self._stub.RenewIdentity(request, timeout=self._timeout_s)
        except DeadlineExceeded as error:
            raise DependencyUnavailable("Auth does not answer.") from error
        token: str = response.access_token.token
        return token


class GrpcAuditLog:
    """Reads the audit log at the logging service, which restricts a caller to what is theirs."""

    def __init__(self, channel: Channel) -> None:
        self._stub = audit_service_pb2_grpc.AuditServiceStub(channel)

    async def search(self, request: audit_service_pb2.SearchRequest) -> audit_service_pb2.SearchResponse:
        response: audit_service_pb2.SearchResponse = await self._stub.Search(request)
        return response

    async def tail(
        self, request: audit_service_pb2.TailRequest
    ) -> AsyncGenerator[audit_service_pb2.TailResponse, None]:
        call = self._stub.Tail(request)
        try:
            async for response in call:
                yield response
        finally:
            call.cancel()
