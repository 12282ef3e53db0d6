"""Tenants of a mesh, so that who asks is told apart: none meets another in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmos.auth.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    resource_pb2,
    token_service_pb2,
    token_service_pb2_grpc,
)

from tests.framework.mesh import MeshHarness


async def tenants(mesh: MeshHarness, names: Sequence[str]) -> dict[str, str]:
    """Makes tenants with a client each, at auth itself; returns a key for each tenant."""
    channel = mesh.channel("auth")
    issued = await token_service_pb2_grpc.TokenServiceStub(channel).IssueToken(
        token_service_pb2.IssueTokenRequest(
            client_id="admin", client_secret=mesh.admin_key, audience=token_service_pb2.AUDIENCE_AUTH
        )
    )
    metadata = [("authorization", f"Bearer {issued.access_token.token}")]
    admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)

    async def make(resource: resource_pb2.Resource) -> str:
        request = admin_service_pb2.CreateResourceRequest(resource=resource)
        return str((await admin.CreateResource(request, metadata=metadata)).secret)

    keys: dict[str, str] = {}
    for tenant in names:
        app = resource_pb2.Client(id=f"{tenant}-app", tenant_id=tenant, scopes=["generate"])
        await make(resource_pb2.Resource(tenant=resource_pb2.Tenant(id=tenant, plan_id="unlimited")))
        await make(resource_pb2.Resource(client=app))
        keys[tenant] = await make(resource_pb2.Resource(api_key=resource_pb2.ApiKey(client_id=app.id)))
    return keys
