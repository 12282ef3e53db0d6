"""A store in memory: for tests, and as the plainest reading of the port."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice

from services.auth.store import (
    ApiKey,
    Batch,
    Change,
    Client,
    Filter,
    IdentityProvider,
    Kind,
    Owned,
    Resource,
    Revocation,
    SigningKey,
    Stored,
    Tenant,
)
from services.auth.stores import rules, shapes
from services.mesh.errors import AlreadyExists, DataCorrupt
from services.mesh.policy import PolicyDocument


class MemoryStore:
    """Forgets everything when the process ends."""

    def __init__(self) -> None:
        self._resources: dict[shapes.Key, Stored] = {}
        self._holders: dict[tuple[Kind, str], str] = {}
        self._version = 0
        self._policy: tuple[int, PolicyDocument] = (0, rules.document({}))
        self._revocations: list[Revocation] = []
        self._changes: list[Change] = []
        self._used_ids: dict[str, datetime] = {}
        self._signing: list[SigningKey] = []

    async def start(self) -> None:
        """Nothing to open."""

    async def stop(self) -> None:
        """Nothing to close."""

    async def is_empty(self) -> bool:
        return not any(kind is Kind.TENANT for kind, _ in self._resources)

    async def commit(self, batch: Batch) -> int:
        touched = rules.Touched.by(batch)
        if batch.only_if_empty and not await self.is_empty():
            raise AlreadyExists("The store is not empty.")
        outcome = rules.plan(batch, self._snapshot(touched), self._version)
        self._write(outcome)
        self._revocations += [Revocation(outcome.version, revoked) for revoked in batch.revocations]
        return outcome.version

    def _snapshot(self, touched: rules.Touched) -> rules.Snapshot:
        before = rules.Snapshot(self._resources, self._holders)
        if touched.referred:
            for key, stored in self._resources.items():
                for other in touched.referred.intersection(shapes.references(stored.resource)):
                    before.referrers.setdefault(other, set()).add(key)
        return before

    def _write(self, outcome: rules.Outcome) -> None:
        for key in (*outcome.deleted, *outcome.put):
            old = self._resources.pop(key, None)
            name = None if old is None else shapes.lookup(old.resource)
            if name is not None and self._holders.get((key[0], name)) == key[1]:
                del self._holders[key[0], name]
        for key, stored in outcome.put.items():
            self._resources[key] = stored
            name = shapes.lookup(stored.resource)
            if name is not None:
                self._holders[key[0], name] = key[1]
        self._changes += outcome.changes
        self._version = outcome.version
        if outcome.changes_policy:
            held = {
                key: stored.resource for key, stored in self._resources.items() if key[0] in shapes.OF_POLICY
            }
            self._policy = (outcome.version, rules.document(held))

    async def get(self, kind: Kind, resource_id: str) -> Stored | None:
        return self._resources.get((kind, resource_id))

    async def list(self, kind: Kind, filter_: Filter, *, limit: int, after_id: str = "") -> Sequence[Stored]:
        passed = (
            self._resources[key]
            for key in sorted(self._resources)
            if key[0] is kind and key[1] > after_id and self._passes(filter_, self._resources[key].resource)
        )
        return list(islice(passed, limit))

    def _passes(self, filter_: Filter, resource: Resource) -> bool:
        owner = (
            self._resources[Kind.CLIENT, resource.client_id].resource
            if isinstance(resource, ApiKey)
            else None
        )
        return shapes.passes(filter_, resource, owner)

    async def find_client(self, client_id: str) -> Owned | None:
        stored = self._resources.get((Kind.CLIENT, client_id))
        if stored is None or not isinstance(stored.resource, Client):
            return None
        tenant = self._tenant(stored.resource.tenant_id)
        return Owned(stored.resource, tenant, self._tenant(tenant.parent_id) if tenant.parent_id else None)

    def _tenant(self, tenant_id: str) -> Tenant:
        tenant = self._resources[Kind.TENANT, tenant_id].resource
        if not isinstance(tenant, Tenant):
            raise DataCorrupt("The store of auth is damaged: a client without its tenant.")
        return tenant

    async def find_api_key(self, prefix: str) -> tuple[ApiKey, Owned] | None:
        key = self._named(Kind.API_KEY, prefix)
        if not isinstance(key, ApiKey):
            return None
        owned = await self.find_client(key.client_id)
        return None if owned is None else (key, owned)

    async def find_provider(self, issuer: str) -> IdentityProvider | None:
        provider = self._named(Kind.IDENTITY_PROVIDER, issuer)
        return provider if isinstance(provider, IdentityProvider) else None

    def _named(self, kind: Kind, name: str) -> Resource | None:
        resource_id = self._holders.get((kind, name))
        return None if resource_id is None else self._resources[kind, resource_id].resource

    async def used(self, last_used: Mapping[str, datetime]) -> None:
        for key_id, at in last_used.items():
            stored = self._resources.get((Kind.API_KEY, key_id))
            if stored is not None:
                self._resources[Kind.API_KEY, key_id] = replace(
                    stored, last_used_at=max(stored.last_used_at or at, at)
                )

    async def version(self) -> int:
        return self._version

    async def policy(self) -> tuple[int, PolicyDocument]:
        return self._policy

    async def revocations(self, *, after_version: int, now: datetime) -> Sequence[Revocation]:
        return [
            revocation
            for revocation in self._revocations
            if revocation.version > after_version and revocation.revoked.expires_at > now
        ]

    async def changes(
        self,
        *,
        kind: Kind | None = None,
        resource_id: str = "",
        tenant_ids: frozenset[str] | None = None,
        before: tuple[int, int] | None = None,
        limit: int,
    ) -> Sequence[Change]:
        passed = (
            change
            for change in reversed(self._changes)
            if (kind is None or change.kind is kind)
            and (not resource_id or change.resource_id == resource_id)
            and (tenant_ids is None or change.tenant_id in tenant_ids)
            and (before is None or (change.version, change.index) < before)
        )
        return list(islice(passed, limit))

    async def use_once(self, token_id: str, *, until: datetime, now: datetime) -> bool:
        kept_until = self._used_ids.get(token_id)
        if not shapes.is_text(token_id) or (kept_until is not None and kept_until > now):
            return False
        self._used_ids[token_id] = until
        return True

    async def prune(self, now: datetime) -> None:
        self._revocations = [one for one in self._revocations if one.revoked.expires_at > now]
        self._used_ids = {token_id: until for token_id, until in self._used_ids.items() if until > now}

    async def signing_keys(self) -> Sequence[SigningKey]:
        return list(self._signing)

    async def add_signing_key(self, key: SigningKey, *, after_kid: str) -> bool:
        if (self._signing[-1].kid if self._signing else "") != after_kid:
            return False
        self._signing.append(key)
        return True

    async def replace_signing_key(self, key: SigningKey) -> None:
        self._signing = [key if other.kid == key.kid else other for other in self._signing]

    async def delete_signing_key(self, kid: str) -> None:
        self._signing = [key for key in self._signing if key.kid != kid]
