"""The tables, as the newest migration leaves them.

A resource is one row of `resources`: its body is JSON (`codec`), and what is searched for stands in columns
beside it. `resource_references` says what needs what, so that the database too refuses a row without what it
refers to. Texts are compared by code points on both databases. All moments are microseconds since 1970.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql

metadata = MetaData()
_TEXT = Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")

state = Table(
    "state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
    Column("policy_version", BigInteger, nullable=False),
)
"""One row, with the id 1. Whoever writes holds it until the end: so versions appear in their order."""

resources = Table(
    "resources",
    metadata,
    Column("kind", _TEXT, primary_key=True),
    Column("id", _TEXT, primary_key=True),
    Column("tenant_id", _TEXT, nullable=False),  # empty: it belongs to the deployment
    Column("client_id", _TEXT, nullable=False),  # that it is, or is of; else empty
    Column("parent_id", _TEXT, nullable=False),  # of a tenant; else empty
    Column("lookup", _TEXT),  # a second name: a key's prefix, a provider's issuer
    Column("body", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("updated_us", BigInteger, nullable=False),
    Column("last_used_us", BigInteger),
    UniqueConstraint("kind", "lookup", name="resources_lookup"),
)
Index("resources_of_tenant", resources.c.kind, resources.c.tenant_id, resources.c.id)
Index("resources_of_client", resources.c.kind, resources.c.client_id, resources.c.id)

references = Table(
    "resource_references",
    metadata,
    Column("from_kind", _TEXT, primary_key=True),
    Column("from_id", _TEXT, primary_key=True),
    Column("to_kind", _TEXT, primary_key=True),
    Column("to_id", _TEXT, primary_key=True),
    ForeignKeyConstraint(["from_kind", "from_id"], ["resources.kind", "resources.id"]),
    ForeignKeyConstraint(["to_kind", "to_id"], ["resources.kind", "resources.id"]),
)
Index("resource_references_to", references.c.to_kind, references.c.to_id)

changes = Table(
    "changes",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("at_us", BigInteger, nullable=False),
    Column("actor", _TEXT, nullable=False),
    Column("request_id", _TEXT, nullable=False),
    Column("kind", _TEXT, nullable=False),
    Column("resource_id", _TEXT, nullable=False),
    Column("tenant_id", _TEXT, nullable=False),
    Column("before", Text),
    Column("after", Text),
    Column("note", Text, nullable=False),
)
Index("changes_of_resource", changes.c.kind, changes.c.resource_id, changes.c.version, changes.c.position)
Index("changes_of_tenant", changes.c.tenant_id, changes.c.version, changes.c.position)

revocations = Table(
    "revocations",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("kind", Integer, nullable=False),
    Column("subject_id", _TEXT, nullable=False),
    Column("revoked_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
    Column("cut_streams", Boolean, nullable=False),
)
Index("revocations_expiry", revocations.c.expires_us)

used_ids = Table(
    "used_ids",
    metadata,
    Column("token_id", _TEXT, primary_key=True),  # its SHA-256, in hexadecimal
    Column("until_us", BigInteger, nullable=False),
)
Index("used_ids_expiry", used_ids.c.until_us)

signing_keys = Table(
    "signing_keys",
    metadata,
    Column("kid", _TEXT, primary_key=True),
    Column("position", BigInteger, nullable=False, unique=True),
    Column("private", LargeBinary, nullable=False),
    Column("sealed", Boolean, nullable=False),
    Column("signs_from_us", BigInteger, nullable=False),
)
