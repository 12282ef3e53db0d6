"""Each service starts with what the rendered chart gives it, and its own probes say so.

Command, environment, mounts, probes and grace period are read from the manifests. Only what a cluster would
provide is replaced: volumes by folders, names of Services by loopback, ports by free ones.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import secrets
import sysconfig
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from llmos.events.v1 import events_pb2
from llmos.gateway.v1 import (
    generation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from llmos.logging.v1 import audit_service_pb2, audit_service_pb2_grpc

from deploy.dev import readiness
from deploy.dev.broker import Broker
from deploy.dev.certs import CertificateAuthority
from deploy.dev.ports import PortReservations
from deploy.dev.processes import Process
from deploy.helm.rendering import Manifest, only, render, value_set
from tests.framework.postgres import PostgresServer
from tests.framework.waiting import eventually

ROOT = Path(__file__).parents[2]
SERVICES = ("auth", "logging", "inference", "gateway")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOWHERE = "127.0.0.1:1"
PASSED_ON = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
# What the images set (deploy/images); PATH leads to the Python that has the packages.
IMAGE = {
    "PATH": f"{sysconfig.get_path('scripts')}:/usr/bin:/bin",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'protos/gen'}",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}


class Cluster:
    """What the pods find around them."""

    def __init__(
        self,
        folder: Path,
        manifests: list[Manifest],
        bootstrap: str,
        ports: PortReservations,
        database_url: str | None,
    ) -> None:
        self.folder = folder
        self.manifests = manifests
        self.bootstrap = bootstrap
        self.database_url = database_url
        self.secrets = {service: secrets.token_hex(32) for service in SERVICES}
        self.authority = CertificateAuthority(folder / "ca")
        self.ports: dict[tuple[str, int], int] = {}
        for service in SERVICES:
            for port in self.pod(service)["containers"][0]["ports"]:
                key = (service, port["containerPort"])
                self.ports[key] = ports.take([f"{service} {port['name']}"]).popitem()[1]

    def pod(self, service: str) -> Manifest:
        spec = only(self.manifests, "StatefulSet", f"llmos-{service}")["spec"]["template"]["spec"]
        return dict(spec)

    def target(self, host: str, port: int) -> str:
        """Where a name of the cluster is on this machine; the first replica of each service runs."""
        found = re.fullmatch(r"(?:llmos-\w+-(\d+)\.)?llmos-(\w+)\.serving\.svc", host)
        if found is None or found[1] not in (None, "0"):
            return NOWHERE
        return f"127.0.0.1:{self.ports[found[2], port]}"

    def secret(self, service: str, volume: Manifest) -> Mapping[str, bytes]:
        """The contents of a Secret, by key."""
        if volume["name"] == "service-secrets":
            return {name: secret.encode() for name, secret in self.secrets.items()}
        if volume["name"] == "tls":
            self.authority.ensure(service)
            files = {"tls.crt": f"{service}.crt", "tls.key": f"{service}.key", "ca.crt": "ca.crt"}
            return {key: (self.authority.folder / file).read_bytes() for key, file in files.items()}
        if volume["name"] == "key-encryption":
            return {"key": base64.b64encode(secrets.token_bytes(32))}
        if volume["name"] == "payload":
            return {"key": base64.b64encode(secrets.token_bytes(32))}
        if volume["name"] == "database":
            return {"password": b"the server of the tests trusts loopback"}
        if volume["name"] == "redis":
            return {"password": b"there is no server: the gateway goes on by itself"}
        raise AssertionError(f"an unknown Secret: {volume}")


class Pod:
    """The first replica of a service, as its manifest has it."""

    def __init__(self, service: str, cluster: Cluster) -> None:
        self.service = service
        self.name = f"llmos-{service}-0"
        self.cluster = cluster
        self.spec = cluster.pod(service)
        (self.container,) = self.spec["containers"]
        self.folder = cluster.folder / self.name
        self.mounts = {mount["mountPath"]: self.volume(mount) for mount in self.container["volumeMounts"]}
        self.process = Process(
            self.name,
            [*self.container["command"], *self.container.get("args", [])],
            env=IMAGE | {"HOME": str(self.mounts["/tmp"])} | PASSED_ON | self.environment(),
            cwd=ROOT,
            log_file=self.folder / "log",
        )

    def volume(self, mount: Manifest) -> Path:
        """Fills a folder as the kubelet would."""
        folder = self.folder / mount["name"]
        folder.mkdir(parents=True)
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        volume = volumes.get(mount["name"], {})
        if "secret" not in volume:
            return folder
        contents = self.cluster.secret(self.service, volume)
        items = volume["secret"].get("items") or [{"key": key, "path": key} for key in contents]
        for item in items:
            file = folder / item["path"]
            file.write_bytes(contents[item["key"]])
            file.chmod(volume["secret"]["defaultMode"])
        return folder

    def environment(self) -> dict[str, str]:
        found = {}
        for entry in self.container["env"]:
            if "valueFrom" in entry:
                assert entry["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
                found[entry["name"]] = self.name
            else:
                found[entry["name"]] = self.here(entry["name"], entry["value"])
        return found

    def here(self, name: str, value: str) -> str:
        """A value, with what only a cluster has replaced by what is on this machine."""
        if name.endswith("_KAFKA_BOOTSTRAP_SERVERS"):
            return self.cluster.bootstrap
        if name.endswith("_KAFKA_TOPIC_PREFIX"):
            return f"{value}-{self.cluster.secrets['auth'][:8]}"
        if name.endswith("_DB_URL"):
            assert self.cluster.database_url is not None
            return self.cluster.database_url
        if name.endswith("_REDIS_URL"):
            return f"redis://{NOWHERE}/0"
        if name.endswith("_OTLP_ENDPOINT"):
            return f"http://{NOWHERE}"
        if name.endswith("_PORT"):
            return str(self.cluster.ports[self.service, int(value)])
        if name.endswith(("_TARGET", "_TARGETS")):
            targets = [target.rsplit(":", 1) for target in value.split(",")]
            found = [self.cluster.target(host, int(port)) for host, port in targets]
            # Replicas that do not run here are nowhere, each at an address of its own.
            return ",".join(
                at if at != NOWHERE else f"127.0.0.1:{place + 1}" for place, at in enumerate(found)
            )
        for mount, folder in self.mounts.items():
            if value.startswith(f"{mount}/") or value == mount:
                return str(folder) + value.removeprefix(mount)
        return value

    async def passes(self, probe: str) -> bool:
        """Applies a probe once, as the kubelet does: in plain text, without a credential."""
        asked = self.container[probe]["grpc"]
        target = f"127.0.0.1:{self.cluster.ports[self.service, asked['port']]}"
        async with grpc.aio.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
            request = health_pb2.HealthCheckRequest(service=asked["service"])
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    request, timeout=self.container[probe]["timeoutSeconds"], wait_for_ready=False
                )
            except grpc.aio.AioRpcError:
                assert self.process.running, f"{self.name} ended:\n{self.process.tail()}"
                return False
        return bool(answer.status == SERVING)

    async def wait_until(self, probe: str, timeout_s: float) -> None:
        async def passed() -> bool:
            return await self.passes(probe)

        try:
            await eventually(passed, timeout_s=timeout_s, what=f"{probe} of {self.name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.process.tail()}") from None

    @property
    def grpc_target(self) -> str:
        (port,) = [p["containerPort"] for p in self.container["ports"] if p["name"] == "grpc"]
        return f"127.0.0.1:{self.cluster.ports[self.service, port]}"


@pytest.fixture
async def pods(
    request: pytest.FixtureRequest, tmp_path: Path, broker: Broker, reservations: PortReservations
) -> AsyncIterator[dict[str, Pod]]:
    """All four services, begun at once, as a cluster does."""
    values: dict[str, Any] = value_set(request.param)
    # The deterministic backend: what a model answers is the matter of other tests.
    values.setdefault("inference", {}).setdefault("settings", {})["backend"] = "echo"
    # The broker of the tests, which has neither TLS nor passwords.
    values["kafka"] = {"bootstrapServers": values["kafka"]["bootstrapServers"]}
    manifests = render(values)
    database_url = None
    if values.get("auth", {}).get("database", {}).get("url"):
        # Taken only here: a machine without PostgreSQL can still start the other value set.
        postgres: PostgresServer = request.getfixturevalue("postgres")
        database_url = str(postgres.url(await postgres.make_database()))
    cluster = Cluster(tmp_path, manifests, broker.bootstrap, reservations, database_url)
    pods = {service: Pod(service, cluster) for service in SERVICES}
    try:
        for pod in pods.values():
            pod.process.start()
        yield pods
    finally:
        for pod in pods.values():
            pod.process.end_group()


@pytest.mark.parametrize("pods", ["dev", "production"], indirect=True)
async def test_each_service_starts_with_what_the_chart_gives_it(pods: dict[str, Pod]) -> None:
    for pod in pods.values():
        probe = pod.container["startupProbe"]
        await pod.wait_until("startupProbe", min(60, probe["periodSeconds"] * probe["failureThreshold"]))
    for pod in pods.values():
        await pod.wait_until("readinessProbe", 60)
        assert await pod.passes("livenessProbe")
        listed = json.loads(next(pod.folder.rglob("ports.json")).read_text())
        for port in pod.container["ports"]:
            assert listed[port["name"]] == pod.cluster.ports[pod.service, port["containerPort"]]

    # Targets, secrets and certificates lead to the right places: a request goes through all of them.
    request_id = await generate(pods)
    await eventually(lambda: audited(pods, request_id), timeout_s=30, what="the request in the audit log")

    left = list(pods.values())
    await asyncio.gather(*(pod.process.stop(pod.spec["terminationGracePeriodSeconds"]) for pod in left))
    assert {pod.name: pod.process.exit_code for pod in left} == {pod.name: 0 for pod in left}


def edge(pods: dict[str, Pod]) -> grpc.aio.Channel:
    """A caller's channel, with a certificate where the value set asks for one."""
    gateway = pods["gateway"]
    if "/etc/llmos/tls" not in gateway.mounts:
        return readiness.open_channel(gateway.grpc_target, None)
    authority = gateway.cluster.authority
    authority.ensure("client")
    return readiness.open_channel(gateway.grpc_target, authority.folder)


