"""Tenants, clients, API keys and signing keys: the file of the first version."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """From nothing."""
    text, blob, flag, big = "TEXT", "BLOB", "INTEGER", "INTEGER"
    without_rowid = " WITHOUT ROWID"
    if op.get_bind().dialect.name == "postgresql":
        text, blob, flag, big = 'TEXT COLLATE "C"', "BYTEA", "INTEGER", "BIGINT"
        without_rowid = ""
    op.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
    op.execute("INSERT INTO schema_version VALUES (1)")
    op.execute(f"CREATE TABLE tenants (tenant_id {text} PRIMARY KEY, created_us {big} NOT NULL)")
    op.execute(
        f"CREATE TABLE clients (client_id {text} PRIMARY KEY, tenant_id {text} NOT NULL REFERENCES tenants, "
        f"secret_digest {blob} NOT NULL, created_us {big} NOT NULL)"
    )
    op.execute(
        f"CREATE TABLE client_scopes (client_id {text} NOT NULL REFERENCES clients, scope {text} NOT NULL, "
        f"PRIMARY KEY (client_id, scope)){without_rowid}"
    )
    op.execute(
        f"CREATE TABLE api_keys (key_id {text} PRIMARY KEY, client_id {text} NOT NULL REFERENCES clients, "
        f"prefix {text} NOT NULL UNIQUE, digest {blob} NOT NULL, created_us {big} NOT NULL, expires_us {big})"
    )
    op.execute(
        f"CREATE TABLE api_key_scopes (key_id {text} NOT NULL REFERENCES api_keys, scope {text} NOT NULL, "
        f"PRIMARY KEY (key_id, scope)){without_rowid}"
    )
    op.execute(
        f"CREATE TABLE signing_keys (kid {text} PRIMARY KEY, private {blob} NOT NULL, "
        f"sealed {flag} NOT NULL, signs_from_us {big} NOT NULL)"
    )


def downgrade() -> None:
    """To nothing."""
    for table in ("api_key_scopes", "api_keys", "client_scopes", "clients", "tenants", "signing_keys"):
        op.drop_table(table)
    op.drop_table("schema_version")
