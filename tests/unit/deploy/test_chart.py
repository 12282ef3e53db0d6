"""The chart renders, lints and validates; what cannot work is refused with a sentence."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import re
import tomllib
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from deploy.helm import schema
from deploy.helm.rendering import CHART, VALUE_SETS, container, only, render, render_text, value_set

SERVICES = ("gateway", "auth", "inference", "logging")
KUBERNETES = ("1.29", "1.34")


def changed(base: str, **by_path: Any) -> dict[str, Any]:
    """A value set with some values changed: `tls__enabled=True` is tls.enabled."""
    values = copy.deepcopy(value_set(base))
    for path, value in by_path.items():
        *above, last = path.split("__")
        table = values
        for name in above:
            table = table.setdefault(name, {})
        table[last] = value
    return values


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", VALUE_SETS)
def test_the_chart_is_valid_for_kubernetes(name: str, version: str) -> None:
    manifests = render(value_set(name))
    assert {m["kind"] for m in manifests} >= {"StatefulSet", "Service", "ServiceAccount", "NetworkPolicy"}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)
        assert manifest["metadata"]["namespace"] == "serving"


@pytest.mark.parametrize("name", VALUE_SETS)
def test_the_chart_lints(name: str) -> None:
    report = helm_python.lint(CHART, value_set(name), strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] >= 2] == []


def test_names_and_objects_are_unique() -> None:
    for release in ("llmos", "team-a"):
        manifests = render(value_set("production"), release=release)
        names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[a-z0-9-]{1,63}", name) for _, name in names)


def test_the_schema_is_strict_and_current() -> None:
    assert schema.PATH.read_text() == schema.render(), "run `python -m deploy.helm.schema`"

    def walk(node: Any, at: str) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and "properties" in node:
                assert node.get("additionalProperties") is False, at
            if isinstance(node.get("type"), str | list) and at:
                assert "description" in node or at.endswith(("items", "additionalProperties")), at
            for key, value in node.items():
                walk(value, f"{at}.{key}")

    walk(json.loads(schema.render()), "")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"kafka__bootstrapServers": ""}, "kafka.bootstrapServers is required"),
        ({"kafka__securityProtocol": "SASL_SSL"}, "needs kafka.saslUsername"),
        ({"kafka__saslUsername": "llmos"}, "of no use with kafka.securityProtocol PLAINTEXT"),
        ({"kafka__privateAuthority": True}, "of no use with kafka.securityProtocol PLAINTEXT"),
        (
            {"kafka__securityProtocol": "SSL", "kafka__clientCertificate": True},
            "need kafka.existingSecret",
        ),
        ({"tls__allowPlaintext": False}, "set tls.allowPlaintext to true as well"),
        ({"tls__enabled": True}, "exclude each other"),
        ({"gateway__settings": {"grpc_port": 1}}, "gateway.settings.grpc_port is made by the chart"),
        ({"auth__settings": {"client_secret": "x"}}, "secrets do not belong into values"),
        ({"auth__replicas": 2}, "set auth.database.url to a PostgreSQL"),
        ({"auth__database": {"existingSecret": "x"}}, "is of no use without auth.database.url"),
        ({"gateway__redis": {"existingSecret": "x"}}, "is of no use without gateway.redis.url"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(sentence)):
        render(changed("dev", **wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        {"gatway": {}},
        {"gateway__replicas": 0},
        {"gateway__replicas": "2"},
        {"auth__replicas": 0},
        {"auth__database": {"url": "postgresql://llmos:secret@db/llmos"}},
        {"gateway__redis": {"url": "redis://:secret@redis/0"}},
        {"logging__replicas": 2},
        {"logging__storage__persistent": False},
        {"kafka__bootstrapServers": "kafka"},
        {"kafka__password": "x"},
        {"serviceSecrets__gateway": "x"},
        {"tls__secretNames__gateway": "Not A Name"},
        {"telemetry__logLevel": "loud"},
        {"telemetry__traceSampleRatio": 2},
        {"drain__graceSeconds": -1},
        {"inference__storage__size": "much"},
        {"gateway__settings": {"Max": 1}},
        {"images__pullPolicy": "Sometimes"},
        {"networkPolicy__callers": [{"everybody": {}}]},
        {"networkPolicy__callers": [{}]},
    ],
    ids=str,
)
def test_the_schema_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmValuesError):
        render(changed("dev", **wrong))


@pytest.mark.parametrize("name", VALUE_SETS)
def test_pods_run_with_the_least_rights(name: str) -> None:
    manifests = render(value_set(name))
    for service in SERVICES:
        pod = only(manifests, "StatefulSet", f"llmos-{service}")["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        assert not any("hostPath" in volume for volume in pod["volumes"])
        context = container(manifests, service)["securityContext"]
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container(manifests, service)["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", VALUE_SETS)
def test_a_pod_is_not_killed_before_its_drain_is_over(name: str) -> None:
    manifests = render(value_set(name))
    for service in SERVICES:
        pod = only(manifests, "StatefulSet", f"llmos-{service}")["spec"]["template"]["spec"]
        env = {e["name"]: e.get("value") for e in container(manifests, service)["env"]}
        prefix = f"LLMOS_{service.upper()}_"
        drain_s = float(env[f"{prefix}DRAIN_DELAY_S"]) + float(env[f"{prefix}DRAIN_GRACE_S"])
        assert pod["terminationGracePeriodSeconds"] >= drain_s + 10


@pytest.mark.parametrize("name", VALUE_SETS)
def test_probes_ask_the_health_of_the_process(name: str) -> None:
    manifests = render(value_set(name))
    for service in SERVICES:
        it = container(manifests, service)
        ports = {port["name"]: port["containerPort"] for port in it["ports"]}
        env = {e["name"]: e.get("value") for e in it["env"]}
        assert env[f"LLMOS_{service.upper()}_PROBE_PORT"] == str(ports["probe"])
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert it[probe]["grpc"]["port"] == ports["probe"]
        assert it["readinessProbe"]["grpc"]["service"] == ""
        # Loss of another service must not restart this one.
        assert it["livenessProbe"]["grpc"]["service"] == "liveness"
        start_s = it["startupProbe"]["periodSeconds"] * it["startupProbe"]["failureThreshold"]
        assert start_s >= (float(env["LLMOS_INFERENCE_LOAD_TIMEOUT_S"]) if service == "inference" else 30)


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_variable_is_a_setting_and_all_of_them_together_are_valid(
    name: str, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = importlib.import_module(f"services.{service}.settings")
    kind = getattr(settings, f"{service.capitalize()}Settings")
    prefix = f"LLMOS_{service.upper()}_"
    for entry in container(render(value_set(name)), service)["env"]:
        field = entry["name"].removeprefix(prefix).lower()
        assert entry["name"].startswith(prefix), entry["name"]
        assert field in kind.model_fields, f"{entry['name']} is no setting of {service}"
        monkeypatch.setenv(entry["name"], entry.get("value") or f"llmos-{service}-0")
    kind()


def test_the_settings_that_values_may_not_hold_are_those_of_the_chart() -> None:
    made = set()
    for name in VALUE_SETS:
        for service in SERVICES:
            prefix = f"LLMOS_{service.upper()}_"
            names = {
                e["name"].removeprefix(prefix).lower()
                for e in container(render(value_set(name)), service)["env"]
            }
            made |= names - set(value_set(name).get(service, {}).get("settings", {}))
    listed = re.search(r'llmos\.madeSettings" -}}\s*(\S+)', (CHART / "templates/_checks.tpl").read_text())
    assert listed is not None
    assert made == set(listed.group(1).split(","))


def test_numbers_are_written_out() -> None:
    manifests = render(changed("dev", gateway__settings={"max_message_bytes": 16777216, "max_call_s": 0.5}))
    env = {e["name"]: e.get("value") for e in container(manifests, "gateway")["env"]}
    assert env["LLMOS_GATEWAY_MAX_MESSAGE_BYTES"] == "16777216"
    assert env["LLMOS_GATEWAY_MAX_CALL_S"] == "0.5"


def test_the_gateway_knows_every_replica_by_name() -> None:
    manifests = render(value_set("production"))
    env = {e["name"]: e.get("value") for e in container(manifests, "gateway")["env"]}
    targets = env["LLMOS_GATEWAY_INFERENCE_TARGETS"].split(",")
    governing = only(manifests, "StatefulSet", "llmos-inference")["spec"]["serviceName"]
    assert targets == [f"llmos-inference-{i}.{governing}.serving.svc:50052" for i in range(4)]
    service = only(manifests, "Service", governing)["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True


def test_every_target_is_a_port_of_a_service() -> None:
    manifests = render(value_set("production"))
    for service in SERVICES:
        for entry in container(manifests, service)["env"]:
            if entry["name"].endswith(("_TARGET", "_TARGETS")):
                for target in entry["value"].split(","):
                    host, _, port = target.partition(":")
                    assert host.endswith(".serving.svc")
                    found = only(manifests, "Service", host.split(".")[-3])
                    assert int(port) in [p["port"] for p in found["spec"]["ports"]]


def test_only_callers_are_let_in() -> None:
    manifests = render(value_set("production"))
    allowed = {}
    for service in SERVICES:
        policy = only(manifests, "NetworkPolicy", f"llmos-{service}")["spec"]
        assert policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == service
        grpc = next(rule for rule in policy["ingress"] if {"port": "grpc"} in rule["ports"])
        allowed[service] = [
            peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component")
            for peer in grpc["from"]
        ]
    assert allowed == {
        "gateway": [None],
        "auth": ["gateway", "inference", "logging"],
        "inference": ["gateway"],
        "logging": ["gateway"],
    }


@pytest.mark.parametrize("name", VALUE_SETS)
def test_secrets_are_references(name: str) -> None:
    manifests = render(value_set(name))
    assert not [m for m in manifests if m["kind"] in ("Secret", "ConfigMap")]
    for service in SERVICES:
        for entry in container(manifests, service)["env"]:
            if re.search("SECRET|PASSWORD|TOKEN|KEY", entry["name"]):
                assert entry["value"].startswith("/etc/llmos/"), "a file, not the secret"
        pod = only(manifests, "StatefulSet", f"llmos-{service}")["spec"]["template"]["spec"]
        (secrets,) = [v["secret"] for v in pod["volumes"] if v["name"] == "service-secrets"]
        expected = set(SERVICES) if service == "auth" else {service}
        assert {item["key"] for item in secrets["items"]} == expected, "a pod sees no other's secret"
    for text in render_text(value_set(name)).values():
        assert "PRIVATE KEY" not in text
        assert not re.search(r"llmos_[A-Za-z0-9]{30,}", text), "an API key"
        for word in re.findall(r"[A-Za-z0-9+/]{40,}={0,2}", text):
            assert not printable(word), f"hidden text: {word}"


def printable(word: str) -> bool:
    try:
        return base64.b64decode(word, validate=True).decode("ascii").isprintable()
    except ValueError:
        return False


def test_every_mount_has_its_volume_and_every_path_its_mount() -> None:
    for name in VALUE_SETS:
        manifests = render(value_set(name))
        for service in SERVICES:
            it = container(manifests, service)
            spec = only(manifests, "StatefulSet", f"llmos-{service}")["spec"]
            volumes = {v["name"] for v in spec["template"]["spec"]["volumes"]}
            volumes |= {c["metadata"]["name"] for c in spec.get("volumeClaimTemplates", [])}
            assert {m["name"] for m in it["volumeMounts"]} == volumes
            mounts = [m["mountPath"] for m in it["volumeMounts"]]
            paths = [e["value"] for e in it["env"] if e.get("value", "").startswith("/")]
            assert paths
            for path in paths:
                assert any(path.startswith(f"{mount}/") or path == mount for mount in mounts), path


def test_state_without_persistence_is_bounded() -> None:
    manifests = render(
        changed("dev", gateway__storage={"persistent": False, "size": "1Gi", "storageClass": ""})
    )
    spec = only(manifests, "StatefulSet", "llmos-gateway")["spec"]
    assert "volumeClaimTemplates" not in spec
    volumes = {v["name"]: v for v in spec["template"]["spec"]["volumes"]}
    assert volumes["state"] == {"name": "state", "emptyDir": {"sizeLimit": "1Gi"}}


def test_every_value_is_explained() -> None:
    text = (CHART / "values.yaml").read_text()
    for name in yaml.safe_load(text):
        assert re.search(rf"(?m)^# -- .*(\n# .*)*\n{name}:", text), (
            f"{name} has no comment that begins `# --`"
        )


def test_the_chart_has_the_version_of_the_project() -> None:
    project = tomllib.loads((CHART.parents[2] / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (project["version"], project["version"])
