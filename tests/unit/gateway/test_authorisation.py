"""What policy refuses at the gateway, on both edges, before and after the request is known."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path

import grpc
import httpx
import pytest
from google.protobuf.empty_pb2 import Empty
from llmos.gateway.v1 import (
    generation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
)

from services.gateway.authorisation import Authorisation
from services.gateway.generation import Capability, Model, Prompt
from services.mesh import errors, status
from services.mesh.actions import ACTIONS, OPEN_METHODS
from services.mesh.clock import SystemClock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.events import Outcome
from services.mesh.interceptors import Call
from services.mesh.policy import AddressRule, Condition, Effect, Role, Rule
from tests.framework import gateway_grpc, gateway_http
from tests.framework.gateway_fakes import (
    ALICE,
    KEY,
    MAX_TOKENS_LIMIT,
    Bench,
    FakeReplica,
    fixed_policy,
    generation,
)

BIG = Model("big-1", "rev-1", (Capability.GENERATE,), 4096, datetime(2030, 1, 1, tzinfo=UTC), True)
GENERATE = "/llmos.gateway.v1.GenerationService/Generate"


def role(effect: Effect, scope: str = "generate", **condition: object) -> Role:
    rule = Rule("the-rule", effect, frozenset({scope}), Condition(**condition))  # type: ignore[arg-type]
    return Role("custom", rules=(rule,))


def caller(*roles: str, scopes: str = "generate models.read", direct: str = "models.read") -> Identity:
    return Identity(
        *("acme", "carol"),
        scopes=frozenset(scopes.split()),
        roles=frozenset(roles),
        direct_scopes=frozenset(direct.split()),
    )


def bench_of(identity: Identity, *roles: Role, rules: tuple[AddressRule, ...] = ()) -> Bench:
    replica = FakeReplica(models=(FakeReplica().models[0], BIG))
    return Bench([replica], policy=fixed_policy(*roles, address_rules=rules), callers={KEY: identity})


async def refused(bench: Bench, **changes: object) -> errors.LlmosError:
    """What the use case refuses a request with."""
    async with bench.call(bench.callers[KEY]) as record:
        with pytest.raises(errors.LlmosError) as raised:
            await bench.completions.generate(record, generation(**changes))
        record.is_committed = True
    assert not bench.replicas[0].requests
    return raised.value


async def served(bench: Bench, **changes: object) -> None:
    async with bench.call(bench.callers[KEY]) as record:
        await bench.completions.generate(record, generation(**changes))


def call_of(method: str, identity: Identity | None) -> Call:
    return Call(RequestContext("req_1", method, "192.0.2.1", caller=Caller(identity)), {})


async def unreachable(call: Call) -> None:
    pytest.fail("it passed")


# -- the link --------------------------------------------------------------------------------------------


async def test_a_method_that_is_not_listed_is_denied_to_all() -> None:
    authorisation = Authorisation(fixed_policy(), SystemClock())
    everything = Identity("acme", "root", scopes=frozenset({"admin", "tenant.admin", "generate"}))
    with pytest.raises(errors.PolicyDenied, match="not open to anybody"):
        await authorisation.link(call_of("/llmos.gateway.v1.New/Method", everything), unreachable)


@pytest.mark.parametrize("method", sorted(OPEN_METHODS))
async def test_open_methods_pass_without_an_identity(method: str) -> None:
    bench = Bench([FakeReplica()])
    served: list[str] = []

    async def serve(call: Call) -> None:
        served.append(method)

    await bench.authorisation.link(call_of(method, None), serve)
    assert served == [method]


@pytest.mark.parametrize("method", sorted(name for name, action in ACTIONS.items() if action.by_scopes))
async def test_r26_who_goes_by_scopes_is_told_those_that_policy_allows_now(method: str) -> None:
    """A scope may hang on a condition: what the credential holds is only the most of it."""
    office = Condition(addresses=(ip_network("10.0.0.0/8"),))
    anywhere = frozenset({"audit.read", "generate", "tenant.admin"})
    rule = Rule("office", Effect.ALLOW, frozenset({"admin"}), office)
    authorisation = Authorisation(fixed_policy(Role("boss", scopes=anywhere, rules=(rule,))), SystemClock())
    identity = caller("boss", scopes="admin audit.read generate tenant.admin", direct="")
    for address, scopes in (("192.0.2.1", anywhere), ("10.1.2.3", anywhere | {"admin"})):
        call = Call(RequestContext("req_1", method, address, caller=Caller(identity)), {})
        seen: list[Identity] = []

        async def serve(call: Call = call, seen: list[Identity] = seen) -> None:
            seen.append(call.context.identity)

        await authorisation.link(call, serve)
        assert [(each.scopes, each.client_id) for each in seen] == [(scopes, identity.client_id)]


@pytest.mark.parametrize("kind", ["grpc", "http"])
async def test_an_address_rule_refuses_on_both_edges(kind: str, tmp_path: Path) -> None:
    bench = bench_of(ALICE, rules=(AddressRule("not-here", Effect.DENY, ip_network("127.0.0.0/8")),))
    if kind == "grpc":
        async with gateway_grpc.serving(bench, tmp_path) as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.ListModels(model_service_pb2.ListModelsRequest(), metadata=gateway_grpc.AUTH)
        error = status.from_rpc_error(raised.value)
        assert isinstance(error, errors.PolicyDenied)
        assert error.metadata["rule"] == "address rule not-here"
    else:
        async with gateway_http.serving(bench) as http, httpx.AsyncClient() as client:
            answer = await client.get(f"{http.url}/v1/models", headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "policy_denied"
        assert "not-here" in answer.json()["error"]["message"]
    (ended,) = bench.audit.ended
    assert (ended.outcome, ended.error_reason) == (Outcome.REJECTED, "POLICY_DENIED")


# -- the request -----------------------------------------------------------------------------------------


async def test_a_denied_model_is_refused_by_the_name_of_the_rule() -> None:
    bench = bench_of(caller("user", "custom"), role(Effect.DENY, models=("big-*",)))
    error = await refused(bench, model="big-1")
    assert isinstance(error, errors.PolicyDenied)
    assert error.metadata["rule"] == "role custom, rule the-rule"
    assert "the-rule" in error.message
    await served(bench, model="echo-1")


async def test_tokens_are_counted_over_all_choices() -> None:
    bench = bench_of(caller("custom"), role(Effect.ALLOW, max_tokens=100))
    await refused(bench, max_tokens=51, n=2)
    await refused(bench, max_tokens=101)
    await served(bench, max_tokens=100)


async def test_a_request_that_names_no_number_counts_with_the_deployments_limit() -> None:
    await refused(bench_of(caller("custom"), role(Effect.ALLOW, max_tokens=MAX_TOKENS_LIMIT - 1)))
    await served(bench_of(caller("custom"), role(Effect.ALLOW, max_tokens=MAX_TOKENS_LIMIT)))


async def test_tasks_and_labels() -> None:
    bench = bench_of(caller("custom"), role(Effect.ALLOW, tasks=("chat",), labels={"team": "blue"}))
    assert (await refused(bench, labels={"team": "red"})).metadata["rule"] == "default"
    await refused(bench, labels={"team": "blue"}, prompt=Prompt(text="Once"))
    await served(bench, labels={"team": "blue"})


async def test_counting_tokens_is_decided_by_the_model(tmp_path: Path) -> None:
    bench = bench_of(caller("custom"), role(Effect.ALLOW, models=("echo-*",), max_tokens=1))
    async with gateway_grpc.serving(bench, tmp_path) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        request = generation_service_pb2.CountTokensRequest(
            model="echo-1", prompt=generation_pb2.Prompt(text="Hi")
        )
        assert (await stub.CountTokens(request, metadata=gateway_grpc.AUTH)).prompt_tokens == 7
        request.model = "big-1"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.CountTokens(request, metadata=gateway_grpc.AUTH)
    assert isinstance(status.from_rpc_error(raised.value), errors.PolicyDenied)


# -- models ----------------------------------------------------------------------------------------------


async def seen(kind: str, bench: Bench, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The models that are listed, and for each the reason of getting it by name."""
    reasons = {}
    if kind == "grpc":
        async with gateway_grpc.serving(bench, folder) as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            everything = await stub.ListModels(
                model_service_pb2.ListModelsRequest(), metadata=gateway_grpc.AUTH
            )
            for name in ("echo-1", "big-1", "none"):
                try:
                    request = model_service_pb2.GetModelRequest(id=name)
                    await stub.GetModel(request, metadata=gateway_grpc.AUTH)
                    reasons[name] = ""
                except grpc.aio.AioRpcError as error:
                    reasons[name] = status.from_rpc_error(error).reason
        return [model.id for model in everything.models], reasons
    async with (
        gateway_http.serving(bench) as http,
        httpx.AsyncClient(base_url=http.url, headers={"authorization": f"Bearer {KEY}"}) as client,
    ):
        listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        for name in ("echo-1", "big-1", "none"):
            answer = (await client.get(f"/v1/models/{name}")).json()
            reasons[name] = answer["error"]["code"].upper() if "error" in answer else ""
    return listed, reasons


