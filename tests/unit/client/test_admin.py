"""Administration by both clients, and resources as YAML."""

from __future__ import annotations

from datetime import UTC, datetime

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmos.auth.v1 import admin_service_pb2 as pb
from llmos.auth.v1 import policy_pb2, resource_pb2
from llmos_client import ConfigurationError, Conflict, Resource, ResourceKind, Unavailable, documents
from llmos_client.admin_types import name_of

from tests.framework.both_clients import UNAVAILABLE, Both
from tests.framework.scripted_gateway import Fail, ScriptedGateway

TENANT = Resource(tenant=resource_pb2.Tenant(id="acme"), etag="3")


async def test_pages_are_put_together(both: Both, gateway: ScriptedGateway) -> None:
    gateway.will(pb.ListResourcesResponse(resources=[TENANT], next_page_token="more"))
    gateway.will(pb.ListResourcesResponse(resources=[TENANT]))
    assert await both.call("admin.list", ResourceKind.TENANT, tenant_id="t") == [TENANT, TENANT]
    assert [call.request.page_token for call in gateway.calls] == ["", "more"]


async def test_changes_are_cut_to_the_limit(both: Both, gateway: ScriptedGateway) -> None:
    page = pb.ListChangesResponse(changes=[pb.ResourceChange(version=n) for n in (3, 2)], next_page_token="t")
    gateway.will(page)
    gateway.will(page)
    found = await both.call("admin.changes", limit=3)
    assert [change.version for change in found] == [3, 2, 3]
    with pytest.raises(ValueError, match="kind"):
        await both.call("admin.changes", ResourceKind.CLIENT)


async def test_what_makes_a_secret_is_not_done_twice(both: Both, gateway: ScriptedGateway) -> None:
    for name, arguments in (("create", [TENANT]), ("rotate", [ResourceKind.CLIENT, "app"])):
        gateway.calls.clear()
        gateway.will(UNAVAILABLE)
        with pytest.raises(Unavailable):
            await both.call(f"admin.{name}", *arguments)
        assert len(gateway.calls) == 1
    gateway.will(UNAVAILABLE)
    gateway.will(pb.GetResourceResponse(resource=TENANT))
    assert await both.call("admin.get", ResourceKind.TENANT, "acme") == TENANT


async def test_a_secret_is_in_no_repr(both: Both, gateway: ScriptedGateway) -> None:
    gateway.will(pb.CreateResourceResponse(resource=TENANT, secret="llmos_canary"))
    made = await both.call("admin.create", TENANT)
    assert made.secret == "llmos_canary"
    assert "canary" not in repr(made)


async def test_a_conflict_is_one(both: Both, gateway: ScriptedGateway) -> None:
    gateway.will(Fail(grpc.StatusCode.ABORTED, "CONFLICT", "It was changed."))
    with pytest.raises(Conflict) as caught:
        await both.call("admin.update", TENANT, ["display_name"])
    assert caught.value.reason == "CONFLICT"
    assert list(gateway.calls[0].request.update_mask.paths) == ["display_name"]


async def test_asks_what_policy_decides(both: Both, gateway: ScriptedGateway) -> None:
    gateway.will(pb.ExplainDecisionResponse(allowed=True, rule="role user"))
    found = await both.call(
        "admin.explain", ResourceKind.API_KEY, "k", model="m", time=datetime(2030, 1, 1, tzinfo=UTC)
    )
    assert found.allowed
    request = gateway.calls[0].request
    assert request.subject == name_of(ResourceKind.API_KEY, "k")
    assert request.method.endswith("GenerationService/Generate")
    assert request.time.seconds == 1893456000


# -- documents -------------------------------------------------------------------------------------------

EXAMPLE = """
- kind: role
  id: small
  tenant_id: acme
  scopes: [generate]
  rules:
    - id: office-hours
      effect: allow
      scopes: ["*"]
      condition:
        models: [small-*]
        times: [{days: [1, 2], start: 08:00, end: 18:00, time_zone: Europe/Berlin}]
        labels: {team: red}
- kind: client
  id: alice
  tenant_id: acme
  client_kind: user
---
kind: api_key
id: ci
client_id: alice
expire_time: 2030-01-01T00:00:00Z
addresses:
  - 2001:db8::/32
---
kind: plan
id: big
limits: [{unit: tokens_per_minute, scope: tenant, limit: 1000000}]
"""


