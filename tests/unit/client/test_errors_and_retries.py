"""Each error of the contract arrives as its class, and only what is safe is tried again; in both clients."""

from __future__ import annotations

import grpc
import llmos_client as sdk
import pytest
from llmos.common.v1 import error_reason_pb2
from llmos_client import RetryPolicy, transport

from services.mesh import server as mesh_server
from tests.framework import scripted_gateway as script
from tests.framework.both_clients import FAST, UNAVAILABLE, Both, Connect
from tests.framework.scripted_gateway import Fail, ScriptedGateway, answer

# ---- errors ---------------------------------------------------------------------------------------------


CODES = {
    "CREDENTIAL_MISSING": ("UNAUTHENTICATED", sdk.AuthenticationError),
    "CREDENTIAL_INVALID": ("UNAUTHENTICATED", sdk.AuthenticationError),
    "CREDENTIAL_EXPIRED": ("UNAUTHENTICATED", sdk.AuthenticationError),
    "CREDENTIAL_REVOKED": ("UNAUTHENTICATED", sdk.AuthenticationError),
    "SCOPE_MISSING": ("PERMISSION_DENIED", sdk.PermissionDenied),
    "POLICY_DENIED": ("PERMISSION_DENIED", sdk.PermissionDenied),
    "REQUEST_INVALID": ("INVALID_ARGUMENT", sdk.InvalidRequest),
    "CONTEXT_LENGTH_EXCEEDED": ("INVALID_ARGUMENT", sdk.InvalidRequest),
    "MESSAGE_TOO_LARGE": ("RESOURCE_EXHAUSTED", sdk.InvalidRequest),
    "MODEL_NOT_FOUND": ("NOT_FOUND", sdk.NotFound),
    "NOT_FOUND": ("NOT_FOUND", sdk.NotFound),
    "STREAM_NOT_FOUND": ("NOT_FOUND", sdk.NotFound),
    "ALREADY_EXISTS": ("ALREADY_EXISTS", sdk.Conflict),
    "NOT_IMPLEMENTED": ("UNIMPLEMENTED", sdk.NotImplementedByServer),
    "STATE_CONFLICT": ("FAILED_PRECONDITION", sdk.Conflict),
    "CONFLICT": ("ABORTED", sdk.Conflict),
    "CONCURRENCY_LIMIT": ("RESOURCE_EXHAUSTED", sdk.RateLimited),
    "RATE_LIMIT": ("RESOURCE_EXHAUSTED", sdk.RateLimited),
    "BUDGET_EXHAUSTED": ("RESOURCE_EXHAUSTED", sdk.RateLimited),
    "OVERLOADED": ("RESOURCE_EXHAUSTED", sdk.RateLimited),
    "IDEMPOTENCY_RUNNING": ("ABORTED", sdk.Conflict),
    "IDEMPOTENCY_MISMATCH": ("FAILED_PRECONDITION", sdk.Conflict),
    "NOT_CACHED": ("FAILED_PRECONDITION", sdk.Conflict),
    "STREAM_LOST": ("ABORTED", sdk.StreamError),
    "NO_REPLICA": ("UNAVAILABLE", sdk.Unavailable),
    "REPLICA_LOST": ("UNAVAILABLE", sdk.Unavailable),
    "DRAINING": ("UNAVAILABLE", sdk.Unavailable),
    "DEPENDENCY_UNAVAILABLE": ("UNAVAILABLE", sdk.Unavailable),
    "AUDIT_UNAVAILABLE": ("UNAVAILABLE", sdk.Unavailable),
    "WORKER_LOST": ("UNAVAILABLE", sdk.Unavailable),
    "DEADLINE_EXCEEDED": ("DEADLINE_EXCEEDED", sdk.DeadlineExceeded),
    "CANCELLED": ("CANCELLED", sdk.Cancelled),
    "READER_STALLED": ("ABORTED", sdk.StreamError),
    "INTERNAL": ("INTERNAL", sdk.ServerError),
    "ENGINE_FAULT": ("INTERNAL", sdk.ServerError),
    "DATA_CORRUPT": ("DATA_LOSS", sdk.ServerError),
}


def test_every_reason_of_the_contract_has_its_class() -> None:
    names = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert set(CODES) == names - {"UNSPECIFIED"}


async def test_every_reason_arrives_as_its_class(gateway: ScriptedGateway, connect: Connect) -> None:
    both = connect(retry=RetryPolicy(max_attempts=1))
    for reason, (code, cls) in CODES.items():
        for method in ("unary", "stream"):
            gateway.will(
                Fail(
                    grpc.StatusCode[code],
                    reason,
                    message=f"It was {reason}.",
                    hint="Do this.",
                    retry_after_s=2.5,
                    violations=(("spec.n", "too big"),),
                    metadata=(("scope", "generate"),),
                )
            )
            with pytest.raises(sdk.LlmosError) as caught:
                await (both.call("generate", "q") if method == "unary" else both.streamed("q"))
            error = caught.value
            assert type(error) is cls, reason
            assert error.reason == reason
            assert error.message == f"It was {reason}."
            assert error.hint == "Do this."
            assert error.request_id == "req_failed"
            assert error.retry_after_s == 2.5
            assert error.violations == (sdk.FieldViolation("spec.n", "too big"),)
            assert error.metadata == {"scope": "generate"}
            waiting_helps = cls in (sdk.Unavailable, sdk.RateLimited) and reason != "BUDGET_EXHAUSTED"
            assert error.retryable is waiting_helps, reason
            assert len(error.trace_id) == 32


