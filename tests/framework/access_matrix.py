"""Who may call what at the gateway: every gRPC method and every HTTP route with every kind of credential.

    python -m tests.framework.access_matrix --write

starts a mesh, measures, and writes tests/e2e/access_matrix.md, which a test compares. The methods are those
that the gateway's reflection names, so a new one cannot be left out. Each is sent bytes that are no message:
who may call it is told `REQUEST_INVALID`, since a request is parsed for those alone whom the chain lets
through, and nothing is done for anybody.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path

import grpc
import httpx
from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from llmos.auth.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    policy_pb2,
    resource_pb2,
    token_service_pb2,
)
from llmos.auth.v1 import token_service_pb2_grpc as token_grpc

from deploy.dev.ports import PortReservations
from services.gateway.oauth import answers
from services.mesh import status
from services.mesh.server import INFRASTRUCTURE
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

FILE = Path(__file__).parents[1] / "e2e" / "access_matrix.md"
COMMAND = "python -m tests.framework.access_matrix --write"
SERVICES = ("auth", "inference", "gateway")
TIMEOUT_S = 20.0
NO_MESSAGE = b"\xff\xff"
ALLOWED = "REQUEST_INVALID"
RULE = policy_pb2.AddressRule(id="test-net", effect=policy_pb2.EFFECT_DENY, cidr="203.0.113.0/24")
CLIENTS = {
    "user": ("acme", "user"),
    "user of another tenant": ("other", "user"),
    "tenant admin": ("acme", "tenant-admin"),
    "auditor": ("acme", "auditor"),
    "admin of another tenant": ("other", "tenant-admin"),
}
"""Tenant and role."""


def _name(kind: resource_pb2.ResourceKind.ValueType, resource_id: str) -> admin_service_pb2.ResourceName:
    return admin_service_pb2.ResourceName(kind=kind, id=resource_id)


def _get(kind: resource_pb2.ResourceKind.ValueType, resource_id: str) -> object:
    return admin_service_pb2.GetResourceRequest(name=_name(kind, resource_id))


ROUTES = (
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/none"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/none"),
    ("DELETE", "/v1/responses/none"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/none"),
    ("DELETE", "/v1/files/none"),
    ("GET", "/v1/files/none/content"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/none"),
    ("POST", "/v1/batches/none/cancel"),
    ("GET", answers.METADATA),
    ("GET", answers.JWKS),
    ("POST", answers.TOKEN),
    ("POST", answers.INTROSPECT),
    ("POST", answers.REVOKE),
)
"""All of the HTTP edge, which a unit test keeps so."""
OBJECTS: Mapping[str, tuple[str, object]] = {
    "GetResource: a tenant": ("GetResource", _get(resource_pb2.RESOURCE_KIND_TENANT, "acme")),
    "GetResource: a client": ("GetResource", _get(resource_pb2.RESOURCE_KIND_CLIENT, "acme-user")),
    "ExplainDecision: for a client": (
        "ExplainDecision",
        admin_service_pb2.ExplainDecisionRequest(
            subject=_name(resource_pb2.RESOURCE_KIND_CLIENT, "acme-user"), method="/any"
        ),
    ),
    "ExportConfiguration: of a tenant": (
        "ExportConfiguration",
        admin_service_pb2.ExportConfigurationRequest(tenant_id="acme"),
    ),
    "ExportConfiguration: all that the caller may see": (
        "ExportConfiguration",
        admin_service_pb2.ExportConfigurationRequest(),
    ),
    "UpdateResource: an address rule of the deployment": (
        "UpdateResource",
        admin_service_pb2.UpdateResourceRequest(resource=resource_pb2.Resource(address_rule=RULE)),
    ),
    "CreateResource: a client with the role admin": (
        "CreateResource",
        admin_service_pb2.CreateResourceRequest(
            resource=resource_pb2.Resource(
                client=resource_pb2.Client(id="acme-user", tenant_id="acme", roles=["admin"])
            )
        ),
    ),
}
"""What belongs to the tenant `acme`, or to the deployment."""

Metadata = Sequence[tuple[str, str]]
Table = dict[str, dict[str, str]]
"""The answer by row and credential."""


async def credentials(mesh: MeshHarness) -> dict[str, Metadata]:
    """Metadata by the kind of credential, made by the administrator. Tenants: `acme` and `other`."""
    stub = admin_service_pb2_grpc.AdminServiceStub(mesh.channel())

    async def create(**kind: object) -> str:
        resource = resource_pb2.Resource(**kind)  # type: ignore[arg-type]
        request = admin_service_pb2.CreateResourceRequest(resource=resource)
        made = await stub.CreateResource(request, metadata=mesh.bearer(), timeout=TIMEOUT_S)
        return made.secret

    for tenant_id in ("acme", "other"):
        await create(tenant=resource_pb2.Tenant(id=tenant_id))
    keys = {}
    for name, (tenant_id, role) in CLIENTS.items():
        client_id = f"{tenant_id}-{role}"
        await create(client=resource_pb2.Client(id=client_id, tenant_id=tenant_id, roles=[role]))
        keys[name] = await create(api_key=resource_pb2.ApiKey(client_id=client_id))
    await create(address_rule=RULE)
    soon = datetime.now(UTC) + timedelta(seconds=2)
    expired = await create(api_key=resource_pb2.ApiKey(client_id="acme-user", expire_time=soon))

    async def is_expired() -> bool:
        return datetime.now(UTC) > soon + timedelta(seconds=1)

    await eventually(is_expired, timeout_s=10, what="the key expires")
    found: dict[str, Metadata] = {
        "none": (),
        "malformed": mesh.bearer("llmos_nonsense"),
        "expired": mesh.bearer(expired),
        **{name: mesh.bearer(key) for name, key in keys.items()},
        "admin": mesh.bearer(),
        "a service": mesh.bearer(await _service_token(mesh)),
    }
    order = (*("none", "malformed", "expired", "user", "user of another tenant", "auditor"),)
    order += ("tenant admin", "admin of another tenant", "admin", "a service")
    return {name: found[name] for name in order}


async def _service_token(mesh: MeshHarness) -> str:
    """Of the kind that it has: for the gateway no service gets one."""
    stub = token_grpc.TokenServiceStub(mesh.channel("auth"))
    issued = await stub.IssueToken(
        token_service_pb2.IssueTokenRequest(
            client_id="service:inference",
            client_secret=(mesh.state.secrets / "inference").read_text().strip(),
            audience=token_service_pb2.AUDIENCE_AUTH,
        )
    )
    return issued.access_token.token


async def methods(channel: grpc.aio.Channel) -> list[str]:
    """The full names of all methods that the server has, besides health and reflection."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def question() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    names = [
        service.name
        async for answer in stub.ServerReflectionInfo(question(), timeout=TIMEOUT_S)
        for service in answer.list_services_response.service
    ]
    return [
        f"/{name}/{method.name}"
        for name in sorted(names)
        if not f"/{name}/".startswith(INFRASTRUCTURE)
        for method in descriptor_of(name).methods
    ]