def test_reads_lists_and_documents() -> None:
    found = documents.read(EXAMPLE, "x.yaml")
    assert [ResourceKind.of(one.resource) for one in found] == ["role", "client", "api-key", "plan"]
    assert [one.line for one in found] == [2, 14, 19, 26]
    role = found[0].resource.role
    assert role.rules[0].effect == policy_pb2.EFFECT_ALLOW
    assert (role.rules[0].condition.times[0].start, role.rules[0].condition.times[0].end) == (
        "08:00",
        "18:00",
    )
    assert found[1].resource.client.kind == resource_pb2.CLIENT_KIND_USER
    assert found[2].resource.api_key.expire_time.seconds == 1893456000
    assert found[3].resource.plan.limits[0].limit == 1_000_000


def test_writes_what_it_reads() -> None:
    resources = [one.resource for one in documents.read(EXAMPLE, "x")]
    assert [one.resource for one in documents.read(documents.write(resources), "y")] == resources


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- kind: client\n  idd: x", "line 1 (client): there is no field `idd`"),
        ("- kind: client\n  id: x\n  kind: user", "line 3: the field `kind` comes twice"),
        ("- kind: client\n  id: x\n  scopes: generate", "line 1 (client x): `scopes` must be a list"),
        ("- kind: client\n  disabled: yes", "`disabled` must be true or false"),
        ("- kind: client\n  id: 12", "`id` must be a text"),
        ("- kind: robot", "must be one of tenant"),
        ("- id: x", "must be one of tenant"),
        ("- just text", "a mapping that begins with `kind`"),
        ("- &a {kind: client}\n- *a", "line 2: aliases are not read"),
        ("kind: plan\nlimits: [{unit: miles}]", "must be one of requests_per_minute"),
        ("kind: role\nrules: [{id: a, efect: allow}]", "no field `efect`"),
        ("kind: api-key\nsecret_sha256: '?'", "must be base64"),
        ("kind: api-key\nexpire_time: soon", "expire_time"),
        ("kind: api-key\nlast_use_time: 2030-01-01T00:00:00Z", "no field `last_use_time`"),
        ("a: [", "x.yaml, line 1"),
        ("- {1: 2}", "a field's name must be a text"),
        ("!!python/object/apply:os.system ['true']", "x.yaml"),
        ("[" * 1500, "x.yaml"),
    ],
)
def test_says_where_it_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        documents.read(text, "x.yaml")
    assert says in caught.value.message
    assert caught.value.message.startswith("x.yaml")


def test_an_empty_file_is_no_resource() -> None:
    assert documents.read("", "x") == documents.read("---\n", "x") == documents.read("[]", "x") == []
    assert documents.read(documents.write([]), "x") == []


def test_edits_fields_as_they_are_written() -> None:
    resource = documents.read(EXAMPLE, "x")[1].resource
    paths = documents.edit(
        resource, {"display_name": "yes: 1", "scopes": "[generate]", "client_kind": "service", "roles": "[]"}
    )
    assert paths == ["display_name", "scopes", "kind", "roles"]
    assert resource.client.display_name == "yes: 1"
    assert resource.client.kind == resource_pb2.CLIENT_KIND_SERVICE
    with pytest.raises(ConfigurationError):
        documents.edit(resource, {"no_such": "1"})
    with pytest.raises(ConfigurationError):
        documents.edit(resource, {"scopes": "generate"})


@given(
    st.lists(
        st.builds(
            lambda name, texts, disabled: Resource(
                client=resource_pb2.Client(
                    id="a", display_name=name, scopes=texts, jwks_json=name, disabled=disabled
                )
            ),
            st.text(st.characters(codec="utf-8"), max_size=20),
            st.lists(st.text("ab:#-'\"{}[]&*!|>%@`0123456789.eE+~ntrue", max_size=8), max_size=3),
            st.booleans(),
        ),
        max_size=3,
    )
)
def test_any_text_survives(resources: list[Resource]) -> None:
    found = documents.read(documents.write(resources), "x")
    wanted = []
    for resource in resources:
        copy = Resource()
        copy.CopyFrom(resource)
        wanted.append(copy)
    assert [one.resource for one in found] == wanted
