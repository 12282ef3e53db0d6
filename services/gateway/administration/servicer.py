"""llmos.auth.v1.AdminService, forwarded: auth sees who asks, and what they may do."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import Message
from llmos.auth.v1 import admin_service_pb2, admin_service_pb2_grpc

from services.gateway import request as requests
from services.gateway.administration.clients import GrpcAdministration
from services.gateway.auditing import current_record

Context = grpc.aio.ServicerContext[Any, Any]


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """What is asked for is in the audit log before it is done: no change goes unaudited."""

    def __init__(self, auth: GrpcAdministration) -> None:
        self._auth = auth

    async def CreateResource(
        self, request: admin_service_pb2.CreateResourceRequest, context: Context
    ) -> admin_service_pb2.CreateResourceResponse:
        response: admin_service_pb2.CreateResourceResponse = await self._forward("CreateResource", request)
        return response

    async def GetResource(
        self, request: admin_service_pb2.GetResourceRequest, context: Context
    ) -> admin_service_pb2.GetResourceResponse:
        response: admin_service_pb2.GetResourceResponse = await self._forward("GetResource", request)
        return response

    async def ListResources(
        self, request: admin_service_pb2.ListResourcesRequest, context: Context
    ) -> admin_service_pb2.ListResourcesResponse:
        response: admin_service_pb2.ListResourcesResponse = await self._forward("ListResources", request)
        return response

    async def UpdateResource(
        self, request: admin_service_pb2.UpdateResourceRequest, context: Context
    ) -> admin_service_pb2.UpdateResourceResponse:
        response: admin_service_pb2.UpdateResourceResponse = await self._forward("UpdateResource", request)
        return response

    async def DeleteResource(
        self, request: admin_service_pb2.DeleteResourceRequest, context: Context
    ) -> admin_service_pb2.DeleteResourceResponse:
        response: admin_service_pb2.DeleteResourceResponse = await self._forward("DeleteResource", request)
        return response

    async def RotateSecret(
        self, request: admin_service_pb2.RotateSecretRequest, context: Context
    ) -> admin_service_pb2.RotateSecretResponse:
        response: admin_service_pb2.RotateSecretResponse = await self._forward("RotateSecret", request)
        return response

    async def Revoke(
        self, request: admin_service_pb2.RevokeRequest, context: Context
    ) -> admin_service_pb2.RevokeResponse:
        response: admin_service_pb2.RevokeResponse = await self._forward("Revoke", request)
        return response

    async def ListChanges(
        self, request: admin_service_pb2.ListChangesRequest, context: Context
    ) -> admin_service_pb2.ListChangesResponse:
        response: admin_service_pb2.ListChangesResponse = await self._forward("ListChanges", request)
        return response

    async def ExplainDecision(
        self, request: admin_service_pb2.ExplainDecisionRequest, context: Context
    ) -> admin_service_pb2.ExplainDecisionResponse:
        response: admin_service_pb2.ExplainDecisionResponse = await self._forward("ExplainDecision", request)
        return response

    async def ExportConfiguration(
        self, request: admin_service_pb2.ExportConfigurationRequest, context: Context
    ) -> admin_service_pb2.ExportConfigurationResponse:
        response: admin_service_pb2.ExportConfigurationResponse = await self._forward(
            "ExportConfiguration", request
        )
        return response

    async def ApplyConfiguration(
        self, request: admin_service_pb2.ApplyConfigurationRequest, context: Context
    ) -> admin_service_pb2.ApplyConfigurationResponse:
        response: admin_service_pb2.ApplyConfigurationResponse = await self._forward(
            "ApplyConfiguration", request
        )
        return response

    async def _forward(self, method: str, request: Message) -> Any:
        requests.validate(request)
        record = current_record()
        record.begin()
        await record.committed()
        return await self._auth.call(method, request)
