"""`llmos admin` against a server that answers by a script."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from llmos.auth.v1 import admin_service_pb2 as pb
from llmos.auth.v1 import policy_pb2, resource_pb2
from llmos.gateway.v1 import policy_service_pb2
from llmos_client import Resource
from llmos_client.cli import app
from typer.testing import CliRunner, Result

from tests.framework.scripted_gateway import Fail, ScriptedGateway

Llmos = Callable[..., Result]
CLIENT = Resource(client=resource_pb2.Client(id="app", tenant_id="acme", scopes=["generate"]), etag="7")
KEY = Resource(api_key=resource_pb2.ApiKey(id="key_1", client_id="app", prefix="AbCdEfGh"))
BUDGET = policy_pb2.PlanLimit(
    unit=policy_service_pb2.LIMIT_UNIT_BUDGET_TOKENS,
    scope=policy_service_pb2.LIMIT_SCOPE_CLIENT,
    limit=5,
    period=policy_pb2.BUDGET_PERIOD_DAY,
)
SECRET = "llmos_canary"


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway() as server:
        yield server


@pytest.fixture
def llmos(gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Llmos:
    for name in [name for name in os.environ if name.startswith("LLMOS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, question: str | None = None) -> Result:
        environment = {"LLMOS_TARGET": gateway.target, "LLMOS_API_KEY": "llmos_mine", "COLUMNS": "200"}
        return CliRunner(env=environment).invoke(app, ["admin", *arguments], input=question)

    return run


def sent(gateway: ScriptedGateway, place: int = -1) -> Any:
    return gateway.calls[place].request


def test_lists_and_finds_a_leaked_key(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(pb.ListResourcesResponse(resources=[KEY]))
    done = llmos("get", "api-key", "--prefix", "llmos_AbCdEfGhRestOfTheKey")
    assert done.exit_code == 0, done.output
    assert sent(gateway).prefix == "AbCdEfGh"
    header, line = done.stdout.splitlines()
    assert header.split("\t")[:3] == ["ID", "CLIENT", "PREFIX"]
    assert line.split("\t")[:3] == ["key_1", "app", "AbCdEfGh"]


@pytest.mark.parametrize("kind", ["client", "clients", "CLIENT"])
def test_shows_one_as_yaml(gateway: ScriptedGateway, llmos: Llmos, kind: str) -> None:
    gateway.will(pb.GetResourceResponse(resource=CLIENT))
    done = llmos("get", kind, "app")
    assert done.stdout == "- kind: client\n  id: app\n  tenant_id: acme\n  scopes:\n  - generate\n"


def test_a_secret_goes_to_stdout_alone(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(pb.CreateResourceResponse(resource=CLIENT, secret=SECRET))
    done = llmos("create", "client", "app", "--tenant", "acme", "--scope", "generate", "--role", "user")
    assert (done.exit_code, done.stdout) == (0, f"{SECRET}\n")
    assert "cannot be read again" in done.stderr
    assert SECRET not in done.stderr
    assert (list(sent(gateway).resource.client.scopes), list(sent(gateway).resource.client.roles)) == (
        ["generate"],
        ["user"],
    )


def test_a_secret_goes_into_a_private_file(gateway: ScriptedGateway, llmos: Llmos, tmp_path: Path) -> None:
    gateway.will(pb.CreateResourceResponse(resource=KEY, secret=SECRET))
    done = llmos("create", "api-key", "--client", "app", "--expires-in", "90d", "--secret-file", "secret")
    assert done.exit_code == 0, done.output
    assert SECRET not in done.output
    path = tmp_path / "secret"
    assert path.read_text() == f"{SECRET}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sent(gateway).resource.api_key.HasField("expire_time")
    # what is there is not replaced, and then nothing is made either
    done = llmos("rotate", "api-key", "key_1", "--secret-file", "secret")
    assert done.exit_code == 2
    assert len(gateway.calls) == 1


def test_no_file_is_left_where_nothing_was_made(
    gateway: ScriptedGateway, llmos: Llmos, tmp_path: Path
) -> None:
    gateway.will(Fail(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"))
    assert llmos("rotate", "client", "app", "--secret-file", "secret").exit_code == 1
    assert not (tmp_path / "secret").exists()


def test_makes_every_kind(gateway: ScriptedGateway, llmos: Llmos) -> None:
    made: list[tuple[list[str], str, Any]] = [
        (
            ["tenant", "lab", "--parent", "acme"],
            "tenant",
            resource_pb2.Tenant(id="lab", parent_id="acme", plan_id="free"),
        ),
        (
            ["role", "r", "--rule", "{id: a, effect: deny, scopes: ['*']}"],
            "role",
            policy_pb2.Role(
                id="r", rules=[policy_pb2.Rule(id="a", effect=policy_pb2.EFFECT_DENY, scopes=["*"])]
            ),
        ),
        (
            ["plan", "p", "--limit", "{unit: budget_tokens, scope: client, limit: 5, period: day}"],
            "plan",
            policy_pb2.Plan(id="p", limits=[BUDGET]),
        ),
        (
            ["address-rule", "office", "--deny", "10.0.0.0/8"],
            "address_rule",
            policy_pb2.AddressRule(id="office", effect=policy_pb2.EFFECT_DENY, cidr="10.0.0.0/8"),
        ),
        (
            [
                *("identity-provider", "corp", "--tenant", "acme", "--issuer", "https://idp.example"),
                *("--audience", "llmos", "--claim", "groups=a=b:user"),
            ],
            "identity_provider",
            resource_pb2.IdentityProvider(
                id="corp",
                tenant_id="acme",
                issuer="https://idp.example",
                audience="llmos",
                claim_rules=[resource_pb2.ClaimRule(claim="groups", value="a=b", role_id="user")],
            ),
        ),
    ]
    for arguments, field, value in made:
        gateway.will(pb.CreateResourceResponse(resource=Resource(**{field: value})))
        done = llmos("create", *arguments)
        assert (done.exit_code, done.stdout) == (0, ""), done.output
        assert getattr(sent(gateway).resource, field) == value


def test_edits_with_the_etag_that_was_read(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(pb.GetResourceResponse(resource=CLIENT))
    gateway.will(pb.UpdateResourceResponse(resource=CLIENT))
    done = llmos("edit", "client", "app", "--set", "scopes=[models.read]", "--set", "display_name=a=b")
    assert done.exit_code == 0, done.output
    assert sent(gateway).resource.etag == "7"
    assert list(sent(gateway).update_mask.paths) == ["scopes", "display_name"]
    assert list(sent(gateway).resource.client.scopes) == ["models.read"]
    assert sent(gateway).resource.client.display_name == "a=b"


def test_a_conflict_says_so(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(pb.GetResourceResponse(resource=CLIENT))
    gateway.will(Fail(grpc.StatusCode.ABORTED, "CONFLICT", "It was changed by acme/bob.", "Read it again."))
    done = llmos("disable", "client", "app")
    assert done.exit_code == 1
    assert "changed by acme/bob" in done.stderr
    assert "Read it again" in done.stderr


def test_revokes_one_or_the_other(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(pb.RevokeResponse())
    assert llmos("revoke", "client", "app", "--cut-streams").exit_code == 0
    assert (sent(gateway).name.id, sent(gateway).cut_streams) == ("app", True)
    gateway.will(pb.RevokeResponse())
    assert llmos("revoke", "--token-id", "jti").exit_code == 0
    assert sent(gateway).token_id == "jti"
    for wrong in (["revoke"], ["revoke", "client"], ["revoke", "client", "a", "--token-id", "b"]):
        assert llmos(*wrong).exit_code == 2
    for wrong in (["get", "robot"], ["rotate", "client", "a", "--overlap", "long"], ["explain"]):
        assert llmos(*wrong).exit_code == 2


def test_shows_what_was_changed(gateway: ScriptedGateway, llmos: Llmos) -> None:
    after = Resource(client=resource_pb2.Client(id="app", tenant_id="acme"))
    change = pb.ResourceChange(version=5, actor="acme/bob", before=CLIENT, after=after, note="revoked")
    change.name.kind, change.name.id = resource_pb2.RESOURCE_KIND_CLIENT, "app"
    gateway.will(pb.ListChangesResponse(changes=[change]))
    done = llmos("changes", "client", "app")
    assert 'client app\tscopes: ["generate"] -> -, revoked' in done.stdout


def test_explains(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(pb.ExplainDecisionResponse(allowed=False, rule="default", explanation="Nothing allows it."))
    done = llmos("explain", "--client", "app", "--model", "m", "--label", "team=red")
    assert done.stdout == "denied by default: Nothing allows it.\n"
    assert dict(sent(gateway).labels) == {"team": "red"}


def test_exports_and_applies(gateway: ScriptedGateway, llmos: Llmos, tmp_path: Path) -> None:
    gateway.will(pb.ExportConfigurationResponse(resources=[CLIENT, KEY]))
    assert llmos("export", "-o", "all.yaml", "--digests").exit_code == 0
    assert sent(gateway).include_digests
    assert stat.S_IMODE((tmp_path / "all.yaml").stat().st_mode) == 0o600
    applied = [
        pb.AppliedResource(action=pb.AppliedResource.ACTION_UNCHANGED),
        pb.AppliedResource(action=pb.AppliedResource.ACTION_UPDATED),
    ]
    applied[1].name.kind, applied[1].name.id = resource_pb2.RESOURCE_KIND_API_KEY, "key_1"
    gateway.will(pb.ApplyConfigurationResponse(applied=applied))
    done = llmos("apply", "-f", "all.yaml", "--prune", "--dry-run")
    assert done.stdout == "ACTION\tKIND\tID\nupdated\tapi-key\tkey_1\n"
    assert "would be: 1 unchanged, 1 updated" in done.stderr
    request = sent(gateway)
    assert (request.prune, request.dry_run, len(request.resources)) == (True, True, 2)
    assert request.resources[0].client == CLIENT.client
    gateway.will(pb.ApplyConfigurationResponse())
    assert llmos("apply", "-f", "-", question="kind: tenant\nid: t\n").exit_code == 0
    assert sent(gateway).resources[0].tenant.id == "t"


def test_a_refused_file_names_the_line(gateway: ScriptedGateway, llmos: Llmos, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("- kind: tenant\n  id: t\n- kind: client\n  id: x\n")
    violation = ("resources[1].client.scopes", "`fly` is not a scope")
    gateway.will(Fail(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID", violations=(violation,)))
    done = llmos("apply", "-f", "f.yaml")
    assert done.exit_code == 1
    assert "f.yaml, line 3" in done.stderr
    assert llmos("apply", "-f", "no-such-file").exit_code == 2
    (tmp_path / "f.yaml").write_text("- kind: tenant\n  colour: red\n")
    done = llmos("apply", "-f", "f.yaml")
    assert done.exit_code == 2
    assert "there is no field `colour`" in done.stderr
    assert len(gateway.calls) == 1
