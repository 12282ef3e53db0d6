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


def service_of(name: str) -> str:
    """The service that a process runs: `inference-1` is one of `inference`."""
    return name.partition("-")[0]


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
    replicas: tuple[str, ...] = ("inference",)
    """The inference processes that the gateway uses."""
    topic_prefix: str = "llmos"
    issuer: str = ""
    """The `iss` of tokens; empty: the services' default."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of the services' own, by variable; they win over those made here."""

    def target(self, name: str) -> str:
        """Where a process answers gRPC."""
        return f"{HOST}:{self.ports.get(name, 0)}"

    def command(self, name: str) -> list[str]:
        """How a process is started. `name` is a service, or a further replica of one: `inference-1`."""
        # As this process runs: without assertions where it has none.
        optimised = ["-O"] if sys.flags.optimize else []
        return [sys.executable, *optimised, "-m", f"services.{service_of(name)}"]

    def environment(self, name: str) -> dict[str, str]:
        """The whole environment of a process."""
        service = service_of(name)
        passed_on = {
            name: value
            for name, value in os.environ.items()
            if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
        }
        prefix = f"LLMOS_{service.upper()}_"
        own = {prefix + name: value for name, value in (self._shared(name) | self._own(name)).items()}
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

    def _shared(self, name: str) -> dict[str, str]:
        service = service_of(name)
        settings = {
            "INSTANCE": name if name != service else "",
            "LISTEN_HOST": HOST,
            "GRPC_PORT": str(self.ports.get(name, 0)),
            "METRICS_PORT": str(self.ports.get(f"{name} metrics", 0)),
            "STATE_DIR": str(self.state.of(name)),
            "SERVICE_SECRET_FILE": str(self.state.secrets / service),
            "AUTH_TARGET": self.target("auth"),
            "LOG_FORMAT": "text",
        }
        if self.issuer:
            settings["ISSUER"] = self.issuer
        if self.certs is not None:
            settings |= {
                "TLS_CERT_FILE": str(self.certs / f"{service}.crt"),
                "TLS_KEY_FILE": str(self.certs / f"{service}.key"),
                "TLS_CA_FILE": str(self.certs / "ca.crt"),
            }
        return settings

    def _own(self, name: str) -> dict[str, str]:
        kafka = {"KAFKA_BOOTSTRAP_SERVERS": self.bootstrap, "KAFKA_TOPIC_PREFIX": self.topic_prefix}
        match service_of(name):
            case "auth":
                return {"SERVICE_SECRETS_DIR": str(self.state.secrets)}
            case "inference":
                return {"MODELS_DIR": str(self.models)}
            case "logging":
                return kafka
            case "gateway":
                return kafka | {
                    "HTTP_PORT": str(self.ports.get(f"{name} http", 0)),
                    "INFERENCE_TARGETS": ",".join(self.target(replica) for replica in self.replicas),
                    "LOGGING_TARGET": self.target("logging"),
                    "PAYLOAD_KEY_FILE": str(self.state.payload_key),
                }
        raise ValueError(f"no such service: {name}")


def settings_of_this_shell() -> dict[str, str]:
    """The settings of services that the caller has set, to be given on."""
    return {name: value for name, value in os.environ.items() if name.startswith("LLMOS_")}
