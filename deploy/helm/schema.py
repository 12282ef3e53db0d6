"""Writes values.schema.json of the chart: `python -m deploy.helm.schema [--check]`.

The schema is strict: a value that the chart does not know is refused, and each has a description.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "llmos" / "values.schema.json"
Schema = dict[str, Any]


def table(description: str, properties: dict[str, Schema], *, optional: tuple[str, ...] = ()) -> Schema:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "description": description,
        "additionalProperties": False,
        "properties": properties,
        **({"required": required} if required else {}),
    }


def text(description: str, **rules: Any) -> Schema:
    return {"type": "string", "description": description, **rules}


def whole(description: str, least: int, most: int) -> Schema:
    return {"type": "integer", "description": description, "minimum": least, "maximum": most}


def flag(description: str) -> Schema:
    return {"type": "boolean", "description": description}


def names_of(description: str, most: int) -> Schema:
    item = {"type": "string", "minLength": 1, "maxLength": 253}
    return {"type": "array", "description": description, "maxItems": most, "items": item}


def secret(description: str) -> Schema:
    return text(description, pattern="^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$")


def ref(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def storage(*, optional_claim: bool) -> Schema:
    persistent = {"persistent": flag("Whether it is on a claim of its own that outlives the pod.")}
    size = {
        "size": ref("quantity"),
        "storageClass": text("The storage class; empty for the cluster's default.", maxLength=253),
    }
    return table("Where the service keeps its state.", (persistent if optional_claim else {}) | size)


def service(description: str, own: dict[str, Schema], *, optional_claim: bool) -> Schema:
    return table(
        description,
        {
            **own,
            "storage": storage(optional_claim=optional_claim),
            "settings": ref("settings"),
            "resources": ref("resources"),
            "podAnnotations": ref("texts"),
            "nodeSelector": ref("texts"),
            "tolerations": ref("tolerations"),
        },
    )


SERVICES = ("gateway", "auth", "inference", "logging")

PROPERTIES = {
    "images": table(
        "The images of the four services.",
        {
            "registry": text("What stands before the names; empty for none.", maxLength=255),
            "tag": text(
                "The tag of all images; empty for the chart's appVersion.", pattern="^[A-Za-z0-9_.-]{0,128}$"
            ),
            "pullPolicy": text("When images are pulled.", enum=["Always", "IfNotPresent", "Never"]),
            "pullSecrets": names_of("Names of pull secrets.", 16),
        },
    ),
    "kafka": table(
        "The Kafka that events go through.",
        {
            "bootstrapServers": text(
                "host:port, several with commas.",
                pattern=r"^([^\s,:]+:[0-9]{1,5}(,[^\s,:]+:[0-9]{1,5})*)?$",
                maxLength=2048,
            ),
            "topicPrefix": text("The first part of all topics' names.", pattern="^[a-zA-Z0-9._-]{1,64}$"),
            "securityProtocol": text(
                "How the brokers are spoken to.", enum=["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
            ),
            "saslMechanism": text(
                "How the password is proved.", enum=["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
            ),
            "saslUsername": text("The user; empty without SASL.", maxLength=256),
            "existingSecret": secret("An existing Secret; empty where nothing of it is needed."),
            "privateAuthority": flag("Whether ca.crt of the Secret signed the brokers' certificates."),
            "clientCertificate": flag("Whether tls.crt and tls.key of the Secret are presented."),
            "partitions": whole("Of topics that are created.", 1, 1024),
            "replication": whole("Of topics that are created.", 1, 16),
        },
    ),
    "serviceSecrets": table(
        "What the services prove themselves to auth with.",
        {"existingSecret": secret("An existing Secret; empty for RELEASE-service-secrets.")},
    ),
    "tls": table(
        "mTLS on every hop.",
        {
            "enabled": flag("Whether it is used."),
            "allowPlaintext": flag("Must be true where it is not used: the network has to encrypt."),
            "secretNames": table(
                "Secrets with tls.crt, tls.key and ca.crt.",
                {name: secret(f"The Secret of {name}; empty for RELEASE-{name}-tls.") for name in SERVICES},
            ),
        },
    ),
    "issuer": text("The iss of tokens.", pattern=r"^https?://[^\s]{1,500}$"),
    "telemetry": table(
        "Logs, traces and metrics.",
        {
            "logLevel": text("The least level that is logged.", enum=["debug", "info", "warning", "error"]),
            "otlpEndpoint": text(
                "Where traces and metrics are sent; empty for nowhere.", pattern=r"^(https?://[^\s]{1,500})?$"
            ),
            "traceSampleRatio": {
                "type": "number",
                "description": "The share of requests that are traced.",
                "minimum": 0,
                "maximum": 1,
            },
        },
    ),
    "drain": table(
        "How a pod ends.",
        {
            "delaySeconds": whole("Seconds between not ready and the end of accepting.", 0, 300),
            "graceSeconds": whole("Seconds that running calls may go on.", 1, 3600),
        },
    ),
    "networkPolicy": table(
        "Who may call which service.",
        {
            "enabled": flag("Whether the policies are made."),
            "callers": ref("peers"),
            "metricsReaders": ref("peers"),
        },
    ),
    "gateway": service(
        "The public edge.",
        {
            "replicas": whole("How many pods.", 1, 64),
            "service": table(
                "The Service that callers use.",
                {
                    "type": text("Its type.", enum=["ClusterIP", "NodePort", "LoadBalancer"]),
                    "annotations": ref("texts"),
                },
            ),
            "publicUrl": text(
                "Where callers reach HTTP; empty: as `issuer`.", pattern="^(https?://[^ ]{1,500})?$"
            ),
            "trustedProxies": names_of("CIDR blocks of proxies whose X-Forwarded-For is believed.", 64),
            "redis": table(
                "Redis or Valkey, which several gateways share; without, each keeps limits to itself.",
                {
                    "url": text(
                        "redis://HOST:PORT/0, or rediss:// for TLS, without a password; empty: none.",
                        pattern="^(rediss?://([^ :@/]+@)?[^ @]+)?$",
                    ),
                    "existingSecret": secret("An existing Secret with the password; empty for none."),
                    "key": text("Its key.", pattern="^[-._a-zA-Z0-9]{1,253}$"),
                },
            ),
            "payloadKey": table(
                "Encryption of what jobs hold.",
                {
                    "existingSecret": secret("An existing Secret; empty for no jobs."),
                    "key": text("Its key.", pattern="^[-._a-zA-Z0-9]{1,253}$"),
                },
            ),
        },
        optional_claim=True,
    ),
    "auth": service(
        "Tokens and keys.",
        {
            "replicas": whole("How many pods; more than one needs database.url.", 1, 16),
            "database": table(
                "PostgreSQL; without, SQLite on the pod's claim.",
                {
                    "url": text(
                        "postgresql://USER@HOST:PORT/NAME, without a password; empty: SQLite.",
                        pattern="^(postgresql://[^ :@/]+@[^ @]+)?$",
                    ),
                    "existingSecret": secret("An existing Secret with the password; empty for none."),
                    "key": text("Its key.", pattern="^[-._a-zA-Z0-9]{1,253}$"),
                },
            ),
            "keyEncryption": table(
                "Encryption of signing keys at rest.",
                {
                    "existingSecret": secret("An existing Secret; empty for no encryption."),
                    "key": text("Its key.", pattern="^[-._a-zA-Z0-9]{1,253}$"),
                },
            ),
        },
        optional_claim=False,
    ),
    "inference": service(
        "Models.",
        {
            "replicas": whole("How many pods.", 1, 256),
            "modelLoadSeconds": whole("Seconds that the first load of a model may take.", 10, 86_400),
        },
        optional_claim=True,
    ),
    "logging": service("The audit log.", {}, optional_claim=False),
}

AMOUNTS = {
    "type": "object",
    "description": "Quantities by resource.",
    "additionalProperties": {"type": ["string", "number"]},
}
TOLERATION = {
    "key": text("The taint's key."),
    "operator": text("How it compares.", enum=["Exists", "Equal"]),
    "value": text("The taint's value."),
    "effect": text("The taint's effect.", enum=["NoSchedule", "PreferNoSchedule", "NoExecute"]),
    "tolerationSeconds": whole("Seconds before eviction.", 0, 31_536_000),
}
PEER = {
    name: {"type": "object", "description": "As in Kubernetes."}
    for name in ("podSelector", "namespaceSelector", "ipBlock")
}

DEFINITIONS = {
    "quantity": text(
        "A Kubernetes quantity, such as 20Gi.", pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$"
    ),
    "texts": {
        "type": "object",
        "description": "Texts by name.",
        "maxProperties": 64,
        "additionalProperties": {"type": "string"},
    },
    "settings": {
        "type": "object",
        "description": "Settings of the service, by their names in lower case.",
        "maxProperties": 64,
        "propertyNames": {"pattern": "^[a-z][a-z0-9_]{0,63}$"},
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    },
    "resources": table(
        "Requests and limits of the container.",
        {"requests": AMOUNTS, "limits": AMOUNTS},
        optional=("requests", "limits"),
    ),
    "tolerations": {
        "type": "array",
        "description": "Tolerations of the pods.",
        "maxItems": 32,
        "items": table("A toleration.", TOLERATION, optional=tuple(TOLERATION)),
    },
    "peers": {
        "type": "array",
        "description": "A list of NetworkPolicyPeer.",
        "maxItems": 32,
        "items": table("A NetworkPolicyPeer.", PEER, optional=tuple(PEER)) | {"minProperties": 1},
    },
}


def render() -> str:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the llmos chart",
        # Helm adds the table `global` to the values of every chart.
        **table("Everything.", {"global": table("Not used.", {}), **PROPERTIES}, optional=("global",)),
        "definitions": DEFINITIONS,
    }
    return json.dumps(schema, indent=1) + "\n"


def main(argv: list[str]) -> int:
    if argv == ["--check"]:
        if PATH.read_text() != render():
            print(f"{PATH.name} is stale: run `python -m deploy.helm.schema`", file=sys.stderr)
            return 1
        return 0
    PATH.write_text(render())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
