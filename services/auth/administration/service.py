"""Administration: every change is checked, written with its revocations in one commit, and recorded.

Secrets leave it once, in the answer that makes them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import NoReturn

from services.auth.administration import paging, revoking
from services.auth.administration.authority import Administrator
from services.auth.administration.callers import By, administrator
from services.auth.administration.changeset import Changeset
from services.auth.administration.resources import Given, built_in, merged, there_is_no
from services.auth.administration.world import every
from services.auth.credentials import keys
from services.auth.store import (
    ApiKey,
    Change,
    Client,
    Filter,
    Kind,
    NewRevocation,
    Resource,
    Store,
    Stored,
    Tenant,
)
from services.auth.stores import shapes
from services.mesh.clock import Clock
from services.mesh.errors import Conflict, RequestInvalid, StateConflict, Violation
from services.mesh.policy import RevocationKind

_ATTEMPTS = 3
"""For an update without an etag: another's change to other fields is no conflict."""
_REVOCABLE = {
    Kind.TENANT: RevocationKind.TENANT,
    Kind.CLIENT: RevocationKind.CLIENT,
    Kind.API_KEY: RevocationKind.API_KEY,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which resources are listed; what is empty does not filter."""

    kind: Kind
    tenant_id: str = ""
    client_id: str = ""
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """A resource, with the secret that was made for it."""

    stored: Stored
    secret: str = field(default="", repr=False)


class Administration:
    """`cuts_streams`: whether what is disabled by an update, or deleted, also ends its running streams."""

    def __init__(self, store: Store, clock: Clock, *, cuts_streams: bool = False) -> None:
        self._store = store
        self._clock = clock
        self._cuts_streams = cuts_streams

    # -- reading -----------------------------------------------------------------------------------------

    async def get(self, by: By, key: shapes.Key) -> Stored:
        """Raises NotFound."""
        asking = await self._asking(by)
        found = await self._find(asking, key)
        return there_is_no(key) if found is None else found

    async def page(
        self, by: By, wanted: Wanted, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[Sequence[Stored], str]:
        """A page, sorted by id, and the token of the next one; empty: this is the last. What is built in is
        among it."""
        asking = await self._asking(by)
        size, after_id = paging.page_size(page_size), paging.after_id(page_token)
        found = [
            Stored(resource, 0, self._clock.now(), self._clock.now())
            for resource_id, resource in built_in(wanted.kind).items()
            if resource_id > after_id and not (wanted.tenant_id or wanted.client_id or wanted.prefix)
        ]
        found += await self._after(asking, wanted, after_id, size + 1)
        found.sort(key=lambda stored: shapes.key_of(stored.resource)[1])
        page = found[:size]
        more = len(found) > size
        return page, paging.token_after_id(shapes.key_of(page[-1].resource)[1]) if more else ""

    async def changes(
        self, by: By, key: shapes.Key | None, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[Sequence[Change], str]:
        """Newest first, and the token of the next page."""
        asking = await self._asking(by)
        size = paging.page_size(page_size)
        found = await self._store.changes(
            kind=None if key is None else key[0],
            resource_id="" if key is None else key[1],
            tenant_ids=asking.tenants,
            before=paging.before_place(page_token),
            limit=size + 1,
        )
        page = found[:size]
        token = paging.token_before_place(page[-1].version, page[-1].index) if len(found) > size else ""
        # of a tenant's things its administrator does not see the identity providers
        return [one for one in page if asking.is_admin or one.kind is not Kind.IDENTITY_PROVIDER], token

    # -- changing ----------------------------------------------------------------------------------------

    async def create(self, by: By, given: Given, *, without_secret: bool = False) -> Made:
        """Makes a resource. Raises AlreadyExists, NotFound, RequestInvalid, ScopeMissing, PolicyDenied."""
        asking, now = await self._asking(by), self._clock.now()
        _require_made_here(given.resource)
        resource, secret = _with_secret(given.resource, without_secret=without_secret)
        changes = Changeset(self._store, asking, now)
        changes.plan(None, resource)
        version = await self._commit(by, changes)
        return Made(Stored(resource, version, now, now), secret)

    async def update(self, by: By, given: Given, paths: Collection[str] = ()) -> Stored:
        """Changes the fields that `paths` name, or all that may change.

        Raises Conflict where the etag is of another state, NotFound, RequestInvalid and the like.
        """
        asking = await self._asking(by)
        for attempt in range(_ATTEMPTS):
            before = await self._require(asking, given.key)
            await self._require_version(given.key, before, given.expected_version)
            after = merged(before.resource, given.resource, paths)
            try:
                return await self._replace(by, asking, before, after)
            except Conflict:
                if given.expected_version is not None:
                    await self._conflict(given.key)
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    async def delete(self, by: By, key: shapes.Key, expected_version: int | None = None) -> None:
        """Raises Conflict, NotFound, and StateConflict where something refers to it."""
        asking = await self._asking(by)
        before = await self._require(asking, key)
        await self._require_version(key, before, expected_version)
        changes = Changeset(self._store, asking, self._clock.now())
        changes.plan(before, None)
        await self._commit(by, changes)

    async def rotate(self, by: By, key: shapes.Key, overlap_s: int) -> Made:
        """A new secret for a client, or a new key in the place of one: with the same limits, and with as long
        a life as the old one had. The old secret works for `overlap_s` more; 0: it and its tokens end now.

        Raises StateConflict for what is disabled, and RequestInvalid for what has no secret.
        """
        asking, now = await self._asking(by), self._clock.now()
        before = await self._require(asking, key)
        match before.resource:
            case Client():
                return await self._rotate_client(by, asking, before, before.resource, overlap_s, now)
            case ApiKey():
                return await self._rotate_key(by, asking, before, before.resource, overlap_s, now)
            case _:
                raise _wrong_kind(key, "a client or an API key")

    async def revoke(self, by: By, key: shapes.Key, *, cut_streams: bool) -> None:
        """Disables a tenant, a client or an API key, and refuses its tokens. Raises as `update`."""
        asking, now = await self._asking(by), self._clock.now()
        if key[0] not in _REVOCABLE:
            raise _wrong_kind(key, "a tenant, a client or an API key")
        before = await self._require(asking, key)
        if not isinstance(before.resource, Tenant | Client | ApiKey):
            raise _wrong_kind(key, "a tenant, a client or an API key")
        changes = Changeset(self._store, asking, now)
        changes.plan(before, replace(before.resource, disabled=True), "revoked")
        ids = [key[1]]
        if isinstance(before.resource, Tenant):
            ids += await changes.world.projects(key[1])
        kind = _REVOCABLE[key[0]]
        refused = [revoking.revocation(kind, one, now, cut_streams=cut_streams) for one in ids]
        await self._commit(by, changes, cut_streams=cut_streams, revocations=refused)

    async def revoke_token(self, by: By, token_id: str, *, cut_streams: bool) -> None:
        """Refuses one token, by its `jti`. Raises ScopeMissing for all but `admin`: a token id does not tell
        whose it is."""
        asking, now = await self._asking(by), self._clock.now()
        asking.require_everything("To revoke a token by its id")
        refused = revoking.revocation(RevocationKind.TOKEN, token_id, now, cut_streams=cut_streams)
        changes = Changeset(self._store, asking, now)
        await self._commit(by, changes, revocations=[refused])

    # -- parts -------------------------------------------------------------------------------------------

    async def _asking(self, by: By) -> Administrator:
        return await administrator(self._store, by.identity, self._clock.now())

    async def _find(self, asking: Administrator, key: shapes.Key) -> Stored | None:
        """None where it does not exist for whoever asks."""
        found = built_in(key[0]).get(key[1])
        if found is not None:
            return Stored(found, 0, self._clock.now(), self._clock.now())
        stored = await self._store.get(*key)
        if stored is None:
            return None
        owner: Resource | None = None
        if isinstance(stored.resource, ApiKey):
            client = await self._store.get(Kind.CLIENT, stored.resource.client_id)
            owner = None if client is None else client.resource
        return stored if asking.sees(stored.resource, shapes.tenant_of(stored.resource, owner)) else None

    async def _require(self, asking: Administrator, key: shapes.Key) -> Stored:
        found = await self._find(asking, key)
        if found is None:
            there_is_no(key)
        if key in shapes.BUILT_IN:
            raise StateConflict(
                f"The {shapes.named(key)} is built in and cannot be changed.",
                hint="Make one of your own, with another id.",
            )
        return found

    async def _after(self, asking: Administrator, wanted: Wanted, after_id: str, limit: int) -> list[Stored]:
        tenants = asking.tenants
        if wanted.tenant_id:
            tenants = frozenset({wanted.tenant_id} & (tenants or {wanted.tenant_id}))
        elif tenants is not None and wanted.kind in (Kind.PLAN, Kind.ROLE):
            return await self._seen(asking, wanted, after_id, limit)
        is_hidden = wanted.kind is Kind.IDENTITY_PROVIDER and not asking.is_admin
        if is_hidden or (tenants is not None and not tenants):
            return []
        filter_ = Filter(tenants, wanted.client_id, wanted.prefix)
        return list(await self._store.list(wanted.kind, filter_, limit=limit, after_id=after_id))

    async def _seen(self, asking: Administrator, wanted: Wanted, after_id: str, limit: int) -> list[Stored]:
        """What belongs to the deployment and may be used by all, beside one's own: no filter says that."""
        filter_ = Filter(None, wanted.client_id, wanted.prefix)
        found: list[Stored] = []
        async for stored in every(self._store, wanted.kind, filter_):
            key = shapes.key_of(stored.resource)
            if key[1] > after_id and asking.sees(stored.resource, shapes.tenant_of(stored.resource)):
                found.append(stored)
                if len(found) == limit:
                    break
        return found

    async def _replace(self, by: By, asking: Administrator, before: Stored, after: Resource) -> Stored:
        now = self._clock.now()
        changes = Changeset(self._store, asking, now)
        changes.plan(before, after)
        if after == before.resource:
            # nothing is written, but who may not change it is told so
            await changes.batch(by.request_id, cut_streams=False)
            return before
        version = await self._commit(by, changes)
        return replace(before, resource=after, version=version, updated_at=now)

    async def _rotate_client(
        self, by: By, asking: Administrator, before: Stored, client: Client, overlap_s: int, now: datetime
    ) -> Made:
        if client.disabled:
            raise StateConflict("The client is disabled.", hint="Enable it first.")
        secret = keys.new_client_secret()
        keeps = overlap_s > 0 and bool(client.secret_digest)
        after = replace(
            client,
            secret_digest=keys.digest(secret),
            old_secret_digest=client.secret_digest if keeps else b"",
            old_secret_until=now + timedelta(seconds=overlap_s) if keeps else None,
        )
        changes = Changeset(self._store, asking, now)
        changes.plan(before, after, "secret rotated")
        refused = []
        if not overlap_s:
            refused = [
                revoking.revocation(
                    RevocationKind.CLIENT, client.client_id, now, cut_streams=self._cuts_streams
                )
            ]
        version = await self._commit(by, changes, revocations=refused)
        return Made(replace(before, resource=after, version=version, updated_at=now), secret)

    async def _rotate_key(
        self, by: By, asking: Administrator, before: Stored, key: ApiKey, overlap_s: int, now: datetime
    ) -> Made:
        if key.disabled or (key.expires_at is not None and key.expires_at <= now):
            raise StateConflict("The key is disabled or has expired.", hint="Make a new one.")
        text = keys.new_api_key()
        parsed = keys.parse_api_key(text)
        expires_at = None if key.expires_at is None else now + (key.expires_at - before.created_at)
        fresh = replace(
            key, key_id=keys.new_key_id(), prefix=parsed.prefix, digest=parsed.digest, expires_at=expires_at
        )
        end = now + timedelta(seconds=overlap_s)
        old = replace(key, disabled=True)
        if overlap_s:
            old = replace(key, expires_at=end if key.expires_at is None else min(end, key.expires_at))
        changes = Changeset(self._store, asking, now)
        changes.plan(None, fresh, f"in the place of {key.key_id}")
        changes.plan(before, old, f"rotated: {fresh.key_id}")
        # Its tokens live on while it does itself: only its end was moved.
        batch = await changes.batch(by.request_id, cut_streams=self._cuts_streams, replaces_own_key=True)
        if overlap_s:
            batch = replace(batch, revocations=())
        version = await self._store.commit(batch)
        return Made(Stored(fresh, version, now, now), text)

    async def _commit(
        self,
        by: By,
        changes: Changeset,
        *,
        cut_streams: bool | None = None,
        revocations: list[NewRevocation] | None = None,
    ) -> int:
        cut = self._cuts_streams if cut_streams is None else cut_streams
        batch = await changes.batch(by.request_id, cut_streams=cut, revocations=revocations)
        return await self._store.commit(batch)

    async def _require_version(self, key: shapes.Key, before: Stored, expected: int | None) -> None:
        if expected is not None and expected != before.version:
            await self._conflict(key)

    async def _conflict(self, key: shapes.Key) -> NoReturn:
        last = await self._store.changes(kind=key[0], resource_id=key[1], limit=1)
        who = f" by {last[0].actor} at {last[0].at:%Y-%m-%d %H:%M:%S} UTC" if last else ""
        raise Conflict(
            f"The {shapes.named(key)} was changed{who}, after you read it.",
            hint="Read it again, and make your change to what it is now.",
        )


def _require_made_here(resource: Resource) -> None:
    """Raises RequestInvalid where a new resource comes with what only `apply` or a token exchange sets."""
    names = []
    if isinstance(resource, Client) and resource.external_subject:
        names.append(("client.external_subject", "is set by token exchange only"))
    if isinstance(resource, Client) and resource.secret_digest:
        names.append(("client.secret_sha256", "is set by ApplyConfiguration only"))
    if isinstance(resource, ApiKey) and resource.digest:
        names.append(("api_key.secret_sha256", "is set by ApplyConfiguration only"))
    if names:
        violations = [Violation(f"resource.{name}", description) for name, description in names]
        raise RequestInvalid(
            f"It cannot be made so: {violations[0].field} {violations[0].description}.", violations=violations
        )


def _with_secret(resource: Resource, *, without_secret: bool) -> tuple[Resource, str]:
    match resource:
        case Client() if not without_secret:
            secret = keys.new_client_secret()
            return replace(resource, secret_digest=keys.digest(secret)), secret
        case ApiKey():
            text = keys.new_api_key()
            parsed = keys.parse_api_key(text)
            key_id = resource.key_id or keys.new_key_id()
            return replace(resource, key_id=key_id, prefix=parsed.prefix, digest=parsed.digest), text
        case _:
            return resource, ""


def _wrong_kind(key: shapes.Key, wanted: str) -> RequestInvalid:
    return RequestInvalid(
        f"This is for {wanted}, not for a {shapes.NAMES[key[0]]}.",
        violations=[Violation("name.kind", f"must be {wanted}")],
    )
