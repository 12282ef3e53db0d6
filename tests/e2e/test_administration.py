"""An administrator's first hour, on real processes and through the gateway: `llmos admin` and the client."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import llmos_client as sdk
import pytest
from llmos.auth.v1 import resource_pb2
from llmos_client import AsyncClient, AuditFilter, Resource, ResourceKind

from deploy.dev.broker import Broker
from deploy.dev.environment import ROOT
from deploy.dev.ports import PortReservations
from tests.framework.forks import Forks
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

TIMEOUT_S = 30.0
COMMAND = ("-m", "llmos_client.cli", "admin")


@pytest.fixture(scope="module")
async def mesh(
    tmp_path_factory: pytest.TempPathFactory,
    broker: Broker,
    reservations: PortReservations,
    forks: Forks | None,
) -> AsyncIterator[MeshHarness]:
    async with MeshHarness(tmp_path_factory.mktemp("mesh"), broker, reservations, forks=forks) as mesh:
        await mesh.start()
        async with connect(mesh) as client:

            async def replica_found() -> bool:
                return any(model.ready for model in await client.models())

            await eventually(replica_found, timeout_s=TIMEOUT_S)
        yield mesh


def connect(mesh: MeshHarness, key: str = "") -> AsyncClient:
    """As the administrator, or with a key."""
    if key:
        return AsyncClient(mesh.target(), api_key=key, model="echo")
    return AsyncClient(mesh.target(), api_key_file=mesh.state.admin_key, model="echo")


class Admin:
    """`llmos admin` as a process, in a folder of its own."""

    def __init__(self, mesh: MeshHarness, folder: Path, key_file: Path | None = None) -> None:
        self.folder = folder
        self._environment = {name: value for name, value in os.environ.items() if "LLMOS" not in name} | {
            "LLMOS_TARGET": mesh.target(),
            "LLMOS_API_KEY_FILE": str(key_file or mesh.state.admin_key),
            "PYTHONPATH": f"{ROOT / 'clients/python'}{os.pathsep}{ROOT / 'protos/gen'}",
        }

    async def __call__(self, *arguments: str, fails: bool = False) -> tuple[str, str]:
        """(stdout, stderr)"""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *COMMAND,
            *arguments,
            env=self._environment,
            cwd=self.folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
        assert (process.returncode != 0) is fails, (arguments, out, err)
        return out.decode(), err.decode()


async def test_the_first_hour(mesh: MeshHarness, tmp_path: Path) -> None:
    admin = Admin(mesh, tmp_path)
    await admin("create", "tenant", "acme", "--name", "ACME")
    await admin(
        *("create", "role", "small-models", "--tenant", "acme"),
        *("--rule", "{id: small, effect: allow, scopes: [generate], condition: {models: ['ech*']}}"),
    )
    await admin(
        *("create", "client", "acme-app", "--tenant", "acme", "--role", "small-models"),
        *("--scope", "models.read", "--secret-file", "client-secret"),
    )
    key, _ = await admin("create", "api-key", "--client", "acme-app", "--id", "ci")
    key = key.strip()
    secret = (tmp_path / "client-secret").read_text().strip()

    # the key is of use
    async with connect(mesh, key) as client:
        assert (await client.generate("hello", max_tokens=4)).text
        with pytest.raises(sdk.PermissionDenied):
            await client.admin.list(ResourceKind.TENANT)
    said, _ = await admin("explain", "--client", "acme-app", "--model", "echo")
    assert said.startswith("allowed by role small-models, rule small")
    said, _ = await admin("explain", "--client", "acme-app", "--model", "large")
    assert said.startswith("denied")

    # a file of all of it; applied twice it changes nothing
    await admin("export", "-o", "all.yaml", "--digests")
    for _ in range(2):
        done, note = await admin("apply", "-f", "all.yaml", "--prune")
        assert done == "ACTION\tKIND\tID\n"
        assert "unchanged" in note
        assert "created" not in note
    text = (tmp_path / "all.yaml").read_text().replace("display_name: ACME", "display_name: Acme Ltd")
    (tmp_path / "all.yaml").write_text(text)
    done, _ = await admin("apply", "-f", "all.yaml")
    assert "updated\ttenant\tacme" in done

    # who did what
    changes, _ = await admin("changes", "tenant", "acme")
    assert 'display_name: "ACME" -> "Acme Ltd"' in changes
    assert "default/admin" in changes
    changes, _ = await admin("changes", "--limit", "1000", "--json")
    found, _ = await admin("get", "api-key", "--prefix", key[:14])
    assert "ci\tacme-app" in found

    # R32: what was shown once is nowhere else
    await everything_is_written(mesh)
    for canary in (key, secret, mesh.admin_key):
        assert canary not in changes
        for path in files(mesh):
            assert canary.encode() not in path.read_bytes(), path

    # a leaked key is found by its prefix, and refused
    await admin("revoke", "api-key", "ci", "--cut-streams")

    async def refused() -> bool:
        async with connect(mesh, key) as client:
            try:
                await client.models()
            except sdk.AuthenticationError:
                return True
            return False

    await eventually(refused, timeout_s=10)


async def everything_is_written(mesh: MeshHarness) -> None:
    """Each request of administration is in the audit log."""
    async with connect(mesh) as client:

        async def recorded() -> bool:
            found = await client.audit.search(AuditFilter(client_id="admin"), limit=1000)
            return any(one.method.endswith("/CreateResource") and one.outcome for one in found)

        await eventually(recorded, timeout_s=TIMEOUT_S)


def files(mesh: MeshHarness) -> list[Path]:
    """Logs, databases and spools of all services."""
    return [path for path in mesh.state.root.rglob("*") if path.is_file() and path != mesh.state.admin_key]


async def test_two_administrators_edit_one_client(mesh: MeshHarness) -> None:
    async with connect(mesh) as client:
        await client.admin.create(Resource(tenant=resource_pb2.Tenant(id="edited")))
        app = Resource(client=resource_pb2.Client(id="edited-app", tenant_id="edited"))
        made = (await client.admin.create(app, without_secret=True)).resource
        made.client.display_name = "mine"
        theirs = Resource()
        theirs.CopyFrom(made)
        theirs.client.display_name = "theirs"
        await client.admin.update(theirs, ["display_name"])
        with pytest.raises(sdk.Conflict) as caught:
            await client.admin.update(made, ["display_name"])
        assert caught.value.reason == "CONFLICT"
        assert "was changed by default/admin" in caught.value.message
        found = await client.admin.get(ResourceKind.CLIENT, "edited-app")
        assert found.client.display_name == "theirs"


async def test_r26_a_tenants_administrator_is_told_nothing_of_others(
    mesh: MeshHarness, tmp_path: Path
) -> None:
    admin = Admin(mesh, tmp_path)
    for tenant in ("one", "two"):
        await admin("create", "tenant", tenant)
        await admin("create", "client", f"{tenant}-app", "--tenant", tenant, "--scope", "generate")
    await admin(
        *("create", "client", "one-admin", "--tenant", "one", "--role", "tenant-admin"),
        *("--secret-file", "secret"),
    )
    await admin("create", "api-key", "--client", "one-admin", "--secret-file", "key")
    theirs = Admin(mesh, tmp_path, tmp_path / "key")
    clients, _ = await theirs("get", "clients")
    assert [line.split("\t")[0] for line in clients.splitlines()[1:]] == ["one-admin", "one-app"]
    for kind, resource_id in (("client", "two-app"), ("client", "never"), ("tenant", "two")):
        _, said = await theirs("get", kind, resource_id, fails=True)
        assert "(NOT_FOUND)" in said
    _, said = await theirs("create", "client", "mine", "--tenant", "two", fails=True)
    assert "(NOT_FOUND)" in said
    _, said = await theirs("create", "client", "boss", "--tenant", "one", "--scope", "admin", fails=True)
    assert "(POLICY_DENIED)" in said
    await theirs("create", "client", "helper", "--tenant", "one", "--role", "user")
    exported, _ = await theirs("export")
    assert "one-app" in exported
    assert "two" not in exported