def bearer(pods: dict[str, Pod]) -> list[tuple[str, str]]:
    key = next(pods["auth"].folder.rglob("admin-key")).read_text().strip()
    return [("authorization", f"Bearer {key}")]


async def generate(pods: dict[str, Pod]) -> str:
    """Has something generated; returns the request's id."""
    async with edge(pods) as channel:
        models = await model_service_pb2_grpc.ModelServiceStub(channel).ListModels(
            model_service_pb2.ListModelsRequest(), metadata=bearer(pods), timeout=20
        )
        spec = generation_pb2.GenerationSpec(
            model=models.models[0].id, prompt=generation_pb2.Prompt(text="one two three"), max_tokens=8
        )
        answer = await generation_service_pb2_grpc.GenerationServiceStub(channel).Generate(
            generation_service_pb2.GenerateRequest(spec=spec), metadata=bearer(pods), timeout=20
        )
    assert answer.choices[0].text
    return str(answer.request_id)


async def audited(pods: dict[str, Pod], request_id: str) -> bool:
    """Whether the outcome is in the audit log, after its way over Kafka."""
    wanted = audit_service_pb2.SearchRequest(filter=audit_service_pb2.RequestFilter(request_id=request_id))
    async with edge(pods) as channel:
        found = await audit_service_pb2_grpc.AuditServiceStub(channel).Search(
            wanted, metadata=bearer(pods), timeout=20
        )
    return any(record.ended.outcome == events_pb2.OUTCOME_SUCCEEDED for record in found.records)