@pytest.mark.parametrize("kind", ["grpc", "http"])
@pytest.mark.parametrize("scope", ["generate", "models.read"])
async def test_models_that_a_caller_may_not_use_do_not_exist_for_it(
    kind: str, scope: str, tmp_path: Path
) -> None:
    bench = bench_of(caller("user", "custom"), role(Effect.DENY, scope, models=("big-*",)))
    listed, reasons = await seen(kind, bench, tmp_path)
    assert listed == ["echo-1"]
    assert reasons == {"echo-1": "", "big-1": "MODEL_NOT_FOUND", "none": "MODEL_NOT_FOUND"}


@pytest.mark.parametrize("kind", ["grpc", "http"])
async def test_a_caller_that_generates_nothing_sees_what_it_may_read(kind: str, tmp_path: Path) -> None:
    listed, _ = await seen(kind, bench_of(caller(scopes="models.read")), tmp_path)
    assert listed == ["big-1", "echo-1"]


# -- the policy of a caller ------------------------------------------------------------------------------


async def test_the_effective_policy(tmp_path: Path) -> None:
    identity = caller("user", "custom", scopes="generate models.read admin")
    bench = bench_of(identity, role(Effect.DENY, models=("big-*",)))
    bench.expires_at = BIG.create_time
    async with gateway_grpc.serving(bench, tmp_path) as channel:
        stub = policy_service_pb2_grpc.PolicyServiceStub(channel)
        found = await stub.GetEffectivePolicy(
            policy_service_pb2.GetEffectivePolicyRequest(), metadata=gateway_grpc.AUTH
        )
    assert (found.identity.tenant_id, found.identity.client_id) == ("acme", "carol")
    assert list(found.identity.scopes) == ["admin", "generate", "models.read"]
    assert GENERATE in found.methods
    assert "/llmos.gateway.v1.PolicyService/GetEffectivePolicy" in found.methods
    assert not [method for method in found.methods if "Admin" in method or "Audit" in method]
    assert list(found.methods) == sorted(found.methods)
    assert list(found.models) == ["echo-1"]
    assert [(limit.unit, limit.scope, limit.limit, limit.remaining) for limit in found.limits] == [
        (1, 3, 600, 600),
        (2, 3, 600_000, 600_000),
        (3, 3, 64, 64),
    ]
    assert not any(limit.HasField("reset_time") for limit in found.limits)
    assert (found.max_request_bytes, found.max_tokens) == (4 * 1024 * 1024, MAX_TOKENS_LIMIT)
    assert found.content_capture == policy_service_pb2.CONTENT_CAPTURE_NONE
    assert found.credential_expire_time.ToDatetime(UTC) == bench.expires_at
    assert [event.facts.method for event in bench.audit.started] == [
        "/llmos.gateway.v1.PolicyService/GetEffectivePolicy"
    ]
    assert [event.outcome for event in bench.audit.ended] == [Outcome.SUCCEEDED]


