"""The gRPC methods of tokens: messages in, our own types through, messages out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from llmos.auth.v1 import token_service_pb2, token_service_pb2_grpc
from llmos.common.v1 import identity_pb2

from services.auth.grants.exchange import Exchange, SubjectKind
from services.auth.grants.introspection import ClientProof, Introspection
from services.auth.grants.renewal import Renewal
from services.auth.guard import Guard
from services.auth.signing.ring import KeyRing
from services.auth.watching import Hub
from services.mesh.access_token import Audience
from services.mesh.context import Identity
from services.mesh.policy import RevocationKind
from services.mesh.policy_codec import document_message
from services.mesh.revocation import Revocation
from services.mesh.service_tokens import IssuedToken

_AUDIENCES = {
    token_service_pb2.AUDIENCE_GATEWAY: Audience.GATEWAY,
    token_service_pb2.AUDIENCE_AUTH: Audience.AUTH,
    token_service_pb2.AUDIENCE_INFERENCE: Audience.INFERENCE,
    token_service_pb2.AUDIENCE_LOGGING: Audience.LOGGING,
}
_SUBJECTS = {
    token_service_pb2.SUBJECT_TOKEN_TYPE_API_KEY: SubjectKind.API_KEY,
    token_service_pb2.SUBJECT_TOKEN_TYPE_ACCESS_TOKEN: SubjectKind.ACCESS_TOKEN,
    token_service_pb2.SUBJECT_TOKEN_TYPE_JWT: SubjectKind.JWT,
}

_KINDS = {
    RevocationKind.TOKEN: token_service_pb2.REVOCATION_KIND_TOKEN,
    RevocationKind.API_KEY: token_service_pb2.REVOCATION_KIND_API_KEY,
    RevocationKind.CLIENT: token_service_pb2.REVOCATION_KIND_CLIENT,
    RevocationKind.TENANT: token_service_pb2.REVOCATION_KIND_TENANT,
}


class TokenServicer(token_service_pb2_grpc.TokenServiceServicer):
    """llmos.auth.v1.TokenService"""

    def __init__(
        self,
        exchange: Exchange,
        introspection: Introspection,
        renewal: Renewal,
        ring: KeyRing,
        hub: Hub,
        guard: Guard,
        issuer: str,
    ) -> None:
        self._exchange = exchange
        self._introspection = introspection
        self._renewal = renewal
        self._ring = ring
        self._hub = hub
        self._guard = guard
        self._issuer = issuer
        self._policy = token_service_pb2.WatchPolicyResponse()
        """The last one that held a policy: all watchers are sent the same."""

    async def IssueToken(
        self, request: token_service_pb2.IssueTokenRequest, context: Any
    ) -> token_service_pb2.IssueTokenResponse:
        with self._guard.attempt(request.client_id):
            signed = await self._exchange.by_secret(
                request.client_id,
                request.client_secret,
                _AUDIENCES[request.audience],
                request.scopes,
                assertion=request.client_assertion,
            )
        return token_service_pb2.IssueTokenResponse(
            access_token=_access_token(signed),
            scopes=sorted(signed.scopes),
            identity=_identity(signed.identity),
        )

    async def ExchangeToken(
        self, request: token_service_pb2.ExchangeTokenRequest, context: Any
    ) -> token_service_pb2.ExchangeTokenResponse:
        kind = _SUBJECTS[request.subject_token_type]
        with self._guard.attempt(request.subject_token if kind is SubjectKind.API_KEY else ""):
            signed = await self._exchange.exchange(
                request.subject_token, kind, _AUDIENCES[request.audience], request.scopes
            )
        return token_service_pb2.ExchangeTokenResponse(
            access_token=_access_token(signed),
            scopes=sorted(signed.scopes),
            identity=_identity(signed.identity),
        )

    async def VerifyApiKey(
        self, request: token_service_pb2.VerifyApiKeyRequest, context: Any
    ) -> token_service_pb2.VerifyApiKeyResponse:
        signed = await self._exchange.by_api_key(request.api_key)
        return token_service_pb2.VerifyApiKeyResponse(
            access_token=_access_token(signed), identity=_identity(signed.identity)
        )

    async def RenewIdentity(
        self, request: token_service_pb2.RenewIdentityRequest, context: Any
    ) -> token_service_pb2.RenewIdentityResponse:
        signed = await self._renewal.renew(_stored(request.identity))
        return token_service_pb2.RenewIdentityResponse(
            access_token=_access_token(signed), identity=_identity(signed.identity)
        )

    async def IntrospectToken(
        self, request: token_service_pb2.IntrospectTokenRequest, context: Any
    ) -> token_service_pb2.IntrospectTokenResponse:
        with self._guard.attempt(request.client.client_id):
            found = await self._introspection.introspect(_proof(request.client), request.token)
        asked_by = _identity(found.asked_by)
        token = found.token
        if token is None:
            return token_service_pb2.IntrospectTokenResponse(asked_by=asked_by)
        response = token_service_pb2.IntrospectTokenResponse(
            active=True,
            issuer=self._issuer,
            audience=token.audience,
            subject=token.subject,
            client_id=token.client_id,
            tenant_id=token.tenant_id,
            key_id=token.key_id,
            scopes=sorted(token.scopes),
            roles=sorted(token.roles),
            token_id=token.token_id,
            asked_by=asked_by,
        )
        response.issue_time.seconds = token.issued_at_s
        response.expire_time.FromDatetime(token.expires_at)
        return response

    async def RevokeToken(
        self, request: token_service_pb2.RevokeTokenRequest, context: Any
    ) -> token_service_pb2.RevokeTokenResponse:
        with self._guard.attempt(request.client.client_id):
            asked_by = await self._introspection.revoke(_proof(request.client), request.token)
        return token_service_pb2.RevokeTokenResponse(asked_by=_identity(asked_by))

    async def GetJwks(
        self, request: token_service_pb2.GetJwksRequest, context: Any
    ) -> token_service_pb2.GetJwksResponse:
        return token_service_pb2.GetJwksResponse(jwks_json=self._ring.jwks_json())

    async def WatchRevocations(
        self, request: token_service_pb2.WatchRevocationsRequest, context: Any
    ) -> AsyncIterator[token_service_pb2.WatchRevocationsResponse]:
        async with aclosing(self._hub.revocations()) as answers:
            async for answer in answers:
                response = token_service_pb2.WatchRevocationsResponse(
                    version=answer.version, snapshot=answer.snapshot
                )
                for each in answer.revocations:
                    _fill_revocation(response.revocations.add(), each)
                yield response

    async def WatchPolicy(
        self, request: token_service_pb2.WatchPolicyRequest, context: Any
    ) -> AsyncIterator[token_service_pb2.WatchPolicyResponse]:
        async with aclosing(self._hub.policy()) as answers:
            async for answer in answers:
                if answer.document is None:
                    yield token_service_pb2.WatchPolicyResponse(version=answer.version)
                    continue
                if self._policy.version != answer.version or not self._policy.HasField("policy"):
                    self._policy = token_service_pb2.WatchPolicyResponse(
                        version=answer.version, policy=document_message(answer.document)
                    )
                yield self._policy


def _proof(client: token_service_pb2.ClientCredential) -> ClientProof:
    return ClientProof(client.client_id, client.client_secret, client.client_assertion)


def _fill_revocation(message: token_service_pb2.Revocation, revocation: Revocation) -> None:
    message.version = revocation.version
    message.kind = _KINDS[revocation.kind]
    message.id = revocation.subject_id
    message.revoke_time.FromDatetime(revocation.revoked_at)
    message.expire_time.FromDatetime(revocation.expires_at)
    message.cut_streams = revocation.cut_streams


def _access_token(issued: IssuedToken) -> token_service_pb2.AccessToken:
    message = token_service_pb2.AccessToken(token=issued.token)
    message.expire_time.FromDatetime(issued.expires_at)
    return message


def _stored(message: identity_pb2.Identity) -> Identity:
    return Identity(
        tenant_id=message.tenant_id,
        client_id=message.client_id,
        key_id=message.key_id,
        scopes=frozenset(message.scopes),
        roles=frozenset(message.roles),
        token_id=message.token_id,
        issued_at_s=message.issue_time.seconds,
    )


def _identity(identity: Identity | None) -> identity_pb2.Identity | None:
    """None, so that the field stays unset, for a service's own token."""
    if identity is None:
        return None
    message = identity_pb2.Identity(
        tenant_id=identity.tenant_id,
        client_id=identity.client_id,
        key_id=identity.key_id,
        scopes=sorted(identity.scopes),
        roles=sorted(identity.roles),
        token_id=identity.token_id,
    )
    if identity.issued_at_s:
        message.issue_time.seconds = identity.issued_at_s
    return message
