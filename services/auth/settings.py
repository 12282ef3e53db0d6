"""What the auth service is told, by variables that begin with `LLMOS_AUTH_`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from services.auth.signing.ring import RETIRE_MARGIN_S
from services.mesh.access_token import MAX_LIFETIME_S
from services.mesh.jwks import MAX_KEYS
from services.mesh.settings import Port, ServiceSettings

DAY_S = 86_400


class AuthSettings(ServiceSettings):
    """Settings of the auth service."""

    model_config = SettingsConfigDict(
        env_prefix="LLMOS_AUTH_", frozen=True, extra="forbid", env_ignore_empty=True
    )
    service: ClassVar[str] = "auth"

    grpc_port: Port = 50051
    metrics_port: Port = 51051
    state_dir: Path = Path(".state/auth")
    service_secrets_dir: Path
    """The secrets of the services: files named gateway, inference, logging and auth, which this service
    checks their requests for tokens against."""
    service_secret_file: Path = Path("/dev/null")
    """Not read: this service knows its own secret from `service_secrets_dir`."""
    db_file: Path | None = None
    """The database; not set: auth.db in `state_dir`."""
    db_url: SecretStr | None = None
    """A PostgreSQL database that any number of auth processes share, instead of the file:
    `postgresql://user@host:5432/database`. Beyond loopback its certificate is checked, unless the URL says
    `?ssl=disable`."""
    db_ca_file: Path | None = None
    """Certificates that the database's is checked by; not set: those of the system."""
    db_password_file: Path | None = None
    """Holds the password for `db_url`, where that has none."""
    db_pool_size: int = Field(default=8, ge=1, le=256)
    """So many connections at most to `db_url`."""
    admin_key_file: Path | None = None
    """Where the first start writes the administrator's key; not set: admin-key in `state_dir`."""
    key_encryption_key_file: Path | None = None
    """Holds 32 bytes in base64, which signing keys are encrypted with in the database; not set, and no
    `key_encryption_key_env`: they are protected by the file's mode alone."""
    key_encryption_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """The name of an environment variable that holds the same, instead of the file."""
    key_encryption_kms_socket: Path | None = None
    """Where a KMS v2 plugin of Kubernetes listens, which holds the key instead of this process."""
    public_url: str = ""
    """Where clients find the gateway's HTTP, such as `https://api.example`; empty: at `issuer`. The token
    endpoint below it is an audience that clients may sign their assertions for (RFC 7523)."""
    provider_ca_file: Path | None = None
    """Authorities that certificates of identity providers may be from, besides the public ones."""
    free_failures: int = Field(default=10, ge=1)
    """So many wrong credentials from one address, or for one name, slow nobody down; more do, and one is
    forgiven every minute. Not for what comes through the gateway, which counts itself."""
    access_token_ttl_s: int = Field(default=300, ge=10, le=MAX_LIFETIME_S)
    """How long a caller's token lives."""
    service_token_ttl_s: int = Field(default=900, ge=10, le=MAX_LIFETIME_S)
    """How long a service's own token lives. They are renewed at two thirds of it: three times a caller's, so
    that without auth no service is shut out before the callers that it knows."""
    revocation_cuts_streams: bool = False
    """Whether what an administrator disables or deletes also ends its running streams; a `Revoke` says so
    itself."""
    signing_key_rotation_s: int = Field(default=30 * DAY_S, ge=1, le=3650 * DAY_S)
    """How long a key signs."""
    signing_key_publish_ahead_s: float = Field(default=3600, gt=0, le=30 * DAY_S)
    """How long a key is published before it signs; longer than verifiers keep a key set (60 s)."""

    @model_validator(mode="after")
    def _one_of_each(self) -> AuthSettings:
        if self.db_url is not None and self.db_file is not None:
            raise ValueError("db_url and db_file exclude each other: set one")
        ways = (
            self.key_encryption_key_file,
            self.key_encryption_key_env,
            self.key_encryption_kms_socket,
        )
        if sum(way is not None for way in ways) > 1:
            raise ValueError(
                "key_encryption_key_file, key_encryption_key_env and key_encryption_kms_socket exclude each "
                "other: set one"
            )
        return self

    @model_validator(mode="after")
    def _rotation(self) -> AuthSettings:
        if self.signing_key_publish_ahead_s >= self.signing_key_rotation_s:
            raise ValueError("signing_key_publish_ahead_s must be shorter than signing_key_rotation_s")
        published_s = self.longest_token_ttl_s + RETIRE_MARGIN_S + self.signing_key_publish_ahead_s
        if published_s / self.signing_key_rotation_s + 4 > MAX_KEYS:
            raise ValueError(
                f"signing_key_rotation_s is too short: more than {MAX_KEYS} keys would be published at a time"
            )
        return self

    @property
    def longest_token_ttl_s(self) -> int:
        return max(self.access_token_ttl_s, self.service_token_ttl_s)

    @property
    def key_encryption_key(self) -> SecretStr | None:
        """What the environment variable of `key_encryption_key_env` holds, if it is set."""
        value = os.environ.get(self.key_encryption_key_env) if self.key_encryption_key_env else None
        return None if value is None else SecretStr(value)

    @property
    def token_endpoint(self) -> str:
        return f"{(self.public_url or self.issuer).rstrip('/')}/oauth2/token"

    @property
    def db_path(self) -> Path:
        return self.db_file or self.state_dir / "auth.db"

    @property
    def admin_key_path(self) -> Path:
        return self.admin_key_file or self.state_dir / "admin-key"
