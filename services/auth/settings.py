"""What the auth service is told, by variables that begin with `LLMOS_AUTH_`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.auth.signing import RETIRE_MARGIN_S
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
    admin_key_file: Path | None = None
    """Where the first start writes the administrator's key; not set: admin-key in `state_dir`."""
    key_encryption_key_file: Path | None = None
    """Holds 32 bytes in base64, which signing keys are encrypted with in the database; not set: they are
    protected by the file's mode alone."""
    access_token_ttl_s: int = Field(default=300, ge=10, le=MAX_LIFETIME_S)
    """How long a token lives."""
    signing_key_rotation_s: int = Field(default=30 * DAY_S, ge=1, le=3650 * DAY_S)
    """How long a key signs."""
    signing_key_publish_ahead_s: float = Field(default=3600, gt=0, le=30 * DAY_S)
    """How long a key is published before it signs; longer than verifiers keep a key set (60 s)."""

    @model_validator(mode="after")
    def _rotation(self) -> AuthSettings:
        if self.signing_key_publish_ahead_s >= self.signing_key_rotation_s:
            raise ValueError("signing_key_publish_ahead_s must be shorter than signing_key_rotation_s")
        published_s = self.access_token_ttl_s + RETIRE_MARGIN_S + self.signing_key_publish_ahead_s
        if published_s / self.signing_key_rotation_s + 4 > MAX_KEYS:
            raise ValueError(
                f"signing_key_rotation_s is too short: more than {MAX_KEYS} keys would be published at a time"
            )
        return self

    @property
    def db_path(self) -> Path:
        return self.db_file or self.state_dir / "auth.db"

    @property
    def admin_key_path(self) -> Path:
        return self.admin_key_file or self.state_dir / "admin-key"
