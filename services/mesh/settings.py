"""Settings: one frozen class per service, read from the environment, and from nowhere else.

A service subclasses `ServiceSettings` with an `env_prefix` of its own, `LLMOS_GATEWAY_` for example; a
variable is the prefix and the field's name in capitals. Secrets are files or `SecretStr`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.mesh.broker import Topic

Port = Annotated[int, Field(ge=0, le=65535)]
PositiveSeconds = Annotated[float, Field(gt=0, le=86_400)]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServiceSettings(BaseSettings):
    """What all four services are told."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)
    service: ClassVar[str]
    """The service's short name, such as `gateway`."""

    listen_host: str = "127.0.0.1"
    """Other than loopback needs TLS, or `allow_plaintext`."""
    allow_plaintext: bool = False
    """Listen beyond loopback without TLS: only where the network encrypts (a service mesh)."""
    grpc_port: Port
    """0 takes a free one; `state_dir`/ports.json tells which."""
    metrics_port: Port
    """Prometheus. 0 takes a free one."""
    probe_port: Port | None = None
    """Where set: a second, plaintext port that serves nothing but gRPC health, for probes that cannot
    present a certificate."""
    instance: str = Field(default="", max_length=64, pattern=r"^[a-z0-9.-]*$")
    """This replica's name; empty: the service's name with `-0`."""
    state_dir: Path
    """Where this process keeps its files."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "text"] = "json"
    otlp_endpoint: str | None = None
    """Where traces and metrics go, such as `http://collector:4317`; not set: nowhere."""
    trace_sample_ratio: float = Field(default=1.0, ge=0, le=1)

    max_concurrent_calls: int = Field(default=1024, ge=1)
    """More than so many calls at once are refused."""
    max_message_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    max_metadata_bytes: int = Field(default=16 * 1024, ge=1024)
    max_call_s: PositiveSeconds = 600
    """The deadline of a call that brings none, and the cap of one that does."""
    write_timeout_s: PositiveSeconds = 30
    """A reader that takes nothing for so long loses its stream."""
    drain_delay_s: float = Field(default=0.5, ge=0, le=300)
    """Between the end of readiness and the end of accepting, so that routers can see it."""
    drain_grace_s: float = Field(default=30, ge=0, le=3600)
    """How long running calls may go on while draining."""

    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_ca_file: Path | None = None
    """All three or none: mTLS on every hop. The files are read again when they change."""
    auth_target: str = "127.0.0.1:50051"
    issuer: str = "https://auth.llmos.internal"
    """The `iss` of tokens; the same in all services."""
    service_secret_file: Path
    """This service's own client secret."""
    jwks_refresh_s: PositiveSeconds = 60
    """Auth's public keys are fetched again when they are so old; auth must publish a key for longer before it
    signs with it (`signing_key_publish_ahead_s`)."""

    @model_validator(mode="after")
    def _combinations(self) -> ServiceSettings:
        files = [self.tls_cert_file, self.tls_key_file, self.tls_ca_file]
        if any(files) and not all(files):
            raise ValueError("tls_cert_file, tls_key_file and tls_ca_file belong together: set all or none")
        if not self.tls and self.listen_host not in LOOPBACK and not self.allow_plaintext:
            raise ValueError(
                f"listen_host {self.listen_host} is not loopback: configure TLS, or set allow_plaintext where"
                " the network itself encrypts"
            )
        return self

    @property
    def tls(self) -> bool:
        return self.tls_cert_file is not None

    @property
    def name(self) -> str:
        """This replica's name."""
        return self.instance or f"{self.service}-0"


class KafkaSettings(ServiceSettings):
    """What a service is told that speaks to Kafka."""

    kafka_bootstrap_servers: str = Field(default="127.0.0.1:50092", min_length=1)
    """`host:port`, several with commas."""
    kafka_topic_prefix: str = Field(default="llmos", pattern=r"^[a-zA-Z0-9._-]{1,100}$")
    """Topics are PREFIX.audit.v1 and so on."""
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_ca_file: Path | None = None
    """Who signed the broker's certificate; not set: the system's authorities."""
    kafka_cert_file: Path | None = None
    kafka_key_file: Path | None = None
    """This client's own certificate, where the broker asks for one; both or none."""
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    kafka_sasl_username: str = Field(default="", max_length=256)
    kafka_sasl_password_file: Path | None = None
    kafka_partitions: int = Field(default=4, ge=1, le=1024)
    """Of topics that do not exist and are created."""
    kafka_replication: int = Field(default=1, ge=1, le=16)
    """Of topics that are created: 1 suits a single broker; more than one machine should have 3."""

    @model_validator(mode="after")
    def _kafka_combinations(self) -> KafkaSettings:
        if bool(self.kafka_cert_file) != bool(self.kafka_key_file):
            raise ValueError("kafka_cert_file and kafka_key_file belong together: set both or none")
        if self.kafka_security_protocol.startswith("SASL") and not (
            self.kafka_sasl_username and self.kafka_sasl_password_file
        ):
            raise ValueError(
                f"kafka_security_protocol {self.kafka_security_protocol} needs kafka_sasl_username and "
                "kafka_sasl_password_file"
            )
        return self

    def topic_name(self, topic: Topic) -> str:
        """PREFIX.audit.v1, PREFIX.jobs.v1, PREFIX.retry.v1 or PREFIX.dead-letter.v1."""
        return f"{self.kafka_topic_prefix}.{topic.name.lower().replace('_', '-')}.v1"


def describe(settings: ServiceSettings) -> list[str]:
    """One line a setting, `VARIABLE = value`, with secrets hidden."""
    prefix = settings.model_config.get("env_prefix") or ""
    values: dict[str, Any] = {name: getattr(settings, name) for name in type(settings).model_fields}
    return [f"{(prefix + name).upper()} = {_shown(value)}" for name, value in sorted(values.items())]


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return "(hidden)" if value.get_secret_value() else "(empty)"
    if value is None or value == "":
        return "(not set)"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "(none)"
    return str(value)
