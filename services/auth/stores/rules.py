"""What a commit does, decided on values alone: both stores load what a batch touches, ask `plan`, and write
what it says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.auth.store import (
    ApiKey,
    Batch,
    Change,
    Client,
    Delete,
    Kind,
    Put,
    Resource,
    Stored,
    Tenant,
)
from services.auth.stores.shapes import (
    BUILT_IN,
    NAMES,
    OF_POLICY,
    Key,
    is_text,
    key_of,
    lookup,
    lookup_name,
    named,
    references,
    tenant_of,
    texts,
    without_digests,
)
from services.mesh.errors import AlreadyExists, Conflict, NotFound, RequestInvalid, StateConflict
from services.mesh.policy import (
    BUILT_IN_PLANS,
    BUILT_IN_ROLES,
    AddressRule,
    Plan,
    PolicyDocument,
    Role,
    TenantPolicy,
)


@dataclass(slots=True)
class Snapshot:
    """What there is before a batch, as far as the batch touches it (`Touched`)."""

    resources: dict[Key, Stored] = field(default_factory=dict)
    holders: dict[tuple[Kind, str], str] = field(default_factory=dict)
    """By `lookup`: who has it."""
    referrers: dict[Key, set[Key]] = field(default_factory=dict)
    """What refers to it: of a client all its keys, and of others so many that the batch cannot delete all of
    them without naming them."""


@dataclass(frozen=True, slots=True)
class Touched:
    """What a snapshot for a batch must hold."""

    keys: frozenset[Key]
    lookups: frozenset[tuple[Kind, str]]
    referred: frozenset[Key]
    """What referrers are asked of."""

    @classmethod
    def by(cls, batch: Batch) -> Touched:
        """Of this batch. Raises RequestInvalid where a text of it cannot be kept."""
        if not all(map(is_text, texts(batch))):
            raise RequestInvalid("A text holds a character that cannot be stored, such as NUL.")
        keys: set[Key] = set()
        lookups: set[tuple[Kind, str]] = set()
        referred: set[Key] = set()
        for write in batch.writes:
            match write:
                case Delete():
                    keys.add((write.kind, write.resource_id))
                    referred.add((write.kind, write.resource_id))
                case Put():
                    key = key_of(write.resource)
                    keys |= {key, *references(write.resource)}
                    if isinstance(write.resource, Tenant) and write.resource.parent_id:
                        referred.add(key)
                    name = lookup(write.resource)
                    if name is not None:
                        lookups.add((key[0], name))
        return cls(frozenset(keys - BUILT_IN), frozenset(lookups), frozenset(referred - BUILT_IN))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a commit writes."""

    version: int
    """The one before where nothing has an effect."""
    deleted: frozenset[Key]
    """Goes first, also where one of the same name is put."""
    put: Mapping[Key, Stored]
    changes: tuple[Change, ...]
    changes_policy: bool


def plan(batch: Batch, before: Snapshot, version: int) -> Outcome:
    """What the batch does to what there is at `version`. Raises what `Store.commit` says."""
    work = _Work(batch, before, version + 1)
    for write in batch.writes:
        if isinstance(write, Put):
            work.put(write)
        else:
            work.delete(write)
    return work.outcome()


