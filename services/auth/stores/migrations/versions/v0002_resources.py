"""Resources with versions, changes and revocations, instead of a table for each kind.

Down again, what the first version cannot express is left out, always so that nobody can do more than before:
disabled clients and keys (also those of disabled tenants), keys with limits on models or addresses, and the
scopes of clients that hold other roles than the built-in ones.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ROLES = {
    "admin": {"generate", "models.read", "audit.read", "admin"},
    "tenant-admin": {"generate", "models.read", "audit.read"},
    "user": {"generate", "models.read"},
    "auditor": {"audit.read"},
}
"""The built-in roles, by the scopes that the first version knows."""
_OLD = ("api_key_scopes", "api_keys", "client_scopes", "clients", "tenants")
_NEW = ("resource_references", "resources", "changes", "revocations", "used_ids", "state")


def upgrade() -> None:
    """The data of the first version becomes the first commit."""
    db = op.get_bind()
    op.execute("ALTER TABLE signing_keys RENAME TO old_signing_keys")
    _create()
    rows = [*_tenants(db), *_clients(db), *_keys(db)]
    for resource, refers_to in rows:
        db.execute(_RESOURCES.insert(), [resource])
        for kind, resource_id in refers_to:
            reference = (resource["kind"], resource["id"], kind, resource_id)
            db.execute(_REFERENCES.insert(), [dict(zip(_REFERENCES.c.keys(), reference, strict=True))])
    version = 1 if rows else 0
    db.execute(_STATE.insert(), [{"id": 1, "version": version, "policy_version": version}])
    old = db.execute(sa.text("SELECT kid, private, sealed, signs_from_us FROM old_signing_keys"))
    for position, key in enumerate(sorted(old.all(), key=lambda key: (key[3], key[0]))):
        values = (key[0], position, bytes(key[1]), bool(key[2]), key[3])
        db.execute(_SIGNING.insert(), [dict(zip(_SIGNING.c.keys(), values, strict=True))])
    for table in (*_OLD, "old_signing_keys"):
        op.drop_table(table)
    # by it, the first version refuses to open what it cannot read
    op.execute("UPDATE schema_version SET version = 2")


def downgrade() -> None:
    """See above for what is left out."""
    db = op.get_bind()
    on_server = db.dialect.name == "postgresql"
    text, blob, big = ('TEXT COLLATE "C"', "BYTEA", "BIGINT") if on_server else ("TEXT", "BLOB", "INTEGER")
    end = "" if on_server else " WITHOUT ROWID"
    signing = db.execute(sa.text("SELECT kid, private, sealed, signs_from_us FROM signing_keys")).all()
    op.drop_table("signing_keys")
    for statement in (
        f"CREATE TABLE tenants (tenant_id {text} PRIMARY KEY, created_us {big} NOT NULL)",
        f"CREATE TABLE clients (client_id {text} PRIMARY KEY, tenant_id {text} NOT NULL REFERENCES tenants, "
        f"secret_digest {blob} NOT NULL, created_us {big} NOT NULL)",
        f"CREATE TABLE client_scopes (client_id {text} NOT NULL REFERENCES clients, scope {text} NOT NULL, "
        f"PRIMARY KEY (client_id, scope)){end}",
        f"CREATE TABLE api_keys (key_id {text} PRIMARY KEY, client_id {text} NOT NULL REFERENCES clients, "
        f"prefix {text} NOT NULL UNIQUE, digest {blob} NOT NULL, created_us {big} NOT NULL, "
        f"expires_us {big})",
        f"CREATE TABLE api_key_scopes (key_id {text} NOT NULL REFERENCES api_keys, scope {text} NOT NULL, "
        f"PRIMARY KEY (key_id, scope)){end}",
        f"CREATE TABLE signing_keys (kid {text} PRIMARY KEY, private {blob} NOT NULL, "
        f"sealed INTEGER NOT NULL, signs_from_us {big} NOT NULL)",
    ):
        op.execute(statement)
    for kid, private, sealed, signs_from_us in signing:
        _insert(db, "signing_keys", kid, bytes(private), int(sealed), signs_from_us)
    disabled: set[str] = set()
    bodies = {tenant_id: body for tenant_id, body, _ in _bodies(db, "tenant")}
    for tenant_id, body, created_us in _bodies(db, "tenant"):
        _insert(db, "tenants", tenant_id, created_us)
        above = bodies.get(body["parent_id"], {})
        if body["disabled"] or above.get("disabled"):
            disabled.add(tenant_id)
    held: dict[str, set[str]] = {}
    for client_id, body, created_us in _bodies(db, "client"):
        if body["disabled"] or body["tenant_id"] in disabled:
            continue
        own: set[str] = set()
        if set(body["roles"]) <= _ROLES.keys():  # other roles may deny something
            own = set(body["scopes"]) & _ROLES["admin"]
            own = own.union(*(_ROLES[role] for role in body["roles"]))
        held[client_id] = own
        _insert(db, "clients", client_id, body["tenant_id"], _bytes(body["secret_digest"]), created_us)
        for scope in sorted(own):
            _insert(db, "client_scopes", client_id, scope)
    for key_id, body, created_us in _bodies(db, "api_key"):
        limited = body["disabled"] or body["models"] or body["addresses"]
        if limited or body["client_id"] not in held:
            continue
        expires_us = None if body["expires_at"] is None else _us(body["expires_at"])
        row = (key_id, body["client_id"], body["prefix"], _bytes(body["digest"]), created_us, expires_us)
        _insert(db, "api_keys", *row)
        wanted = set(body["scopes"]) or held[body["client_id"]]
        for scope in sorted(wanted & held[body["client_id"]]):
            _insert(db, "api_key_scopes", key_id, scope)
    for table in _NEW:
        op.drop_table(table)
    op.execute("UPDATE schema_version SET version = 1")


# -- up --------------------------------------------------------------------------------------------------

_Row = tuple[dict[str, Any], list[tuple[str, str]]]
_TEXT = sa.Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")
_tables = sa.MetaData()


def _table(name: str, *columns: Any) -> sa.Table:
    return sa.Table(name, _tables, *columns)


def _text(name: str, *, primary_key: bool = False, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, _TEXT, primary_key=primary_key, nullable=nullable)


def _big(name: str, *, primary_key: bool = False, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, primary_key=primary_key, nullable=nullable, autoincrement=False)


def _position() -> sa.Column[int]:
    return sa.Column("position", sa.Integer, primary_key=True, autoincrement=False)


_STATE = _table(
    "state",
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    _big("version"),
    _big("policy_version"),
)
_RESOURCES = _table(
    "resources",
    _text("kind", primary_key=True),
    _text("id", primary_key=True),
    _text("tenant_id"),
    _text("client_id"),
    _text("parent_id"),
    _text("lookup", nullable=True),
    sa.Column("body", sa.Text, nullable=False),
    _big("version"),
    _big("created_us"),
    _big("updated_us"),
    _big("last_used_us", nullable=True),
    sa.UniqueConstraint("kind", "lookup", name="resources_lookup"),
    sa.Index("resources_of_tenant", "kind", "tenant_id", "id"),
    sa.Index("resources_of_client", "kind", "client_id", "id"),
)
_REFERENCES = _table(
    "resource_references",
    *(_text(name, primary_key=True) for name in ("from_kind", "from_id", "to_kind", "to_id")),
    sa.ForeignKeyConstraint(["from_kind", "from_id"], ["resources.kind", "resources.id"]),
    sa.ForeignKeyConstraint(["to_kind", "to_id"], ["resources.kind", "resources.id"]),
    sa.Index("resource_references_to", "to_kind", "to_id"),
)
_table(
    "changes",
    _big("version", primary_key=True),
    _position(),
    _big("at_us"),
    *(_text(name) for name in ("actor", "request_id", "kind", "resource_id", "tenant_id")),
    sa.Column("before", sa.Text),
    sa.Column("after", sa.Text),
    sa.Column("note", sa.Text, nullable=False),
    sa.Index("changes_of_resource", "kind", "resource_id", "version", "position"),
    sa.Index("changes_of_tenant", "tenant_id", "version", "position"),
)
_table(
    "revocations",
    _big("version", primary_key=True),
    _position(),
    sa.Column("kind", sa.Integer, nullable=False),
    _text("subject_id"),
    _big("revoked_us"),
    _big("expires_us"),
    sa.Column("cut_streams", sa.Boolean, nullable=False),
    sa.Index("revocations_expiry", "expires_us"),
)
_table(
    "used_ids",
    _text("token_id", primary_key=True),
    _big("until_us"),
    sa.Index("used_ids_expiry", "until_us"),
)
_SIGNING = _table(
    "signing_keys",
    _text("kid", primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False, unique=True),
    sa.Column("private", sa.LargeBinary, nullable=False),
    sa.Column("sealed", sa.Boolean, nullable=False),
    _big("signs_from_us"),
)


def _create() -> None:
    _tables.create_all(op.get_bind(), checkfirst=False)


def _resource(
    kind: str, resource_id: str, created_us: int, body: dict[str, Any], **columns: str
) -> dict[str, Any]:
    return {
        "kind": kind,
        "id": resource_id,
        "tenant_id": "",
        "client_id": "",
        "parent_id": "",
        "lookup": None,
        "body": json.dumps([body], separators=(",", ":"), ensure_ascii=False),
        "version": 1,
        "created_us": created_us,
        "updated_us": created_us,
        "last_used_us": None,
    } | columns


def _tenants(db: sa.Connection) -> Iterator[_Row]:
    for tenant_id, created_us in db.execute(sa.text("SELECT tenant_id, created_us FROM tenants")).all():
        body = {"tenant_id": tenant_id}
        yield _resource("tenant", tenant_id, created_us, body, tenant_id=tenant_id), []


def _clients(db: sa.Connection) -> Iterator[_Row]:
    rows = db.execute(sa.text("SELECT client_id, tenant_id, secret_digest, created_us FROM clients")).all()
    for client_id, tenant_id, digest, created_us in rows:
        body = {
            "client_id": client_id,
            "tenant_id": tenant_id,
            "scopes": _scopes(db, "SELECT scope FROM client_scopes WHERE client_id = :id", client_id),
            "secret_digest": _base64(digest),
        }
        made = _resource("client", client_id, created_us, body, tenant_id=tenant_id, client_id=client_id)
        yield made, [("tenant", tenant_id)]


def _keys(db: sa.Connection) -> Iterator[_Row]:
    rows = db.execute(
        sa.text(
            "SELECT key_id, client_id, prefix, digest, api_keys.created_us, expires_us, tenant_id "
            "FROM api_keys JOIN clients USING (client_id)"
        )
    ).all()
    for key_id, client_id, prefix, digest, created_us, expires_us, tenant_id in rows:
        scopes = _scopes(db, "SELECT scope FROM api_key_scopes WHERE key_id = :id", key_id)
        body = {
            "key_id": key_id,
            "client_id": client_id,
            "prefix": prefix,
            "digest": _base64(digest),
            "scopes": scopes,
            "expires_at": None if expires_us is None else _iso(expires_us),
            # no scopes used to mean that it can do nothing, and means all of its client's now
            "disabled": not scopes,
        }
        owners = {"tenant_id": tenant_id, "client_id": client_id, "lookup": prefix}
        yield _resource("api_key", key_id, created_us, body, **owners), [("client", client_id)]


def _scopes(db: sa.Connection, query: str, resource_id: str) -> list[str]:
    return sorted(db.execute(sa.text(query), {"id": resource_id}).scalars())


# -- down ------------------------------------------------------------------------------------------------


def _bodies(db: sa.Connection, kind: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    query = "SELECT id, body, created_us FROM resources WHERE kind = :kind"
    for resource_id, body, created_us in db.execute(sa.text(query), {"kind": kind}).all():
        yield resource_id, _DEFAULTS[kind] | json.loads(body)[0], created_us


_DEFAULTS: dict[str, dict[str, Any]] = {
    "tenant": {"parent_id": "", "disabled": False},
    "client": {"disabled": False, "roles": [], "scopes": [], "secret_digest": ""},
    "api_key": {"disabled": False, "models": [], "addresses": [], "scopes": [], "expires_at": None},
}


def _insert(db: sa.Connection, table: str, *values: object) -> None:
    names = {f"v{number}": value for number, value in enumerate(values)}
    places = ", ".join(f":{name}" for name in names)
    db.execute(sa.text(f"INSERT INTO {table} VALUES ({places})"), names)  # noqa: S608  of our own names


def _base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode()


def _bytes(value: str) -> bytes:
    return base64.urlsafe_b64decode(value)


def _iso(us: int) -> str:
    return (_EPOCH + timedelta(microseconds=us)).isoformat().replace("+00:00", "Z")


def _us(moment: str) -> int:
    return (datetime.fromisoformat(moment) - _EPOCH) // timedelta(microseconds=1)
