"""Rows of the tables as our own types, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row

from services.auth.store import (
    Change,
    Client,
    Kind,
    NewRevocation,
    Resource,
    Revocation,
    SigningKey,
    Stored,
    Tenant,
)
from services.auth.stores import tables
from services.auth.stores.codec import decode, encode, to_time, to_us
from services.auth.stores.shapes import BUILT_IN, Key, client_of, lookup, references
from services.mesh.errors import DataCorrupt
from services.mesh.policy import RevocationKind

AnyRow = Row[*tuple[Any, ...]]
_R = tables.resources.c
STORED: Sequence[ColumnElement[Any]] = (
    _R.kind,
    _R.body,
    _R.version,
    _R.created_us,
    _R.updated_us,
    _R.last_used_us,
)
"""What `stored` reads."""


def kind_of(text: str) -> Kind:
    """Raises DataCorrupt."""
    try:
        return Kind(text)
    except ValueError:
        raise DataCorrupt("The store of auth is damaged: a kind that does not exist.") from None


def stored(row: Sequence[Any]) -> Stored:
    """Of the columns `STORED`. Raises DataCorrupt."""
    kind, body, version, created_us, updated_us, last_used_us = row
    return Stored(
        decode(kind_of(kind), body),
        version,
        to_time(created_us),
        to_time(updated_us),
        None if last_used_us is None else to_time(last_used_us),
    )


def resource_row(key: Key, one: Stored, tenant_id: str) -> dict[str, object]:
    """Of `resources`; `tenant_id` is that which it belongs to."""
    resource = one.resource
    return {
        "kind": key[0].value,
        "id": key[1],
        "tenant_id": tenant_id,
        "client_id": client_of(resource),
        "parent_id": resource.parent_id if isinstance(resource, Tenant) else "",
        "lookup": lookup(resource),
        "body": encode(key[0], resource),
        "version": one.version,
        "created_us": to_us(one.created_at),
        "updated_us": to_us(one.updated_at),
        "last_used_us": None if one.last_used_at is None else to_us(one.last_used_at),
    }


def reference_rows(key: Key, resource: Resource) -> list[dict[str, str]]:
    """Of `resource_references`. What is built in is not stored, and needs no row."""
    return [
        {"from_kind": key[0].value, "from_id": key[1], "to_kind": kind.value, "to_id": resource_id}
        for kind, resource_id in dict.fromkeys(references(resource))
        if (kind, resource_id) not in BUILT_IN
    ]


def change_row(change: Change) -> dict[str, object]:
    """Of `changes`."""
    return {
        "version": change.version,
        "position": change.index,
        "at_us": to_us(change.at),
        "actor": change.actor,
        "request_id": change.request_id,
        "kind": change.kind.value,
        "resource_id": change.resource_id,
        "tenant_id": change.tenant_id,
        "before": None if change.before is None else encode(change.kind, change.before),
        "after": None if change.after is None else encode(change.kind, change.after),
        "note": change.note,
    }


def change(row: AnyRow) -> Change:
    """Of a whole row of `changes`. Raises DataCorrupt."""
    kind = kind_of(row.kind)
    return Change(
        version=row.version,
        index=row.position,
        at=to_time(row.at_us),
        actor=row.actor,
        request_id=row.request_id,
        kind=kind,
        resource_id=row.resource_id,
        tenant_id=row.tenant_id,
        before=None if row.before is None else decode(kind, row.before),
        after=None if row.after is None else decode(kind, row.after),
        note=row.note,
    )


def revocation_row(version: int, position: int, revoked: NewRevocation) -> dict[str, object]:
    """Of `revocations`."""
    return {
        "version": version,
        "position": position,
        "kind": revoked.kind.value,
        "subject_id": revoked.subject_id,
        "revoked_us": to_us(revoked.revoked_at),
        "expires_us": to_us(revoked.expires_at),
        "cut_streams": revoked.cut_streams,
    }


def revocation(row: AnyRow) -> Revocation:
    """Of a whole row of `revocations`."""
    return Revocation(
        row.version,
        NewRevocation(
            RevocationKind(row.kind),
            row.subject_id,
            to_time(row.revoked_us),
            to_time(row.expires_us),
            row.cut_streams,
        ),
    )


def signing_key(row: AnyRow) -> SigningKey:
    """Of a whole row of `signing_keys`."""
    return SigningKey(row.kid, bytes(row.private), row.sealed, to_time(row.signs_from_us))


def client(body: str) -> Client:
    """Raises DataCorrupt."""
    found = decode(Kind.CLIENT, body)
    if not isinstance(found, Client):
        raise DataCorrupt("The store of auth is damaged.")
    return found


def tenant(body: str) -> Tenant:
    """Raises DataCorrupt."""
    found = decode(Kind.TENANT, body)
    if not isinstance(found, Tenant):
        raise DataCorrupt("The store of auth is damaged.")
    return found
