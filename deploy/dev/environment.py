"""What each service is told: its settings, as environment variables."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.dev.certs import CLIENT
from deploy.dev.ports import HOST
from deploy.dev.state import State

ROOT = Path(__file__).resolve().parents[2]
# What a service may know of the shell that it was started from; a person's own secrets are not among it.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
PASSED_ON_PREFIXES = ("COVERAGE_",)


@dataclass(frozen=True)
class Plan:
    """One mesh on one machine."""

    state: State
    ports: Mapping[str, int]
    """By the names of `deploy.dev.ports`; 0 or missing: the service takes a free one."""
    bootstrap: str
    """Kafka's `host:port`."""
    models: Path
    """The cache of model files; several meshes may share it."""
    certs: Path | None = None
    """The folder of the certificates; set: mTLS on every hop."""
    topic_prefix: str = "llmos"
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of the services' own, by variable; they win over those made here."""

    def target(self, service: str) -> str:
        """Where a service answers gRPC."""
        return f"{HOST}:{self.ports.get(service, 0)}"

    def command(self, service: str) -> list[str]:
        return [sys.executable, "-m", f"services.{service}"]

    def environment(self, service: str) -> dict[str, str]:
        """The whole environment of a service's process."""
        passed_on = {
            name: value
            for name, value in os.environ.items()
            if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
        }
        prefix = f"LLMOS_{service.upper()}_"
        own = {prefix + name: value for name, value in (self._shared(service) | self._own(service)).items()}
        chosen = {name: value for name, value in self.settings.items() if name.startswith(prefix)}
        return passed_on | {"PYTHONUNBUFFERED": "1"} | own | chosen

    def client_environment(self) -> dict[str, str]:
        """What a client on this machine is told: the `llmos` command and the SDK read it."""
        variables = {"LLMOS_TARGET": self.target("gateway"), "LLMOS_API_KEY_FILE": str(self.state.admin_key)}
        if self.certs is not None:
            variables |= {
                "LLMOS_TLS_CA_FILE": str(self.certs / "ca.crt"),
                "LLMOS_TLS_CERT_FILE": str(self.certs / f"{CLIENT}.crt"),
                "LLMOS_TLS_KEY_FILE": str(self.certs / f"{CLIENT}.key"),
            }
        return variables

    def _shared(self, service: str) -> dict[str, str]:
        settings = {
            "LISTEN_HOST": HOST,
            "GRPC_PORT": str(self.ports.get(service, 0)),
            "METRICS_PORT": str(self.ports.get(f"{service} metrics", 0)),
            "STATE_DIR": str(self.state.of(service)),
            "SERVICE_SECRET_FILE": str(self.state.secrets / service),
            "AUTH_TARGET": self.target("auth"),
            "LOG_FORMAT": "text",
        }
        if self.certs is not None:
            settings |= {
                "TLS_CERT_FILE": str(self.certs / f"{service}.crt"),
                "TLS_KEY_FILE": str(self.certs / f"{service}.key"),
                "TLS_CA_FILE": str(self.certs / "ca.crt"),
            }
        return settings

    def _own(self, service: str) -> dict[str, str]:
        kafka = {"KAFKA_BOOTSTRAP_SERVERS": self.bootstrap, "KAFKA_TOPIC_PREFIX": self.topic_prefix}
        match service:
            case "auth":
                return {"SERVICE_SECRETS_DIR": str(self.state.secrets)}
            case "inference":
                return {"MODELS_DIR": str(self.models)}
            case "logging":
                return kafka
            case "gateway":
                return kafka | {
                    "HTTP_PORT": str(self.ports.get("gateway http", 0)),
                    "INFERENCE_TARGETS": self.target("inference"),
                    "LOGGING_TARGET": self.target("logging"),
                }
        raise ValueError(f"no such service: {service}")


def settings_of_this_shell() -> dict[str, str]:
    """The settings of services that the caller has set, to be given on."""
    return {name: value for name, value in os.environ.items() if name.startswith("LLMOS_")}
