"""One commit on a database: lock, load what the batch touches, decide by `rules`, write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from sqlalchemy import Table, and_, bindparam, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.ext.asyncio import AsyncConnection

from services.auth.store import ApiKey, Batch, Client, Kind, Stored
from services.auth.stores import rules, sql_rows, tables
from services.auth.stores.shapes import Key, tenant_of
from services.mesh.errors import AlreadyExists, DataCorrupt

_CHUNK = 500
"""So many ids in one query."""
_R = tables.resources.c
_REF = tables.references.c


async def lock(connection: AsyncConnection) -> tuple[int, int]:
    """The version and that of the policy; nobody else writes until the transaction ends."""
    query = select(tables.state.c.version, tables.state.c.policy_version).with_for_update()
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise DataCorrupt("The store of auth is damaged: it has no version.")
    return row.version, row.policy_version


async def commit(connection: AsyncConnection, batch: Batch) -> int:
    """See `Store.commit`."""
    touched = rules.Touched.by(batch)
    version, policy_version = await lock(connection)
    if batch.only_if_empty and not await is_empty(connection):
        raise AlreadyExists("The store is not empty.")
    before = await _load(connection, touched, len(batch.writes))
    outcome = rules.plan(batch, before, version)
    if outcome.version == version:
        return version
    await _write(connection, outcome, before)
    revoked = [
        sql_rows.revocation_row(outcome.version, position, one)
        for position, one in enumerate(batch.revocations)
    ]
    await _insert(connection, tables.revocations, revoked)
    await connection.execute(
        tables.state.update().values(
            version=outcome.version,
            policy_version=outcome.version if outcome.changes_policy else policy_version,
        )
    )
    return outcome.version


async def is_empty(connection: AsyncConnection) -> bool:
    """Whether there is no tenant."""
    query = select(_R.id).where(_R.kind == Kind.TENANT.value).limit(1)
    return (await connection.execute(query)).first() is None


def upsert(connection: AsyncConnection, table: Table) -> Any:
    """An INSERT that can say what happens on a conflict; each dialect has a class of its own for that."""
    return (sqlite_insert if connection.dialect.name == "sqlite" else postgresql_insert)(table)


async def _load(connection: AsyncConnection, touched: rules.Touched, writes: int) -> rules.Snapshot:
    before = rules.Snapshot()
    await _load_resources(connection, touched.keys, before)
    for kind, names in _by_kind(touched.lookups):
        for some in _chunks(names):
            query = select(_R.lookup, _R.id).where(_R.kind == kind.value, _R.lookup.in_(some))
            for name, resource_id in await connection.execute(query):
                before.holders[kind, name] = resource_id
    for kind, resource_id in sorted(touched.referred):
        if kind is Kind.CLIENT:
            await _load_keys_of(connection, resource_id, before)
            continue
        # tenants first: whether there is a project must be seen, however many others there are
        query = (
            select(_REF.from_kind, _REF.from_id)
            .where(_REF.to_kind == kind.value, _REF.to_id == resource_id)
            .order_by(_REF.from_kind != Kind.TENANT.value)
            .limit(writes + 1)
        )
        before.referrers[kind, resource_id] = {
            (sql_rows.kind_of(from_kind), from_id) for from_kind, from_id in await connection.execute(query)
        }
    # a change of a key says whose tenant it is
    owners = {
        (Kind.CLIENT, one.resource.client_id)
        for one in before.resources.values()
        if isinstance(one.resource, ApiKey)
    }
    await _load_resources(connection, owners - before.resources.keys(), before)
    return before


async def _load_resources(connection: AsyncConnection, keys: Iterable[Key], before: rules.Snapshot) -> None:
    for kind, ids in _by_kind(keys):
        for some in _chunks(ids):
            query = select(_R.id, *sql_rows.STORED).where(_R.kind == kind.value, _R.id.in_(some))
            for row in await connection.execute(query):
                before.resources[kind, row[0]] = sql_rows.stored(row[1:])


async def _load_keys_of(connection: AsyncConnection, client_id: str, before: rules.Snapshot) -> None:
    query = select(_R.id, *sql_rows.STORED).where(_R.kind == Kind.API_KEY.value, _R.client_id == client_id)
    keys: set[Key] = set()
    for row in await connection.execute(query):
        key = (Kind.API_KEY, row[0])
        before.resources[key] = sql_rows.stored(row[1:])
        keys.add(key)
    before.referrers[Kind.CLIENT, client_id] = keys


async def _write(connection: AsyncConnection, outcome: rules.Outcome, before: rules.Snapshot) -> None:
    touched = [
        {"the_kind": kind.value, "the_id": resource_id}
        for kind, resource_id in sorted(outcome.deleted | outcome.put.keys())
        if (kind, resource_id) in before.resources
    ]
    deleted = [
        {"the_kind": kind.value, "the_id": resource_id}
        for kind, resource_id in sorted(outcome.deleted)
        if (kind, resource_id) in before.resources
    ]
    this = and_(_R.kind == bindparam("the_kind"), _R.id == bindparam("the_id"))
    refers = and_(_REF.from_kind == bindparam("the_kind"), _REF.from_id == bindparam("the_id"))
    if touched:
        await connection.execute(tables.references.delete().where(refers), touched)
        # one may take the prefix that another one gives up
        await connection.execute(tables.resources.update().where(this).values(lookup=None), touched)
    if deleted:
        await connection.execute(tables.resources.delete().where(this), deleted)
    if outcome.put:
        insert = upsert(connection, tables.resources)
        kept = {"kind", "id", "created_us", "last_used_us"}
        insert = insert.on_conflict_do_update(
            index_elements=["kind", "id"],
            set_={name: column for name, column in insert.excluded.items() if name not in kept},
        )
        clients = {key: one.resource for key, one in {**before.resources, **outcome.put}.items()}
        rows = [sql_rows.resource_row(key, one, _tenant_of(one, clients)) for key, one in outcome.put.items()]
        await connection.execute(insert, rows)
        references = [
            row for key, one in outcome.put.items() for row in sql_rows.reference_rows(key, one.resource)
        ]
        await _insert(connection, tables.references, references)
    await _insert(connection, tables.changes, [sql_rows.change_row(change) for change in outcome.changes])


def _tenant_of(one: Stored, clients: dict[Key, Any]) -> str:
    if not isinstance(one.resource, ApiKey):
        return tenant_of(one.resource)
    owner = clients.get((Kind.CLIENT, one.resource.client_id))
    if not isinstance(owner, Client):
        raise DataCorrupt("The store of auth is damaged: a key without its client.")
    return tenant_of(one.resource, owner)


async def _insert(connection: AsyncConnection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        await connection.execute(table.insert(), rows)


def _by_kind(keys: Iterable[tuple[Kind, str]]) -> Iterator[tuple[Kind, list[str]]]:
    for kind, group in groupby(sorted(keys), key=lambda key: key[0]):
        yield kind, [name for _, name in group]


def _chunks(names: list[str]) -> Iterator[list[str]]:
    remaining = iter(names)
    while some := list(islice(remaining, _CHUNK)):
        yield some