class _Work:
    """The state in the middle of a batch."""

    def __init__(self, batch: Batch, before: Snapshot, version: int) -> None:
        self._batch = batch
        self._version = version
        self._now = dict(before.resources)
        self._holders = dict(before.holders)
        self._referrers: defaultdict[Key, set[Key]] = defaultdict(set)
        for key, others in before.referrers.items():
            self._referrers[key] = set(others)
        self._deleted: set[Key] = set()
        self._put: dict[Key, Stored] = {}
        self._changes: list[Change] = []

    def outcome(self) -> Outcome:
        effect = bool(self._changes or self._batch.revocations)
        return Outcome(
            self._version if effect else self._version - 1,
            frozenset(self._deleted),
            self._put,
            tuple(self._changes),
            any(change.kind in OF_POLICY for change in self._changes),
        )

    def put(self, write: Put) -> None:
        key = key_of(write.resource)
        self._refuse_built_in(key)
        old = self._now.get(key)
        if write.create and old is not None:
            raise AlreadyExists(f"There is {named(key)} already.")
        if not write.create:
            old = self._present(key, write.expected_version)
        for other in references(write.resource):
            if other not in BUILT_IN and other not in self._now:
                raise NotFound(f"There is no {named(other)}.")
        if old is not None:
            if old.resource == write.resource:
                return
            _keeps_owner(old.resource, write.resource)
        if isinstance(write.resource, Tenant):
            self._is_one_level(write.resource)
        self._take_lookup(key, old, write.resource)
        self._forget_references(key, old)
        stored = Stored(
            write.resource,
            self._version,
            self._batch.at if old is None else old.created_at,
            self._batch.at,
            None if old is None else old.last_used_at,
        )
        self._now[key] = self._put[key] = stored
        for other in references(write.resource):
            self._referrers[other].add(key)
        self._record(key, old, stored, write.note)

    def delete(self, write: Delete) -> None:
        key = (write.kind, write.resource_id)
        self._refuse_built_in(key)
        old = self._present(key, write.expected_version)
        for other in sorted(self._referrers[key]):
            if other[0] is not Kind.API_KEY:
                raise StateConflict(f"The {named(other)} refers to the {named(key)}: change that first.")
        for other in sorted(self._referrers[key]):
            self._remove(other, self._now[other], "deleted with its client")
        self._remove(key, old, "")

    def _remove(self, key: Key, old: Stored, note: str) -> None:
        self._record(key, old, None, note)
        del self._now[key]
        self._put.pop(key, None)
        self._deleted.add(key)
        self._forget_references(key, old)
        name = lookup(old.resource)
        if name is not None:
            self._holders.pop((key[0], name), None)

    def _refuse_built_in(self, key: Key) -> None:
        if key in BUILT_IN:
            raise StateConflict(f"The {named(key)} is built in and cannot be changed.")

    def _present(self, key: Key, expected_version: int | None) -> Stored:
        old = self._now.get(key)
        if old is None:
            raise NotFound(f"There is no {named(key)}.")
        if expected_version is not None and expected_version != old.version:
            raise Conflict(f"The {named(key)} was changed by somebody else in the meantime.")
        return old

    def _is_one_level(self, tenant: Tenant) -> None:
        if not tenant.parent_id:
            return
        above = self._now[Kind.TENANT, tenant.parent_id].resource
        nested = isinstance(above, Tenant) and above.parent_id
        has_projects = any(kind is Kind.TENANT for kind, _ in self._referrers[Kind.TENANT, tenant.tenant_id])
        if nested or has_projects or tenant.parent_id == tenant.tenant_id:
            raise StateConflict("A project cannot have projects: name an organisation as the parent.")

    def _take_lookup(self, key: Key, old: Stored | None, resource: Resource) -> None:
        name = lookup(resource)
        if name is None:
            return
        if self._holders.get((key[0], name), key[1]) != key[1]:
            raise AlreadyExists(f"Another {NAMES[key[0]]} has the same {lookup_name(key[0])}.")
        before = None if old is None else lookup(old.resource)
        if before is not None:
            self._holders.pop((key[0], before), None)
        self._holders[key[0], name] = key[1]

    def _forget_references(self, key: Key, old: Stored | None) -> None:
        if old is not None:
            for other in references(old.resource):
                self._referrers[other].discard(key)

    def _record(self, key: Key, old: Stored | None, new: Stored | None, note: str) -> None:
        stored = new or old
        if stored is None:
            return
        self._changes.append(
            Change(
                version=self._version,
                index=len(self._changes),
                at=self._batch.at,
                actor=self._batch.actor,
                request_id=self._batch.request_id,
                kind=key[0],
                resource_id=key[1],
                tenant_id=self._tenant_of(stored.resource),
                before=None if old is None else without_digests(old.resource),
                after=None if new is None else without_digests(new.resource),
                note=note,
            )
        )

    def _tenant_of(self, resource: Resource) -> str:
        owner = self._now.get((Kind.CLIENT, resource.client_id)) if isinstance(resource, ApiKey) else None
        return tenant_of(resource, None if owner is None else owner.resource)


def document(resources: Mapping[Key, Resource]) -> PolicyDocument:
    """The policy that these make, with what is built in."""
    ordered = [resources[key] for key in sorted(resources)]
    tenants = [resource for resource in ordered if isinstance(resource, Tenant)]
    disabled = {tenant.tenant_id for tenant in tenants if tenant.disabled}
    return PolicyDocument(
        roles=(*BUILT_IN_ROLES, *(one for one in ordered if isinstance(one, Role))),
        address_rules=tuple(one for one in ordered if isinstance(one, AddressRule)),
        tenants=tuple(
            TenantPolicy(tenant.tenant_id, tenant.parent_id, tenant.plan_id)
            for tenant in tenants
            if not {tenant.tenant_id, tenant.parent_id} & disabled
        ),
        plans=(*BUILT_IN_PLANS, *(one for one in ordered if isinstance(one, Plan))),
    )


def _keeps_owner(old: Resource, new: Resource) -> None:
    if isinstance(old, Client) and isinstance(new, Client) and old.tenant_id != new.tenant_id:
        raise StateConflict("A client stays with its tenant: make another client.")
    if isinstance(old, ApiKey) and isinstance(new, ApiKey) and old.client_id != new.client_id:
        raise StateConflict("An API key stays with its client: make another key.")
