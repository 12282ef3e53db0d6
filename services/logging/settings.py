"""What the logging service is told, by variables that begin with `LLMOS_LOGGING_`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.mesh.settings import KafkaSettings, Port, PositiveSeconds


class LoggingSettings(KafkaSettings):
    """Settings of the logging service."""

    model_config = SettingsConfigDict(
        env_prefix="LLMOS_LOGGING_", frozen=True, extra="forbid", env_ignore_empty=True
    )
    service: ClassVar[str] = "logging"

    grpc_port: Port = 50053
    metrics_port: Port = 51053
    state_dir: Path = Path(".state/logging")
    db_file: Path | None = None
    """The audit log; not set: audit.db in `state_dir`."""
    fence_after_s: PositiveSeconds = 600
    """A producer that is silent for so long is dead: its open requests are closed as aborted."""
    stalled_after_s: PositiveSeconds = 30
    """Kafka has events and gives none for so long: not healthy, connect anew."""
    max_tails: int = Field(default=200, ge=1, le=10_000)
    """How many may follow the log at a time."""

    @property
    def db_path(self) -> Path:
        return self.db_file or self.state_dir / "audit.db"