# -- the address -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpc", "http"])
@pytest.mark.parametrize(
    ("proxies", "header", "allowed"),
    [
        ((), "203.0.113.9", False),
        (("127.0.0.0/8",), "203.0.113.9", True),
        (("127.0.0.0/8",), "203.0.113.9, 198.51.100.1", False),
        (("127.0.0.0/8",), "198.51.100.1, 203.0.113.9", True),
        (("127.0.0.0/8",), "203.0.113.9, nonsense", False),
        (("10.0.0.0/8",), "203.0.113.9", False),
        (("::ffff:127.0.0.0/104",), "::ffff:203.0.113.9", True),
    ],
)
async def test_a_forged_header_lets_nobody_in(
    kind: str, proxies: tuple[str, ...], header: str, allowed: bool, tmp_path: Path
) -> None:
    bench = bench_of(ALICE, rules=(AddressRule("office", Effect.ALLOW, ip_network("203.0.113.0/24")),))
    bench.proxies = [ip_network(proxy) for proxy in proxies]
    # In two lines where it has two entries: they count as one.
    lines = [("x-forwarded-for", line.strip()) for line in header.split(",")]
    if kind == "grpc":
        async with gateway_grpc.serving(bench, tmp_path) as channel:
            call = channel.unary_unary(
                "/llmos.gateway.v1.ModelService/ListModels", request_serializer=Empty.SerializeToString
            )
            running = call(Empty(), metadata=(*gateway_grpc.AUTH, *lines))
            code = await running.code()
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED)
        passed = code is grpc.StatusCode.OK
    else:
        async with gateway_http.serving(bench) as http, httpx.AsyncClient() as client:
            headers = [("authorization", f"Bearer {KEY}"), *lines]
            answer = await client.get(f"{http.url}/v1/models", headers=headers)
        assert answer.status_code in (200, 403)
        passed = answer.status_code == 200
    assert passed is allowed
