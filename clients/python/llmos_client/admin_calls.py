"""What each operation of administration sends, and how its answer is read. Pure; for both clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from llmos.auth.v1 import admin_service_pb2 as pb

from llmos_client.admin_types import MadeResource, Resource, ResourceKind, name_of, to_number
from llmos_client.calls import Unary, call_timeout
from llmos_client.config import ClientConfig

PAGE = 1000
MAX_CHANGES = 100_000
GENERATE = "/llmos.gateway.v1.GenerationService/Generate"

Create = Unary[pb.CreateResourceRequest, pb.CreateResourceResponse, MadeResource]
Get = Unary[pb.GetResourceRequest, pb.GetResourceResponse, Resource]
ListPage = Unary[pb.ListResourcesRequest, pb.ListResourcesResponse, pb.ListResourcesResponse]
Update = Unary[pb.UpdateResourceRequest, pb.UpdateResourceResponse, Resource]
Delete = Unary[pb.DeleteResourceRequest, pb.DeleteResourceResponse, None]
Rotate = Unary[pb.RotateSecretRequest, pb.RotateSecretResponse, MadeResource]
Revoke = Unary[pb.RevokeRequest, pb.RevokeResponse, None]
ChangesPage = Unary[pb.ListChangesRequest, pb.ListChangesResponse, pb.ListChangesResponse]
Explain = Unary[pb.ExplainDecisionRequest, pb.ExplainDecisionResponse, pb.ExplainDecisionResponse]
Export = Unary[pb.ExportConfigurationRequest, pb.ExportConfigurationResponse, list[Resource]]
Apply = Unary[pb.ApplyConfigurationRequest, pb.ApplyConfigurationResponse, list[pb.AppliedResource]]


def create(
    config: ClientConfig, resource: Resource, *, without_secret: bool, timeout_s: float | None
) -> Create:
    request = pb.CreateResourceRequest(resource=resource, without_secret=without_secret)
    # Never twice: the first attempt may have made it, and its answer had the only copy of the secret.
    return Unary(
        request,
        lambda response, _: MadeResource(response.resource, response.secret),
        _timeout(config, timeout_s),
        retries=False,
    )


def get(config: ClientConfig, kind: ResourceKind, resource_id: str, *, timeout_s: float | None) -> Get:
    request = pb.GetResourceRequest(name=name_of(kind, resource_id))
    return Unary(request, lambda response, _: response.resource, _timeout(config, timeout_s))


def list_page(
    config: ClientConfig,
    kind: ResourceKind,
    *,
    tenant_id: str,
    client_id: str,
    prefix: str,
    page_token: str,
    timeout_s: float | None,
) -> ListPage:
    request = pb.ListResourcesRequest(
        kind=to_number(kind),
        tenant_id=tenant_id,
        client_id=client_id,
        prefix=prefix,
        page_size=PAGE,
        page_token=page_token,
    )
    return Unary(request, lambda response, _: response, _timeout(config, timeout_s))


def update(
    config: ClientConfig, resource: Resource, fields: Iterable[str], *, timeout_s: float | None
) -> Update:
    request = pb.UpdateResourceRequest(resource=resource)
    request.update_mask.paths.extend(fields)
    if not request.update_mask.paths:
        request.ClearField("update_mask")
    return Unary(request, lambda response, _: response.resource, _timeout(config, timeout_s))


def delete(
    config: ClientConfig, kind: ResourceKind, resource_id: str, *, etag: str, timeout_s: float | None
) -> Delete:
    request = pb.DeleteResourceRequest(name=name_of(kind, resource_id), etag=etag)
    return Unary(request, lambda response, _: None, _timeout(config, timeout_s))


def rotate(
    config: ClientConfig, kind: ResourceKind, resource_id: str, *, overlap_s: int, timeout_s: float | None
) -> Rotate:
    request = pb.RotateSecretRequest(name=name_of(kind, resource_id), overlap_s=overlap_s)
    return Unary(
        request,
        lambda response, _: MadeResource(response.resource, response.secret),
        _timeout(config, timeout_s),
        retries=False,
    )


def revoke(
    config: ClientConfig, kind: ResourceKind, resource_id: str, *, cut_streams: bool, timeout_s: float | None
) -> Revoke:
    request = pb.RevokeRequest(name=name_of(kind, resource_id), cut_streams=cut_streams)
    return Unary(request, lambda response, _: None, _timeout(config, timeout_s))


def revoke_token(
    config: ClientConfig, token_id: str, *, cut_streams: bool, timeout_s: float | None
) -> Revoke:
    request = pb.RevokeRequest(token_id=token_id, cut_streams=cut_streams)
    return Unary(request, lambda response, _: None, _timeout(config, timeout_s))


def changes_page(
    config: ClientConfig,
    kind: ResourceKind | None,
    resource_id: str,
    *,
    limit: int,
    page_token: str,
    timeout_s: float | None,
) -> ChangesPage:
    if (kind is None) != (not resource_id):
        raise ValueError("name a resource by its kind and its id, or neither")
    if not 1 <= limit <= MAX_CHANGES:
        raise ValueError(f"limit must be from 1 to {MAX_CHANGES}")
    request = pb.ListChangesRequest(page_size=min(limit, PAGE), page_token=page_token)
    if kind is not None:
        request.name.CopyFrom(name_of(kind, resource_id))
    return Unary(request, lambda response, _: response, _timeout(config, timeout_s))


def explain(
    config: ClientConfig,
    kind: ResourceKind,
    resource_id: str,
    *,
    method: str,
    model: str,
    task: str,
    address: str,
    time: datetime | None,
    max_tokens: int,
    labels: Mapping[str, str],
    timeout_s: float | None,
) -> Explain:
    request = pb.ExplainDecisionRequest(
        subject=name_of(kind, resource_id),
        method=method,
        model=model,
        task=task,
        address=address,
        max_tokens=max_tokens,
        labels=labels,
    )
    if time is not None:
        if time.tzinfo is None:
            raise ValueError("time needs a time zone, such as datetime.now(UTC)")
        request.time.FromDatetime(time.astimezone(UTC))
    return Unary(request, lambda response, _: response, _timeout(config, timeout_s))


def export(config: ClientConfig, *, tenant_id: str, include_digests: bool, timeout_s: float | None) -> Export:
    request = pb.ExportConfigurationRequest(tenant_id=tenant_id, include_digests=include_digests)
    return Unary(request, lambda response, _: list(response.resources), _timeout(config, timeout_s))


def apply(
    config: ClientConfig,
    resources: Iterable[Resource],
    *,
    prune: bool,
    dry_run: bool,
    timeout_s: float | None,
) -> Apply:
    request = pb.ApplyConfigurationRequest(resources=resources, prune=prune, dry_run=dry_run)
    return Unary(request, lambda response, _: list(response.applied), _timeout(config, timeout_s))


def _timeout(config: ClientConfig, given: float | None) -> float:
    return call_timeout(given, config.query_timeout_s)
