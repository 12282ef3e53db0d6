"""What the gateway is told, by variables that begin with `LLMOS_GATEWAY_`."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from services.mesh.settings import LOOPBACK, KafkaSettings, Port, PositiveSeconds

MIB = 1024 * 1024


class GatewaySettings(KafkaSettings):
    """Settings of the gateway."""

    model_config = SettingsConfigDict(
        env_prefix="LLMOS_GATEWAY_", frozen=True, extra="forbid", env_ignore_empty=True
    )
    service: ClassVar[str] = "gateway"

    grpc_port: Port = 50050
    metrics_port: Port = 51050
    state_dir: Path = Path(".state/gateway")

    inference_targets: Annotated[tuple[str, ...], NoDecode] = ("127.0.0.1:50052",)
    """The replicas of inference: `host:port`, several with commas."""
    logging_target: str = "127.0.0.1:50053"
    probe_interval_s: PositiveSeconds = 0.5
    """How often each replica is asked for its health."""
    probe_timeout_s: PositiveSeconds = 2
    """A replica that does not say within that time that it serves does not serve."""

    max_concurrent_generations: int = Field(default=512, ge=1)
    """More than so many answers that run or wait for a place are refused at once, on both edges together."""
    max_concurrent_per_replica: int = Field(default=0, ge=0, le=65_536)
    """Choices that a replica is given at once; 0: as many as it says that it runs at once. What is more
    waits here, where the queue is fair."""
    max_queued: int = Field(default=256, ge=0, le=65_536)
    """Answers that wait for a place, for each model; more are refused at once."""
    max_queued_per_tenant: int = Field(default=128, ge=0, le=65_536)
    """Those of one tenant."""
    max_queue_wait_s: PositiveSeconds = 10
    """Who would wait longer is refused."""
    tenant_share: float = Field(default=1, gt=0, le=1)
    """Of a model's places, what one tenant may have running or waiting; 1: all of them, and the queue."""
    key_share: float = Field(default=1, gt=0, le=1)
    """The same for one API key."""
    batch_ageing_s: PositiveSeconds = 5
    """Where interactive requests leave no place for batch, one of those is served so often all the same."""
    batch_share: float = Field(default=0.875, gt=0, le=1)
    """Of a model's places, what jobs and other batch may have; one at least is left for interactive requests,
    where the model has more than one."""
    batch_alone_after_s: PositiveSeconds = 60
    """Where no interactive request came for so long, batch may have all places."""
    max_tokens_limit: int = Field(default=4096, ge=1, le=1_048_576)
    """The most that a request may ask for, for each choice."""
    max_total_tokens: int = Field(default=0, ge=0)
    """The same over all choices; 0: no limit of its own."""
    max_prompt_bytes: int = Field(default=0, ge=0)
    """Of a prompt as it comes over the wire; 0: as large as a message may be. How many tokens fit is the
    model's to say."""
    max_messages: int = Field(default=0, ge=0, le=1024)
    """Of a conversation; 0: 1,024."""
    require_deadline: bool = False
    """Whether a request to generate is refused that names no time by which it is of no more use; else
    `max_call_s` is its time."""

    key_cache_max_entries: int = Field(default=10_000, ge=1)
    """API keys that are remembered, until what they stand for expires; as many refused ones."""
    key_refusal_ttl_s: PositiveSeconds = 5
    """How long a refused API key is refused again without asking auth."""
    token_cache_max_entries: int = Field(default=10_000, ge=1)
    """Access tokens that are remembered as verified, until they expire."""

    free_failures: int = Field(default=10, ge=1)
    """So many wrong credentials from one address, or for one name, slow nobody down; more do, and one is
    forgiven every minute."""

    audit_mode: Literal["permissive", "strict"] = "permissive"
    """What happens when the spool is full: `permissive` serves on, drops events and counts them; `strict`
    refuses."""
    spool_max_bytes: int = Field(default=512 * MIB, ge=MIB)
    """What the audit spool may hold on disk."""
    spool_max_events: int = Field(default=200_000, ge=1000)

    redis_url: SecretStr | None = None
    """What several gateways share: `redis://`, `rediss://` (TLS) or `unix://`; not set: each keeps everything
    in its own memory."""
    redis_password_file: Path | None = None
    """Holds the password for `redis_url`, where that has none."""
    redis_ca_file: Path | None = None
    """Who signed Redis's certificate; not set: the system's authorities."""
    redis_max_connections: int = Field(default=32, ge=1, le=1024)
    redis_timeout_s: float = Field(default=0.1, gt=0, le=1)
    """A call to Redis that takes longer counts as its loss, and the gateway goes on without it."""

    replicas: int = Field(default=1, ge=1, le=1000)
    """How many gateways there are: each runs its part of what batch may have, and with `redis_url` lost
    keeps to its share of the limits."""
    assumed_completion_tokens: int = Field(default=1024, ge=1)
    """So many tokens are reserved for each choice of a request that names no `max_tokens`."""

    cache_max_bytes: int = Field(default=64 * MIB, ge=0)
    """Memory for answers that can only come out the same again; with `redis_url` they are kept there, and
    this bounds only those on their way. 0: no cache."""
    cache_max_entry_bytes: int = Field(default=256 * 1024, ge=1024, le=16 * MIB)
    """A longer answer is not kept."""
    cache_ttl_s: PositiveSeconds = 3600
    """How long an answer is kept."""

    payload_key_file: Path | None = None
    """What jobs hold is encrypted with: keys of 32 bytes in base64, a line each; the first encrypts, all
    decrypt. The same for all gateways. Not set: no jobs."""
    max_jobs_per_tenant: int = Field(default=100_000, ge=1)
    """Jobs of one tenant that have not ended; more are refused."""
    run_jobs: bool = True
    """Whether this gateway runs jobs, where it has `payload_key_file`; one that does not takes them all the
    same."""
    jobs_concurrency: int = Field(default=0, ge=0, le=4096)
    """Jobs that this gateway runs at once; 0: as many as `batch_share` lets the models have."""
    job_lease_s: float = Field(default=15, ge=3, le=600)
    """A gateway that is silent for so long loses the jobs that it runs to others."""

    files_dir: Path | None = None
    """Where the files of batches lie, encrypted; not set: `files` in `state_dir`. Several gateways need one
    that they share, or a bucket; else they offer no files."""
    files_s3_endpoint: str = ""
    """An S3-compatible object store for them in place of a folder, such as `https://s3.example`."""
    files_s3_bucket: str = ""
    files_s3_prefix: str = ""
    """Before the names of objects, where the bucket holds other things too."""
    files_s3_region: str = "us-east-1"
    files_s3_access_key_id: str = ""
    files_s3_secret_key_file: Path | None = None
    """Holds the secret access key."""
    files_s3_ca_file: Path | None = None
    """Who signed the store's certificate; not set: the system's authorities."""
    files_max_bytes: int = Field(default=200 * MIB, ge=1024, le=4096 * MIB)
    """Of a file that is uploaded."""
    files_max_tenant_bytes: int = Field(default=10 * 1024 * MIB, ge=1024)
    """Of all files of a tenant; more are refused."""
    files_max_per_tenant: int = Field(default=1000, ge=1, le=10_000)
    files_ttl_s: int = Field(default=30 * 86_400, ge=3600, le=180 * 86_400)
    """How long a file is kept that names no other time."""
    files_upload_timeout_s: PositiveSeconds = 300
    """From the first byte of an upload to its last."""
    batch_max_requests: int = Field(default=50_000, ge=1, le=1_000_000)
    """Of one batch."""

    webhook_allow_http: bool = False
    """Whether a webhook may be told without TLS."""
    webhook_allowed_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = ()
    """CIDR blocks, with commas, that webhooks may lead to although they are not public, such as
    `10.2.0.0/16`."""
    webhook_ca_file: Path | None = None
    """Authorities to trust for webhooks besides those of the system; not set: those that httpx brings."""
    webhook_timeout_s: PositiveSeconds = 10
    """A webhook that has not answered within that time is told again later."""

    public_url: str = ""
    """Where clients find the HTTP edge, such as `https://api.example`; empty: at `issuer`. The metadata of
    OAuth2 (RFC 8414) names the endpoints below it."""
    trusted_proxies: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = ()
    """CIDR blocks of the proxies before the gateway, with commas: what they say in `x-forwarded-for` about
    whom they call for is believed. None: the header means nothing."""

    http_host: str = ""
    """Where HTTP listens; empty: as `listen_host`."""
    http_port: Port = 8080
    """0 takes a free one."""
    http_max_connections: int = Field(default=2048, ge=1)
    http_max_head_bytes: int = Field(default=16 * 1024, ge=1024)
    """A request's first line and headers together."""
    http_max_body_bytes: int = Field(default=4 * MIB, ge=1024)
    http_max_receiving: int = Field(default=512, ge=1)
    """Bodies that are on their way at once. They hold no place of `max_concurrent_calls`; where there are
    more, the one that has been on its way for the longest is refused."""
    http_max_receiving_bytes: int = Field(default=256 * MIB, ge=MIB)
    """What these hold together; at least a body's limit."""
    http_receive_timeout_s: PositiveSeconds = 8
    """From a request's first byte to its last."""
    http_idle_timeout_s: int = Field(default=15, ge=1, le=3600)
    """A connection without a request is closed after that."""

    http_cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins of web pages that may call the HTTP edge from a browser, such as `https://chat.example`, with
    commas; `*` is every one. None: no page may."""

    @field_validator(
        "inference_targets",
        "trusted_proxies",
        "http_cors_origins",
        "webhook_allowed_networks",
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        """Says what is wrong with it, without a word of it: it may hold a password."""
        if value is None:
            return None
        parts = urlsplit(value.get_secret_value())
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must be `redis://host:port/0`, `rediss://...` for TLS, or `unix:///path`")
        return value

    @model_validator(mode="after")
    def _gateway_combinations(self) -> GatewaySettings:
        if not self.inference_targets:
            raise ValueError("inference_targets must name at least one replica")
        if len(set(self.inference_targets)) != len(self.inference_targets):
            raise ValueError("inference_targets names a replica twice")
        for origin in self.http_cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s,*]+", origin):
                raise ValueError(
                    f"http_cors_origins: {origin!r} is not an origin such as https://chat.example"
                )
        if self.http_max_receiving_bytes < self.http_max_body_bytes:
            raise ValueError("http_max_receiving_bytes must not be below http_max_body_bytes")
        if 0 < self.max_total_tokens < self.max_tokens_limit:
            raise ValueError("max_total_tokens must not be below max_tokens_limit")
        if self.files_s3_endpoint and not (
            self.files_s3_bucket and self.files_s3_access_key_id and self.files_s3_secret_key_file
        ):
            raise ValueError(
                "files_s3_endpoint needs files_s3_bucket, files_s3_access_key_id and files_s3_secret_key_file"
            )
        if not self.tls and self.http_listen_host not in LOOPBACK and not self.allow_plaintext:
            raise ValueError(f"http_host {self.http_listen_host} is not loopback: configure TLS")
        return self

    @property
    def http_listen_host(self) -> str:
        return self.http_host or self.listen_host
