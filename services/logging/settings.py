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

    schedule_file: Path | None = None
    """The schedule of jobs; not set: schedule.db in `state_dir`."""
    max_jobs: int = Field(default=1_000_000, ge=1, le=100_000_000)
    """Jobs in the schedule, ended ones too; beyond, what comes waits in Kafka."""
    max_jobs_per_tenant: int = Field(default=100_000, ge=1, le=100_000_000)
    """That wait or run; one more is given up as it comes."""
    max_dead_letters_per_tenant: int = Field(default=10_000, ge=1, le=10_000_000)
    """The oldest are forgotten beyond that."""
    dead_letter_ttl_s: float = Field(default=14 * 86_400, gt=0, le=365 * 86_400)
    """A dead letter that is neither replayed nor discarded is forgotten after so long."""
    max_result_ttl_s: float = Field(default=30 * 86_400, gt=0, le=365 * 86_400)
    """No result is kept for longer, whatever its caller asked for."""
    first_backoff_s: PositiveSeconds = 1
    """After a job's first failed attempt; doubled for each further one, times 0.5 to 1 by chance."""
    max_backoff_s: PositiveSeconds = 300
    min_lease_s: PositiveSeconds = 5
    max_lease_s: PositiveSeconds = 600
    """What workers may ask for lies between them."""
    lease_grace_s: PositiveSeconds = 30
    """After a start no lease ends for so long: workers that still run their jobs get to say so first."""
    max_job_watchers: int = Field(default=1000, ge=1, le=100_000)
    """How many may watch jobs, or wait for one to be known, at a time."""

    @property
    def db_path(self) -> Path:
        return self.db_file or self.state_dir / "audit.db"

    @property
    def schedule_path(self) -> Path:
        return self.schedule_file or self.state_dir / "schedule.db"
