"""The whole configuration at once: export, and making it as it is given.

An application is planned resource by resource, checked as a whole and written in one commit: all of it or
nothing. What is as given already is not written, so that applying twice changes nothing the second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from services.auth.administration.authority import Administrator, roles_of
from services.auth.administration.callers import By, administrator
from services.auth.administration.changeset import Changeset
from services.auth.administration.resources import ORDER, Given, merged
from services.auth.administration.world import every
from services.auth.store import ApiKey, Client, Filter, Kind, Resource, Store, Stored, Tenant
from services.auth.stores import shapes
from services.mesh.clock import Clock
from services.mesh.errors import Conflict, LlmosError, NotFound, RequestInvalid, Violation

_Named = Callable[[shapes.Key, LlmosError], LlmosError]

_LOAD_FROM = 32
"""So many resources of a kind are read at once, and not one by one."""


class Action(IntEnum):
    """What is done with a resource; the numbers are those of the proto."""

    UNCHANGED = 1
    CREATED = 2
    UPDATED = 3
    DELETED = 4


@dataclass(frozen=True, slots=True)
class Applied:
    """What was done, or would be."""

    key: shapes.Key
    action: Action


class Configuration:
    """`cuts_streams` as for `Administration`."""

    def __init__(self, store: Store, clock: Clock, *, cuts_streams: bool = False) -> None:
        self._store = store
        self._clock = clock
        self._cuts_streams = cuts_streams

    async def export(self, by: By, tenant_id: str = "", *, digests: bool = False) -> AsyncIterator[Stored]:
        """All that there is, in the order in which it can be made: of a tenant and its projects where one is
        named, and for the administrator of a tenant. Without what is built in.

        Raises NotFound, and ScopeMissing where digests are asked for without `admin`.
        """
        asking = await administrator(self._store, by.identity, self._clock.now())
        if digests:
            asking.require_everything("To export digests")
        tenants = await self._tenants(asking, tenant_id)
        for kind in Kind:
            if tenants is not None and kind is Kind.PLAN:
                continue
            if not asking.is_admin and kind is Kind.IDENTITY_PROVIDER:
                continue
            found = [stored async for stored in every(self._store, kind, Filter(tenants))]
            if kind is Kind.TENANT:
                found.sort(key=_place)
            for stored in found:
                yield stored

    async def _tenants(self, asking: Administrator, tenant_id: str) -> frozenset[str] | None:
        if not tenant_id:
            return asking.tenants
        stored = await self._store.get(Kind.TENANT, tenant_id)
        if stored is None or not asking.sees(stored.resource, tenant_id):
            raise NotFound(f"There is no {shapes.named((Kind.TENANT, tenant_id))}.")
        projects = {
            one.resource.tenant_id
            async for one in every(self._store, Kind.TENANT, Filter())
            if isinstance(one.resource, Tenant) and one.resource.parent_id == tenant_id
        }
        return frozenset({tenant_id, *projects})

    async def apply(
        self, by: By, given: Sequence[Given], *, prune: bool = False, dry_run: bool = False
    ) -> list[Applied]:
        """Makes it so. Nothing is done where anything is refused; the error names the resource.

        `prune` deletes what is not named, of the kinds that are, save the client that asks and what it needs.
        Raises as the changes of `Administration` do, and Conflict where an etag is of another state.
        """
        asking = await administrator(self._store, by.identity, self._clock.now())
        _require_once(given)
        changes = Changeset(self._store, asking, self._clock.now())
        counts = Counter(one.key[0] for one in given)
        for kind, count in counts.items():
            if prune or count >= _LOAD_FROM:
                await changes.world.load(kind, Filter(asking.tenants) if _is_of_tenants(kind) else Filter())
        places = {one.key: place for place, one in enumerate(given)}

        def named(key: shapes.Key, error: LlmosError) -> LlmosError:
            return _naming(error, key, places.get(key))

        applied = [
            await self._plan(changes, one, named)
            for one in sorted(given, key=lambda one: _place_of(one.resource))
        ]
        if prune:
            applied += await self._plan_deletes(changes, asking, set(counts), set(places))
        batch = await changes.batch(
            by.request_id,
            cut_streams=self._cuts_streams,
            name=lambda write, error: named(write.key, error),
        )
        if not dry_run and changes.writes:
            await self._store.commit(batch)
        return applied

    async def _plan(self, changes: Changeset, given: Given, named: _Named) -> Applied:
        key = given.key
        if key in shapes.BUILT_IN and await changes.world.before(key) == given.resource:
            return Applied(key, Action.UNCHANGED)
        before = None if key in shapes.BUILT_IN else await changes.world.stored(key)
        try:
            if before is None:
                if given.expected_version is not None:
                    raise Conflict(
                        f"The {shapes.named(key)} was deleted after you read it.",
                        hint="Leave out its etag to make it anew.",
                    )
                changes.plan(None, _new(given.resource))
                return Applied(key, Action.CREATED)
            if given.expected_version not in (None, before.version):
                raise Conflict(f"The {shapes.named(key)} was changed by somebody else after you read it.")
            after = _as_given(before.resource, given.resource)
        except LlmosError as error:
            raise named(key, error) from error
        if after == before.resource:
            return Applied(key, Action.UNCHANGED)
        changes.plan(before, after)
        return Applied(key, Action.UPDATED)

    async def _plan_deletes(
        self, changes: Changeset, asking: Administrator, kinds: set[Kind], kept: set[shapes.Key]
    ) -> list[Applied]:
        kept = kept | await self._needed(asking)
        applied = []
        for kind in sorted(kinds, key=ORDER.__getitem__, reverse=True):
            filter_ = Filter(asking.tenants) if _is_of_tenants(kind) else Filter()
            found = [stored async for stored in every(self._store, kind, filter_)]
            for stored in sorted(found, key=_place, reverse=True):
                key = shapes.key_of(stored.resource)
                if key not in kept:
                    changes.plan(stored, None)
                    applied.append(Applied(key, Action.DELETED))
        return applied

    async def _needed(self, asking: Administrator) -> set[shapes.Key]:
        """The client that asks, and what it needs to exist."""
        identity = asking.identity
        kept: set[shapes.Key] = {
            (Kind.CLIENT, identity.client_id),
            (Kind.TENANT, identity.tenant_id),
            (Kind.API_KEY, identity.key_id),
        }
        owned = await self._store.find_client(identity.client_id)
        if owned is None:
            return kept
        _, document = await self._store.policy()
        roles = {role.role_id: role for role in document.roles}
        kept |= {(Kind.ROLE, role.role_id) for role in roles_of(owned.client, owned.tenant, roles)}
        kept.add((Kind.PLAN, owned.tenant.plan_id))
        if owned.organisation is not None:
            kept.add((Kind.TENANT, owned.organisation.tenant_id))
            kept.add((Kind.PLAN, owned.organisation.plan_id))
        return kept


def _is_of_tenants(kind: Kind) -> bool:
    return kind is not Kind.PLAN


def _place_of(resource: Resource) -> tuple[int, bool, str]:
    """Organisations come before their projects."""
    kind, resource_id = shapes.key_of(resource)
    return ORDER[kind], isinstance(resource, Tenant) and bool(resource.parent_id), resource_id


def _place(stored: Stored) -> tuple[int, bool, str]:
    return _place_of(stored.resource)


def _require_once(given: Sequence[Given]) -> None:
    seen: dict[shapes.Key, int] = {}
    for place, one in enumerate(given):
        if not one.key[1]:
            raise RequestInvalid(
                f"resources[{place}] has no id.",
                violations=[Violation(f"resources[{place}].{one.key[0].value}.id", "is required here")],
            )
        if one.key in seen:
            raise RequestInvalid(
                f"The {shapes.named(one.key)} is given twice.",
                violations=[
                    Violation(f"resources[{place}]", f"is the same as resources[{seen[one.key]}]"),
                ],
            )
        seen[one.key] = place


def _new(resource: Resource) -> Resource:
    """Raises RequestInvalid for a key that nobody could use."""
    if isinstance(resource, ApiKey) and not (resource.digest and len(resource.prefix) == 8):
        raise RequestInvalid(
            f"The {shapes.named(shapes.key_of(resource))} does not exist, and cannot be made without its "
            "`prefix` and `secret_sha256`.",
            hint="Create the key by itself, which shows it once; or export with digests.",
            violations=[Violation("resource.api_key.secret_sha256", "is required for a new key")],
        )
    return resource


def _as_given(before: Resource, given: Resource) -> Resource:
    """`before` with all that may change as given; a digest that is not given stays."""
    after = merged(before, given, ())
    match after, given:
        case Client(), Client():
            if given.secret_digest and given.secret_digest != after.secret_digest:
                after = replace(
                    after, secret_digest=given.secret_digest, old_secret_digest=b"", old_secret_until=None
                )
            if given.external_subject and given.external_subject != after.external_subject:
                raise RequestInvalid(
                    "A client stays with the person that it is for.",
                    violations=[Violation("resource.client.external_subject", "never changes")],
                )
        case ApiKey(), ApiKey():
            if (given.prefix or after.prefix, given.digest or after.digest) != (after.prefix, after.digest):
                raise RequestInvalid(
                    "A key's text never changes: make another key.",
                    violations=[Violation("resource.api_key.prefix", "never changes")],
                )
        case _:
            pass
    return after


def _naming(error: LlmosError, key: shapes.Key, place: int | None) -> LlmosError:
    """The same error, which says of which resource it speaks."""
    name = shapes.named(key)
    field = "" if place is None else f"resources[{place}]"
    return type(error)(
        error.message if name in error.message else f"The {name} cannot be applied: {error.message}",
        hint=error.hint,
        retry_after_s=error.retry_after_s,
        metadata=error.metadata,
        violations=[
            Violation(field + one.field.removeprefix("resource") if field else one.field, one.description)
            for one in error.violations
        ],
    )
