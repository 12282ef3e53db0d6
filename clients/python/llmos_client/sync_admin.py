"""Administration for threads; the same as `async_admin` but for how it waits."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping
from datetime import datetime

from llmos.auth.v1 import admin_service_pb2 as pb
from llmos.auth.v1 import admin_service_pb2_grpc

from llmos_client import admin_calls
from llmos_client.admin_calls import GENERATE
from llmos_client.admin_types import MadeResource, Resource, ResourceKind
from llmos_client.sync_wire import Wire


class Admin:
    """Tenants, clients, keys, roles, plans, address rules and identity providers; needs the scope `admin` or
    `tenant.admin`. Each method raises a class of `errors`; `timeout_s` is for each call."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def create(
        self, resource: Resource, *, without_secret: bool = False, timeout_s: float | None = None
    ) -> MadeResource:
        """Makes it. It is not tried again where the server is lost: look first whether it is there."""
        call = admin_calls.create(
            self._wire.config, resource, without_secret=without_secret, timeout_s=timeout_s
        )
        return self._wire.unary(self._stub.CreateResource, call)

    def get(self, kind: ResourceKind, resource_id: str, *, timeout_s: float | None = None) -> Resource:
        """As it is now, with its etag."""
        call = admin_calls.get(self._wire.config, kind, resource_id, timeout_s=timeout_s)
        return self._wire.unary(self._stub.GetResource, call)

    def list(
        self,
        kind: ResourceKind,
        *,
        tenant_id: str = "",
        client_id: str = "",
        prefix: str = "",
        timeout_s: float | None = None,
    ) -> builtins.list[Resource]:
        """All that there are, sorted by id; `prefix` finds an API key by the 8 characters after `llmos_`."""
        found: list[Resource] = []
        token = ""
        while True:
            call = admin_calls.list_page(
                self._wire.config,
                kind,
                tenant_id=tenant_id,
                client_id=client_id,
                prefix=prefix,
                page_token=token,
                timeout_s=timeout_s,
            )
            page = self._wire.unary(self._stub.ListResources, call)
            found += page.resources
            token = page.next_page_token
            if not token:
                return found

    def update(
        self, resource: Resource, fields: Iterable[str] = (), *, timeout_s: float | None = None
    ) -> Resource:
        """Changes the named fields, or all that may change. With the etag of what was read, raises Conflict
        where somebody has changed it since."""
        call = admin_calls.update(self._wire.config, resource, fields, timeout_s=timeout_s)
        return self._wire.unary(self._stub.UpdateResource, call)

    def delete(
        self, kind: ResourceKind, resource_id: str, *, etag: str = "", timeout_s: float | None = None
    ) -> None:
        """Deletes it: a client with its keys; a tenant, role or plan only while nothing refers to it."""
        call = admin_calls.delete(self._wire.config, kind, resource_id, etag=etag, timeout_s=timeout_s)
        self._wire.unary(self._stub.DeleteResource, call)

    def rotate(
        self, kind: ResourceKind, resource_id: str, *, overlap_s: int = 0, timeout_s: float | None = None
    ) -> MadeResource:
        """A new secret of a client, or a new key in the place of one; the old one works for `overlap_s` more
        (30 days at most). It is not tried again where the server is lost."""
        call = admin_calls.rotate(
            self._wire.config, kind, resource_id, overlap_s=overlap_s, timeout_s=timeout_s
        )
        return self._wire.unary(self._stub.RotateSecret, call)

    def revoke(
        self,
        kind: ResourceKind,
        resource_id: str,
        *,
        cut_streams: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Disables a tenant, a client or an API key, and refuses its tokens everywhere within seconds."""
        call = admin_calls.revoke(
            self._wire.config, kind, resource_id, cut_streams=cut_streams, timeout_s=timeout_s
        )
        self._wire.unary(self._stub.Revoke, call)

    def revoke_token(
        self, token_id: str, *, cut_streams: bool = False, timeout_s: float | None = None
    ) -> None:
        """Refuses one access token, by its `jti`."""
        call = admin_calls.revoke_token(
            self._wire.config, token_id, cut_streams=cut_streams, timeout_s=timeout_s
        )
        self._wire.unary(self._stub.Revoke, call)

    def changes(
        self,
        kind: ResourceKind | None = None,
        resource_id: str = "",
        *,
        limit: int = 50,
        timeout_s: float | None = None,
    ) -> builtins.list[pb.ResourceChange]:
        """What administrators have changed, newest first, `limit` at most (up to 100,000)."""
        found: list[pb.ResourceChange] = []
        token = ""
        while True:
            call = admin_calls.changes_page(
                self._wire.config,
                kind,
                resource_id,
                limit=limit - len(found),
                page_token=token,
                timeout_s=timeout_s,
            )
            page = self._wire.unary(self._stub.ListChanges, call)
            found += page.changes
            token = page.next_page_token
            if not token or len(found) >= limit:
                return found[:limit]

    def explain(
        self,
        kind: ResourceKind,
        resource_id: str,
        *,
        method: str = GENERATE,
        model: str = "",
        task: str = "",
        address: str = "",
        time: datetime | None = None,
        max_tokens: int = 0,
        labels: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> pb.ExplainDecisionResponse:
        """What policy decides for a request of a client or an API key, and by which rule. Nothing is done."""
        call = admin_calls.explain(
            self._wire.config,
            kind,
            resource_id,
            method=method,
            model=model,
            task=task,
            address=address,
            time=time,
            max_tokens=max_tokens,
            labels=labels or {},
            timeout_s=timeout_s,
        )
        return self._wire.unary(self._stub.ExplainDecision, call)

    def export(
        self, *, tenant_id: str = "", include_digests: bool = False, timeout_s: float | None = None
    ) -> builtins.list[Resource]:
        """The whole configuration, or that of a tenant and its projects, in the order to make it in."""
        call = admin_calls.export(
            self._wire.config, tenant_id=tenant_id, include_digests=include_digests, timeout_s=timeout_s
        )
        return self._wire.unary(self._stub.ExportConfiguration, call)

    def apply(
        self,
        resources: Iterable[Resource],
        *,
        prune: bool = False,
        dry_run: bool = False,
        timeout_s: float | None = None,
    ) -> builtins.list[pb.AppliedResource]:
        """Makes the configuration so: all of it, or none. `prune` deletes what is not named, of the kinds
        that are."""
        call = admin_calls.apply(
            self._wire.config, resources, prune=prune, dry_run=dry_run, timeout_s=timeout_s
        )
        return self._wire.unary(self._stub.ApplyConfiguration, call)

    @property
    def _stub(self) -> admin_service_pb2_grpc.AdminServiceStub:
        return self._wire.admin