def descriptor_of(service: str) -> ServiceDescriptor:
    """Of a service of ours: by our rules it stands in a file of its own name."""
    package, _, name = service.rpartition(".")
    file = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    found: ServiceDescriptor = import_module(f"{package}.{file}_pb2").DESCRIPTOR.services_by_name[name]
    return found


async def over_grpc(channel: grpc.aio.Channel, who: Mapping[str, Metadata]) -> Table:
    """Every method with every credential."""
    table: Table = {}
    for method in await methods(channel):
        table[method] = {}
        for name, metadata in who.items():
            call = channel.unary_stream(method)(NO_MESSAGE, metadata=metadata, timeout=TIMEOUT_S)
            try:
                await call.read()
                reason = "OK"
            except grpc.aio.AioRpcError as error:
                reason = status.from_rpc_error(error).reason
            table[method][name] = "allowed" if reason == ALLOWED else reason
    return table


async def over_objects(channel: grpc.aio.Channel, who: Mapping[str, Metadata]) -> Table:
    """What belongs to somebody, with every credential."""
    stub = admin_service_pb2_grpc.AdminServiceStub(channel)
    table: Table = {}
    for row, (method, request) in OBJECTS.items():
        table[row] = {}
        for name, metadata in who.items():
            try:
                await getattr(stub, method)(request, metadata=metadata, timeout=TIMEOUT_S)
                table[row][name] = "OK"
            except grpc.aio.AioRpcError as error:
                table[row][name] = status.from_rpc_error(error).reason
    return table


async def over_http(url: str, who: Mapping[str, Metadata]) -> Table:
    """Every route with every credential: the status, and what the body says of an error. Bodies are empty."""
    table: Table = {}
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        for method, path in ROUTES:
            row = table[f"{method} {path}"] = {}
            for name, metadata in who.items():
                answer = await client.request(method, path, headers=dict(metadata))
                row[name] = f"{answer.status_code} {_code(answer)}".strip()
    return table


def _code(answer: httpx.Response) -> str:
    error = answer.json().get("error", "") if answer.status_code != httpx.codes.OK else ""
    return str(error.get("code") or "") if isinstance(error, dict) else str(error)


@dataclass(frozen=True, slots=True)
class Matrix:
    """What was measured."""

    who: list[str]
    by_method: Table
    by_object: Table
    by_route: Table


async def measure(mesh: MeshHarness) -> Matrix:
    """The matrix of a running mesh, of auth, inference and gateway at least."""
    who = await credentials(mesh)
    channel = mesh.channel()
    return Matrix(
        list(who),
        await over_grpc(channel, who),
        await over_objects(channel, who),
        await over_http(mesh.http_url(), who),
    )


def render(matrix: Matrix) -> str:
    """The file's text."""
    who = matrix.who
    parts = [
        "# Who may call what",
        f"Measured at the gateway of a mesh of real processes, written by\n`{COMMAND}`, and compared by\n"
        "tests/e2e/test_access_matrix.py. Callers are of the tenant `acme`, with API keys of clients that\n"
        "have a built-in role, save where a column says otherwise.",
        "## gRPC",
        "Each method is sent bytes that are no message: `allowed` is whoever is told so. A method that is\n"
        "neither in `services.mesh.actions.ACTIONS` nor open is refused to everybody.",
        _markdown("method", who, matrix.by_method),
        "## What belongs to a tenant",
        "Administration, with requests for what is of the tenant `acme`, or of the deployment.",
        _markdown("request", who, matrix.by_object),
        "## HTTP",
        "Each route with an empty body.",
        _markdown("route", who, matrix.by_route),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(what: str, who: Sequence[str], table: Table) -> str:
    lines = [f"| {what} | {' | '.join(who)} |", "|---" * (len(who) + 1) + "|"]
    lines += [
        f"| `{row.lstrip('/')}` | {' | '.join(answers_[name] for name in who)} |"
        for row, answers_ in table.items()
    ]
    return "\n".join(lines)


async def _main() -> int:
    parser = argparse.ArgumentParser(description="Measures who may call what.")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}; else only compare")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        async with MeshHarness(Path(folder), None, PortReservations()) as mesh:
            await mesh.start(*SERVICES)
            text = render(await measure(mesh))
    if options.write:
        FILE.write_text(text)
        return 0
    difference = list(difflib.unified_diff(FILE.read_text().splitlines(), text.splitlines(), lineterm=""))
    print("\n".join(difference))
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
