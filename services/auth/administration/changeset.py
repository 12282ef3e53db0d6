"""Writes that go together: checked as a whole, by what there will be after all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from services.auth.administration import checking, revoking, size
from services.auth.administration.authority import Administrator, reach, usable
from services.auth.administration.resources import there_is_no
from services.auth.administration.world import World
from services.auth.grants import policy
from services.auth.store import (
    ApiKey,
    Batch,
    Client,
    Delete,
    IdentityProvider,
    Kind,
    NewRevocation,
    Put,
    Resource,
    Store,
    Stored,
    Tenant,
)
from services.auth.stores import shapes
from services.mesh.errors import LlmosError, RequestInvalid, ScopeMissing, StateConflict
from services.mesh.policy import ADMIN, TENANT_ADMIN, Role


@dataclass(frozen=True, slots=True)
class Write:
    """One of them."""

    before: Stored | None
    """None: it is made."""
    after: Resource | None
    """None: it is deleted."""
    note: str = ""

    @property
    def resource(self) -> Resource:
        found = self.after or (self.before.resource if self.before else None)
        if found is None:
            raise ValueError("a write has a state before or after")
        return found

    @property
    def key(self) -> shapes.Key:
        return shapes.key_of(self.resource)


class Changeset:
    """Plan the writes, in the order in which they shall be done; `batch` checks and returns them."""

    def __init__(self, store: Store, by: Administrator, now: datetime) -> None:
        self.world = World(store)
        self.writes: list[Write] = []
        self._by = by
        self._now = now

    def plan(self, before: Stored | None, after: Resource | None, note: str = "") -> None:
        write = Write(before, after, note)
        self.writes.append(write)
        self.world.plan(write.key, after)

    async def batch(
        self,
        request_id: str,
        *,
        cut_streams: bool,
        revocations: list[NewRevocation] | None = None,
        replaces_own_key: bool = False,
        name: Callable[[Write, LlmosError], LlmosError] = lambda _, error: error,
    ) -> Batch:
        """The commit. `revocations` come besides those that the writes bring with them; `name` makes an error
        of one write say which.

        Raises NotFound, RequestInvalid, ScopeMissing, PolicyDenied and StateConflict.
        """
        refused: list[NewRevocation] = list(revocations or ())
        for write in self.writes:
            try:
                await self._check(write)
            except LlmosError as error:
                raise name(write, error) from error
            refused += await self._revocations(write, cut_streams)
        size.check(await self.world.policy_before(), self.world.planned)
        await self._require_stays_in(replaces_own_key)
        writes: list[Put | Delete] = [_as_write(write) for write in self.writes]
        return Batch(
            at=self._now,
            actor=self._by.actor,
            request_id=request_id,
            writes=[*await self._guards(), *writes],
            revocations=list(dict.fromkeys(refused)),
        )

    # -- each write by itself ----------------------------------------------------------------------------

    async def _check(self, write: Write) -> None:
        by, resource = self._by, write.resource
        if write.key in shapes.BUILT_IN:
            raise StateConflict(
                f"The {shapes.named(write.key)} is built in and cannot be changed.",
                hint="Make one of your own, with another id.",
            )
        if isinstance(resource, ApiKey):
            client = await self.world.client(resource.client_id)
            by.require_sees(client, client.tenant_id)
        owner = await self.world.owner(resource)
        if write.before is not None:
            by.require_sees(write.before.resource, owner)
        by.require_manages(resource, owner)
        if write.after is not None:
            was = write.before.resource if write.before else None
            checking.check(write.after, was, self._now)
            await self._check_references(write.after, was, owner)
        match resource:
            case Client():
                await self._check_client(write, resource)
            case ApiKey():
                await self._check_key(write, resource)
            case Role():
                self._check_role(write, resource)
            case _:
                pass

    async def _check_references(self, after: Resource, before: Resource | None, owner: str) -> None:
        """What it newly refers to must exist, to whoever asks too; and roles must be of use to it."""
        known = set() if before is None else set(shapes.references(before))
        for key in shapes.references(after):
            if key in known:
                continue
            found = await self.world.after(key)
            if found is None:
                there_is_no(key)
            if not isinstance(found, ApiKey):
                self._by.require_sees(found, shapes.tenant_of(found))
            is_of_no_use = isinstance(found, Role) and not usable(found, await self.world.tenant(owner))
            if isinstance(after, Client | IdentityProvider) and is_of_no_use:
                raise RequestInvalid(
                    f"The {shapes.named(key)} belongs to another tenant than the "
                    f"{shapes.named(shapes.key_of(after))}, and would give it nothing."
                )

    async def _check_client(self, write: Write, client: Client) -> None:
        by, what = self._by, f"The {shapes.named(write.key)}"
        tenant = await self.world.tenant(client.tenant_id)
        was = write.before.resource if write.before else None
        if isinstance(was, Client):
            by.require_not_above(reach(was, tenant, await self.world.roles_before()), what)
        if write.after is None:
            return
        if was is None and client.external_subject:
            by.require_everything("To make the client of a person of an identity provider")
        is_rights = not isinstance(was, Client) or (was.scopes, was.roles) != (client.scopes, client.roles)
        if is_rights:
            by.require_not_own(client.client_id == by.identity.client_id, "your own scopes and roles")
        is_credential = not isinstance(was, Client) or (was.jwks_json, was.secret_digest) != (
            client.jwks_json,
            client.secret_digest,
        )
        if is_rights or is_credential:
            by.require_may_give(reach(client, tenant, await self.world.roles()), what)

    async def _check_key(self, write: Write, key: ApiKey) -> None:
        by, client = self._by, await self.world.client(key.client_id)
        reached = reach(client, await self.world.tenant(client.tenant_id), await self.world.roles())
        by.require_not_above(reached, f"The {shapes.named((Kind.CLIENT, key.client_id))}")
        was = write.before.resource if write.before else None
        if write.after is None or (isinstance(was, ApiKey) and _limits(was) == _limits(key)):
            return
        missing = sorted(key.scopes - reached)
        if missing and not (isinstance(was, ApiKey) and was.scopes == key.scopes):
            raise ScopeMissing(
                f"The client lacks the scope `{missing[0]}`.",
                hint="A key has some of its client's scopes: give the client the scope first.",
                metadata={"scope": missing[0]},
            )
        by.require_may_give(reached & (key.scopes or reached), f"The {shapes.named(write.key)}")

    def _check_role(self, write: Write, role: Role) -> None:
        by, what = self._by, f"The {shapes.named(write.key)}"
        was = write.before.resource if write.before else None
        if isinstance(was, Role):
            by.require_not_above(policy.reachable(frozenset(), [was]), what)
        if write.after is not None and isinstance(was, Role) and _rights(was) == _rights(role):
            return
        by.require_not_own(role.role_id in by.roles, "a role of your own")
        if write.after is not None:
            by.require_may_give(policy.reachable(frozenset(), [role]), what)

    async def _revocations(self, write: Write, cut_streams: bool) -> list[NewRevocation]:
        if write.before is None:
            return []
        projects: list[str] = []
        if isinstance(write.before.resource, Tenant):
            projects = await self.world.projects(write.before.resource.tenant_id)
        roles = await self.world.roles()
        return [
            revoking.revocation(kind, subject_id, self._now, cut_streams=cut_streams)
            for kind, subject_id in revoking.subjects(write.before.resource, write.after, roles, projects)
        ]

    # -- all of them together ----------------------------------------------------------------------------

    async def _require_stays_in(self, replaces_own_key: bool) -> None:
        """Whoever asks must be an administrator afterwards too. So there is always one left."""
        identity, world = self._by.identity, self.world
        needed = ADMIN if self._by.is_admin else TENANT_ADMIN
        client = await world.after((Kind.CLIENT, identity.client_id))
        tenant = await world.after((Kind.TENANT, identity.tenant_id))
        above = None
        if isinstance(tenant, Tenant) and tenant.parent_id:
            above = await world.after((Kind.TENANT, tenant.parent_id))
        if (
            not isinstance(client, Client)
            or not isinstance(tenant, Tenant)
            or client.disabled
            or tenant.disabled
            or (isinstance(above, Tenant) and above.disabled)
            or needed not in reach(client, tenant, await world.roles())
        ):
            raise StateConflict(
                f"You would no longer be an administrator: nobody takes the scope `{needed}` from itself, so "
                "that there is always an administrator left.",
                hint="Let another administrator do it.",
            )
        if not identity.key_id or replaces_own_key:
            return
        key = await world.after((Kind.API_KEY, identity.key_id))
        if (
            not isinstance(key, ApiKey)
            or key.disabled
            or (key.expires_at is not None and key.expires_at <= self._now)
            or (key.scopes and needed not in key.scopes)
        ):
            raise StateConflict(
                "It is the key that you are using.", hint="Rotate it, or use another credential for this."
            )

    async def _guards(self) -> list[Put]:
        """Two administrators who take `admin` from each other at one moment: one of them must lose. Its own
        client and tenant, put as they are, make the commit fail where another has changed them."""
        if not any([await self._takes_from_admins(write) for write in self.writes]):
            return []
        identity, planned = self._by.identity, {write.key for write in self.writes}
        guards = []
        for key in ((Kind.CLIENT, identity.client_id), (Kind.TENANT, identity.tenant_id)):
            stored = await self.world.stored(key)
            if stored is not None and key not in planned:
                guards.append(Put(stored.resource, create=False, expected_version=stored.version))
        return guards

    async def _takes_from_admins(self, write: Write) -> bool:
        before = write.before.resource if write.before else None
        match before:
            case Tenant():
                return True
            case Role():
                return ADMIN in policy.reachable(frozenset(), [before])
            case Client():
                tenant = await self.world.tenant(before.tenant_id)
                return ADMIN in reach(before, tenant, await self.world.roles_before())
            case _:
                return False


def _as_write(write: Write) -> Put | Delete:
    version = None if write.before is None else write.before.version
    if write.after is None:
        return Delete(*write.key, expected_version=version)
    return Put(write.after, create=write.before is None, expected_version=version, note=write.note)


def _limits(key: ApiKey) -> tuple[object, ...]:
    return key.scopes, key.models, key.addresses, key.expires_at, key.digest


def _rights(role: Role) -> tuple[object, ...]:
    return role.scopes, role.rules
