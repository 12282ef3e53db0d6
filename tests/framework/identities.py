"""Tenants, clients, keys and tokens of a mesh that runs, made and revoked as an administrator does it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmos.auth.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    policy_pb2,
    resource_pb2,
    token_service_pb2,
    token_service_pb2_grpc,
)

from tests.framework.mesh import MeshHarness

SCOPES = ("generate", "models.read")
TIMEOUT_S = 10
Kind = resource_pb2.ResourceKind


@dataclass(frozen=True)
class Account:
    """A client and its secret."""

    client_id: str
    secret: str
    tenant_id: str


class Identities:
    """Speaks to auth itself, by the administrator's key."""

    def __init__(self, mesh: MeshHarness, auth: str = "auth") -> None:
        """`auth` is the process that is spoken to."""
        self._mesh = mesh
        channel = mesh.channel(auth)
        self._tokens = token_service_pb2_grpc.TokenServiceStub(channel)
        self._admin = admin_service_pb2_grpc.AdminServiceStub(channel)

    async def plan(self, plan: policy_pb2.Plan) -> None:
        await self._create(resource_pb2.Resource(plan=plan))

    async def tenant(self, tenant_id: str, plan_id: str = "unlimited") -> None:
        tenant = resource_pb2.Tenant(id=tenant_id, plan_id=plan_id)
        await self._create(resource_pb2.Resource(tenant=tenant))

    async def client(self, tenant_id: str, client_id: str, scopes: Sequence[str] = SCOPES) -> Account:
        client = resource_pb2.Client(
            id=client_id,
            tenant_id=tenant_id,
            kind=resource_pb2.CLIENT_KIND_SERVICE,
            scopes=scopes,
        )
        made = await self._create(resource_pb2.Resource(client=client))
        return Account(client_id, made.secret, tenant_id)

    async def api_key(self, client_id: str) -> tuple[str, str]:
        """Its id and the key."""
        key = resource_pb2.ApiKey(client_id=client_id)
        made = await self._create(resource_pb2.Resource(api_key=key))
        return made.resource.api_key.id, made.secret

    async def revoke(self, kind: Kind, resource_id: str, *, cut_streams: bool = False) -> None:
        """A tenant, a client or a key; it is disabled."""
        name = admin_service_pb2.ResourceName(kind=kind, id=resource_id)
        request = admin_service_pb2.RevokeRequest(name=name, cut_streams=cut_streams)
        await self._admin.Revoke(request, metadata=await self._metadata(), timeout=TIMEOUT_S)

    async def enable(self, account: Account) -> None:
        """Lets a client in again."""
        client = resource_pb2.Client(id=account.client_id, tenant_id=account.tenant_id, disabled=False)
        request = admin_service_pb2.UpdateResourceRequest(resource=resource_pb2.Resource(client=client))
        request.update_mask.paths.append("disabled")
        await self._admin.UpdateResource(request, metadata=await self._metadata(), timeout=TIMEOUT_S)

    async def token(self, account: Account) -> str:
        """A new one, for the gateway."""
        return await self._issue(account.client_id, account.secret, token_service_pb2.AUDIENCE_GATEWAY)

    async def revoke_token(self, account: Account, token: str) -> None:
        """As RFC 7009 has it: by the client that it was issued to."""
        client = token_service_pb2.ClientCredential(client_id=account.client_id, client_secret=account.secret)
        request = token_service_pb2.RevokeTokenRequest(client=client, token=token)
        await self._tokens.RevokeToken(request, timeout=TIMEOUT_S)

    async def _create(self, resource: resource_pb2.Resource) -> Any:
        request = admin_service_pb2.CreateResourceRequest(resource=resource)
        return await self._admin.CreateResource(request, metadata=await self._metadata(), timeout=TIMEOUT_S)

    async def _metadata(self) -> list[tuple[str, str]]:
        token = await self._issue("admin", self._mesh.admin_key, token_service_pb2.AUDIENCE_AUTH)
        return [("authorization", f"Bearer {token}")]

    async def _issue(self, client_id: str, secret: str, audience: token_service_pb2.Audience) -> str:
        request = token_service_pb2.IssueTokenRequest(
            client_id=client_id, client_secret=secret, audience=audience
        )
        # it may have been restarted since the channel last spoke to it
        response = await self._tokens.IssueToken(request, timeout=TIMEOUT_S, wait_for_ready=True)
        return response.access_token.token


def claims_of(token: str) -> dict[str, Any]:
    """What a token says; nothing is verified."""
    payload = token.split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return found


def bearer(credential: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {credential}")]


__all__ = ["Account", "Identities", "Kind", "bearer", "claims_of"]