async def test_a_reason_of_a_later_version_falls_to_its_status(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(Fail(grpc.StatusCode.PERMISSION_DENIED, "MOON_PHASE"))
    with pytest.raises(sdk.PermissionDenied) as caught:
        await both.call("models")
    assert caught.value.reason == "MOON_PHASE"


async def test_errors_that_are_not_the_platforms(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(Fail(grpc.StatusCode.PERMISSION_DENIED, message="proxy says no"))
    with pytest.raises(sdk.PermissionDenied, match="proxy says no"):
        await both.call("models")
    gateway.will(Fail(grpc.StatusCode.PERMISSION_DENIED, "X", message="other", domain="example.com"))
    with pytest.raises(sdk.PermissionDenied, match="other"):
        await both.call("models")
    with pytest.raises(sdk.InvalidRequest) as caught:
        await both.call("generate", "x" * (5 * 1024 * 1024))
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


async def test_no_server_is_one_clear_sentence(connect: Connect) -> None:
    both = connect("127.0.0.1:1", retry=RetryPolicy(max_attempts=1))
    with pytest.raises(sdk.Unavailable, match=r"127\.0\.0\.1:1 cannot be reached") as caught:
        await both.call("models")
    assert caught.value.hint
    assert caught.value.request_id == ""


# ---- retries --------------------------------------------------------------------------------------------


async def test_unavailable_is_tried_again_before_the_first_event(
    gateway: ScriptedGateway, both: Both
) -> None:
    gateway.will(UNAVAILABLE)
    gateway.will(UNAVAILABLE)
    gateway.will(*answer("a", "b"))
    stream = both.client.stream("q")
    assert (await both.result(stream)).text == "ab"
    traces = {str(call.metadata["traceparent"]).split("-")[1] for call in gateway.calls}
    assert traces == {stream.trace_id}, "all attempts belong to one trace"
    parents = {call.metadata["traceparent"] for call in gateway.calls}
    assert len(parents) == 3
    gateway.will(UNAVAILABLE)
    gateway.will(script.generated("x"))
    assert (await both.call("generate", "q")).text == "x"


async def test_attempts_are_bounded(gateway: ScriptedGateway, both: Both) -> None:
    for _ in range(10):
        gateway.will(UNAVAILABLE)
    with pytest.raises(sdk.Unavailable):
        await both.call("generate", "q")
    assert len(gateway.calls) == FAST.max_attempts


@pytest.mark.parametrize("reason", ["OVERLOADED", "INTERNAL", "REQUEST_INVALID", "IDEMPOTENCY_RUNNING"])
async def test_nothing_else_is_tried_again(gateway: ScriptedGateway, both: Both, reason: str) -> None:
    gateway.will(Fail(grpc.StatusCode[CODES[reason][0]], reason, retry_after_s=0.0))
    with pytest.raises(CODES[reason][1]):
        await both.streamed("q")
    assert len(gateway.calls) == 1


async def test_a_wait_beyond_the_deadline_is_not_begun(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(Fail(grpc.StatusCode.UNAVAILABLE, "NO_REPLICA", retry_after_s=20.0))
    with pytest.raises(sdk.Unavailable) as caught:
        await both.call("generate", "q", timeout_s=5)
    assert caught.value.retry_after_s == 20.0
    assert len(gateway.calls) == 1


async def test_r06_retries_do_not_multiply_the_load(gateway: ScriptedGateway, both: Both) -> None:
    n_calls = 200
    for _ in range(n_calls * 5):
        gateway.will(Fail(grpc.StatusCode.UNAVAILABLE, "NO_REPLICA", retry_after_s=0.0))
    for _ in range(n_calls):
        with pytest.raises(sdk.Unavailable):
            await both.call("models")
    assert n_calls < len(gateway.calls) <= 1.1 * n_calls


# ---- secrets and settings -------------------------------------------------------------------------------


async def test_the_credential_is_nowhere_to_be_read(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(Fail(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"))
    with pytest.raises(sdk.AuthenticationError) as caught:
        await both.call("models")
    shown = repr(both.client) + repr(both.client._wire.config) + repr(caught.value) + str(caught.value)
    assert "llmos_secret" not in shown


def test_keepalive_agrees_with_the_server() -> None:
    class Settings:
        max_message_bytes = max_metadata_bytes = max_concurrent_calls = max_call_s = 1

    server = dict(mesh_server.server_options(Settings()))  # type: ignore[arg-type]
    client = dict(transport.channel_options())
    assert client["grpc.keepalive_time_ms"] >= 2 * server["grpc.http2.min_ping_interval_without_data_ms"]
