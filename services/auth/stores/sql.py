"""The store of auth in a database: one SQLite file, or PostgreSQL for several auth processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, and_, bindparam, or_, select

from services.auth.store import (
    ApiKey,
    Batch,
    Change,
    Filter,
    IdentityProvider,
    Kind,
    Owned,
    Resource,
    Revocation,
    SigningKey,
    Stored,
)
from services.auth.stores import rules, sql_commit, sql_rows, tables
from services.auth.stores.codec import decode, to_us
from services.auth.stores.database import Database, Unchanged
from services.auth.stores.migrating import migrate
from services.auth.stores.shapes import OF_POLICY, Key, is_text
from services.auth.stores.sql_rows import AnyRow
from services.mesh.errors import DataCorrupt
from services.mesh.policy import PolicyDocument

_R = tables.resources.c
_CLIENT = tables.resources.alias("client")
_TENANT = tables.resources.alias("tenant")
_ABOVE = tables.resources.alias("above")
_OWNED = (
    _CLIENT.join(_TENANT, and_(_TENANT.c.kind == Kind.TENANT.value, _TENANT.c.id == _CLIENT.c.tenant_id))
).outerjoin(_ABOVE, and_(_ABOVE.c.kind == Kind.TENANT.value, _ABOVE.c.id == _TENANT.c.parent_id))
_BODIES = (_CLIENT.c.body, _TENANT.c.body, _ABOVE.c.body)


class SqlStore:
    """A component: `start` brings the database to this version, `stop` closes it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # What is asked again and again, to hear of what other processes did.
        self._version = Unchanged(database, self._read_version)
        self._signing_keys = Unchanged(database, self._read_signing_keys)

    async def start(self) -> None:
        """Raises StartError where the database cannot be used as it is."""
        await migrate(self._database)

    async def stop(self) -> None:
        await self._database.close()

    async def is_empty(self) -> bool:
        async with self._database.read_once() as connection:
            return await sql_commit.is_empty(connection)

    async def commit(self, batch: Batch) -> int:
        async with self._database.write() as connection:
            return await sql_commit.commit(connection, batch)

    async def get(self, kind: Kind, resource_id: str) -> Stored | None:
        if not is_text(resource_id):
            return None
        query = select(*sql_rows.STORED).where(_R.kind == kind.value, _R.id == resource_id)
        row = await self._first(query)
        return None if row is None else sql_rows.stored(row)

    async def list(self, kind: Kind, filter_: Filter, *, limit: int, after_id: str = "") -> Sequence[Stored]:
        if not all(map(is_text, (after_id, filter_.client_id, filter_.prefix))):
            return []
        query = select(*sql_rows.STORED).where(_R.kind == kind.value, _R.id > after_id)
        if filter_.tenant_ids is not None:
            query = query.where(_R.tenant_id.in_(_storable(filter_.tenant_ids - {""})))
        if filter_.client_id:
            query = query.where(_R.client_id == filter_.client_id)
        if filter_.prefix:
            query = query.where(_R.lookup == filter_.prefix, _R.kind == Kind.API_KEY.value)
        return [sql_rows.stored(row) for row in await self._all(query.order_by(_R.id).limit(limit))]

    async def find_client(self, client_id: str) -> Owned | None:
        if not is_text(client_id):
            return None
        query = (
            select(*_BODIES)
            .select_from(_OWNED)
            .where(_CLIENT.c.kind == Kind.CLIENT.value, _CLIENT.c.id == client_id)
        )
        row = await self._first(query)
        return None if row is None else _owned(*row)

    async def find_api_key(self, prefix: str) -> tuple[ApiKey, Owned] | None:
        if not is_text(prefix):
            return None
        joined = tables.resources.join(
            _OWNED, and_(_CLIENT.c.kind == Kind.CLIENT.value, _CLIENT.c.id == _R.client_id)
        )
        query = (
            select(_R.body, *_BODIES)
            .select_from(joined)
            .where(_R.kind == Kind.API_KEY.value, _R.lookup == prefix)
        )
        row = await self._first(query)
        if row is None:
            return None
        key = decode(Kind.API_KEY, row[0])
        if not isinstance(key, ApiKey):
            raise DataCorrupt("The store of auth is damaged.")
        return key, _owned(*row[1:])

    async def find_provider(self, issuer: str) -> IdentityProvider | None:
        if not is_text(issuer):
            return None
        kind = Kind.IDENTITY_PROVIDER
        row = await self._first(select(_R.body).where(_R.kind == kind.value, _R.lookup == issuer))
        found = None if row is None else decode(kind, row[0])
        return found if isinstance(found, IdentityProvider) else None

    async def used(self, last_used: Mapping[str, datetime]) -> None:
        values = [{"the_id": key_id, "at": to_us(at)} for key_id, at in last_used.items() if is_text(key_id)]
        if not values:
            return
        later = or_(_R.last_used_us.is_(None), _R.last_used_us < bindparam("at"))
        update = (
            tables.resources.update()
            .where(_R.kind == Kind.API_KEY.value, _R.id == bindparam("the_id"), later)
            .values(last_used_us=bindparam("at"))
        )
        async with self._database.write() as connection:
            await sql_commit.lock(connection)  # else two that update in another order wait for each other
            await connection.execute(update, values)

    async def version(self) -> int:
        return await self._version.read()

    async def _read_version(self) -> int:
        return int((await self._the_only(select(tables.state.c.version)))[0])

    async def policy(self) -> tuple[int, PolicyDocument]:
        query = select(_R.kind, _R.id, _R.body).where(_R.kind.in_(sorted(kind.value for kind in OF_POLICY)))
        async with self._database.read() as connection:  # one state of the database for both
            version = (await connection.execute(select(tables.state.c.policy_version))).scalar()
            rows = (await connection.execute(query)).all()
        if version is None:
            raise DataCorrupt("The store of auth is damaged: it has no version.")
        held: dict[Key, Resource] = {}
        for text, resource_id, body in rows:
            kind = sql_rows.kind_of(text)
            held[kind, resource_id] = decode(kind, body)
        return version, rules.document(held)

    async def revocations(self, *, after_version: int, now: datetime) -> Sequence[Revocation]:
        table = tables.revocations
        query = (
            select(table)
            .where(table.c.version > after_version, table.c.expires_us > to_us(now))
            .order_by(table.c.version, table.c.position)
        )
        return [sql_rows.revocation(row) for row in await self._all(query)]

    async def changes(
        self,
        *,
        kind: Kind | None = None,
        resource_id: str = "",
        tenant_ids: frozenset[str] | None = None,
        before: tuple[int, int] | None = None,
        limit: int,
    ) -> Sequence[Change]:
        if not is_text(resource_id):
            return []
        columns = tables.changes.c
        query = select(tables.changes)
        if kind is not None:
            query = query.where(columns.kind == kind.value)
        if resource_id:
            query = query.where(columns.resource_id == resource_id)
        if tenant_ids is not None:
            query = query.where(columns.tenant_id.in_(_storable(tenant_ids)))
        if before is not None:
            earlier = and_(columns.version == before[0], columns.position < before[1])
            query = query.where(or_(columns.version < before[0], earlier))
        query = query.order_by(columns.version.desc(), columns.position.desc()).limit(limit)
        return [sql_rows.change(row) for row in await self._all(query)]

    async def use_once(self, token_id: str, *, until: datetime, now: datetime) -> bool:
        if not is_text(token_id):
            return False
        # an id is chosen by who signs it, and may be longer than an index takes
        digest = hashlib.sha256(token_id.encode()).hexdigest()
        async with self._database.write() as connection:
            insert = sql_commit.upsert(connection, tables.used_ids)
            insert = insert.values(token_id=digest, until_us=to_us(until)).on_conflict_do_update(
                index_elements=["token_id"],
                set_={"until_us": insert.excluded.until_us},
                where=tables.used_ids.c.until_us <= to_us(now),
            )
            return (
                await connection.execute(insert.returning(tables.used_ids.c.token_id))
            ).first() is not None

    async def prune(self, now: datetime) -> None:
        async with self._database.write() as connection:
            for table, until_us in (
                (tables.revocations, tables.revocations.c.expires_us),
                (tables.used_ids, tables.used_ids.c.until_us),
            ):
                await connection.execute(table.delete().where(until_us <= to_us(now)))

    async def signing_keys(self) -> Sequence[SigningKey]:
        return await self._signing_keys.read()

    async def _read_signing_keys(self) -> Sequence[SigningKey]:
        rows = await self._all(select(tables.signing_keys).order_by(tables.signing_keys.c.position))
        return [sql_rows.signing_key(row) for row in rows]

    async def add_signing_key(self, key: SigningKey, *, after_kid: str) -> bool:
        table = tables.signing_keys
        last = select(table.c.kid, table.c.position).order_by(table.c.position.desc()).limit(1)
        async with self._database.write() as connection:
            await sql_commit.lock(connection)
            row = (await connection.execute(last)).first()
            if ("" if row is None else row.kid) != after_kid:
                return False
            values = _signing_values(key) | {
                "kid": key.kid,
                "position": 0 if row is None else row.position + 1,
            }
            await connection.execute(table.insert(), [values])
            return True

    async def replace_signing_key(self, key: SigningKey) -> None:
        table = tables.signing_keys
        async with self._database.write() as connection:
            await connection.execute(
                table.update().where(table.c.kid == key.kid).values(**_signing_values(key))
            )

    async def delete_signing_key(self, kid: str) -> None:
        table = tables.signing_keys
        if is_text(kid):
            async with self._database.write() as connection:
                await connection.execute(table.delete().where(table.c.kid == kid))

    async def _all(self, query: Select[*tuple[Any, ...]]) -> Sequence[AnyRow]:
        async with self._database.read_once() as connection:
            return (await connection.execute(query)).all()

    async def _first(self, query: Select[*tuple[Any, ...]]) -> AnyRow | None:
        async with self._database.read_once() as connection:
            return (await connection.execute(query)).first()

    async def _the_only(self, query: Select[*tuple[Any, ...]]) -> AnyRow:
        row = await self._first(query)
        if row is None:
            raise DataCorrupt("The store of auth is damaged: it has no version.")
        return row


def _owned(client: str, tenant: str, above: str | None) -> Owned:
    return Owned(
        sql_rows.client(client), sql_rows.tenant(tenant), None if above is None else sql_rows.tenant(above)
    )


def _storable(texts: frozenset[str]) -> list[str]:
    return sorted(filter(is_text, texts))


def _signing_values(key: SigningKey) -> dict[str, object]:
    return {"private": key.private, "sealed": key.sealed, "signs_from_us": to_us(key.signs_from)}
