"""llmos.auth.v1.AdminService: messages in, our own types through, messages out."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from llmos.auth.v1 import admin_service_pb2, admin_service_pb2_grpc

from services.auth.administration import request as requests
from services.auth.administration.apply import Configuration
from services.auth.administration.callers import By
from services.auth.administration.explain import Explanation
from services.auth.administration.service import Administration, Made, Wanted
from services.auth.store import Stored
from services.auth.stores import shapes
from services.mesh.clock import Clock
from services.mesh.context import require_current
from services.mesh.decision import Facts


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """Who asks is in the request context."""

    def __init__(
        self,
        administration: Administration,
        configuration: Configuration,
        explanation: Explanation,
        clock: Clock,
    ) -> None:
        self._administration = administration
        self._configuration = configuration
        self._explanation = explanation
        self._clock = clock

    async def CreateResource(
        self, request: admin_service_pb2.CreateResourceRequest, context: Any
    ) -> admin_service_pb2.CreateResourceResponse:
        given = requests.given_of(request.resource)
        made = await self._administration.create(_by(), given, without_secret=request.without_secret)
        return admin_service_pb2.CreateResourceResponse(resource=_message(made.stored), secret=made.secret)

    async def GetResource(
        self, request: admin_service_pb2.GetResourceRequest, context: Any
    ) -> admin_service_pb2.GetResourceResponse:
        found = await self._administration.get(_by(), requests.key_of(request.name))
        return admin_service_pb2.GetResourceResponse(resource=_message(found))

    async def ListResources(
        self, request: admin_service_pb2.ListResourcesRequest, context: Any
    ) -> admin_service_pb2.ListResourcesResponse:
        wanted = Wanted(requests.KINDS[request.kind], request.tenant_id, request.client_id, request.prefix)
        page, token = await self._administration.page(
            _by(), wanted, page_size=request.page_size, page_token=request.page_token
        )
        return admin_service_pb2.ListResourcesResponse(
            resources=[_message(stored) for stored in page], next_page_token=token
        )

    async def UpdateResource(
        self, request: admin_service_pb2.UpdateResourceRequest, context: Any
    ) -> admin_service_pb2.UpdateResourceResponse:
        given = requests.given_of(request.resource)
        paths = requests.paths_of(request)
        stored = await self._administration.update(_by(), given, paths)
        return admin_service_pb2.UpdateResourceResponse(resource=_message(stored))

    async def DeleteResource(
        self, request: admin_service_pb2.DeleteResourceRequest, context: Any
    ) -> admin_service_pb2.DeleteResourceResponse:
        version = requests.version_of(request.etag, "etag")
        await self._administration.delete(_by(), requests.key_of(request.name), version)
        return admin_service_pb2.DeleteResourceResponse()

    async def RotateSecret(
        self, request: admin_service_pb2.RotateSecretRequest, context: Any
    ) -> admin_service_pb2.RotateSecretResponse:
        made: Made = await self._administration.rotate(
            _by(), requests.key_of(request.name), request.overlap_s
        )
        return admin_service_pb2.RotateSecretResponse(resource=_message(made.stored), secret=made.secret)

    async def Revoke(
        self, request: admin_service_pb2.RevokeRequest, context: Any
    ) -> admin_service_pb2.RevokeResponse:
        if request.WhichOneof("target") == "token_id":
            await self._administration.revoke_token(_by(), request.token_id, cut_streams=request.cut_streams)
        else:
            await self._administration.revoke(
                _by(), requests.key_of(request.name), cut_streams=request.cut_streams
            )
        return admin_service_pb2.RevokeResponse()

    async def ListChanges(
        self, request: admin_service_pb2.ListChangesRequest, context: Any
    ) -> admin_service_pb2.ListChangesResponse:
        key = requests.key_of(request.name) if request.HasField("name") else None
        page, token = await self._administration.changes(
            _by(), key, page_size=request.page_size, page_token=request.page_token
        )
        return admin_service_pb2.ListChangesResponse(
            changes=[requests.change_message(change) for change in page], next_page_token=token
        )

    async def ExplainDecision(
        self, request: admin_service_pb2.ExplainDecisionRequest, context: Any
    ) -> admin_service_pb2.ExplainDecisionResponse:
        decision = await self._explanation.explain(
            _by(), requests.key_of(request.subject), request.method, self._facts(request)
        )
        return admin_service_pb2.ExplainDecisionResponse(
            allowed=decision.allowed, rule=decision.rule, explanation=decision.explanation
        )

    async def ExportConfiguration(
        self, request: admin_service_pb2.ExportConfigurationRequest, context: Any
    ) -> admin_service_pb2.ExportConfigurationResponse:
        exported = self._configuration.export(_by(), request.tenant_id, digests=request.include_digests)
        return admin_service_pb2.ExportConfigurationResponse(
            resources=[
                requests.exported_message(stored, digests=request.include_digests)
                async for stored in exported
            ]
        )

    async def ApplyConfiguration(
        self, request: admin_service_pb2.ApplyConfigurationRequest, context: Any
    ) -> admin_service_pb2.ApplyConfigurationResponse:
        given = [
            requests.given_of(resource, f"resources[{place}]")
            for place, resource in enumerate(request.resources)
        ]
        applied = await self._configuration.apply(_by(), given, prune=request.prune, dry_run=request.dry_run)
        return admin_service_pb2.ApplyConfigurationResponse(
            applied=[
                admin_service_pb2.AppliedResource(
                    name=requests.name_message(one.key),
                    action=admin_service_pb2.AppliedResource.Action.ValueType(one.action),
                )
                for one in applied
            ]
        )

    def _facts(self, request: admin_service_pb2.ExplainDecisionRequest) -> Facts:
        at: datetime = self._clock.now()
        if request.HasField("time"):
            at = requests.moment_of(request.time, "time")
        return Facts(
            at=at,
            address=request.address,
            model=request.model or None,
            task=request.task or None,
            max_tokens=request.max_tokens or None,
            labels=dict(request.labels),
        )


def _by() -> By:
    context = require_current()
    return By(context.identity, context.request_id)


def _message(stored: Stored) -> Any:
    is_built_in = shapes.key_of(stored.resource) in shapes.BUILT_IN
    return requests.stored_message(stored, is_built_in=is_built_in)
