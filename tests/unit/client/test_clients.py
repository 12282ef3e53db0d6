"""Both clients against a real server that answers by a script: one suite, run once for each."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import llmos_client as sdk
import pytest
from llmos.common.v1 import error_reason_pb2
from llmos.gateway.v1 import generation_pb2
from llmos_client import AsyncClient, Client, RetryPolicy, transport

from services.mesh import server as mesh_server
from tests.framework import scripted_gateway as script
from tests.framework.scripted_gateway import Fail, Hang, ScriptedGateway, answer, delta, finished, started

FAST = RetryPolicy(max_attempts=4, initial_backoff_s=0.001, max_backoff_s=0.002)
UNAVAILABLE = Fail(grpc.StatusCode.UNAVAILABLE, "NO_REPLICA", retry_after_s=0.01)
REVOKED = Fail(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_REVOKED")


class Both:
    """One vocabulary for the two clients. The sync one runs in a thread."""

    def __init__(self, kind: str, target: str, **options: Any) -> None:
        options = {"model": "echo", "api_key": "llmos_secret", "retry": FAST, **options}
        self.sync = kind == "sync"
        self.client: Any = (Client if self.sync else AsyncClient)(target, **options)

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        method: Any = self.client
        for part in name.split("."):
            method = getattr(method, part)
        if self.sync:
            return await asyncio.to_thread(method, *args, **kwargs)
        return await method(*args, **kwargs)

    async def each(self, iterable: Any) -> AsyncIterator[Any]:
        if not self.sync:
            async with aclosing(aiter(iterable)) as items:
                async for item in items:
                    yield item
            return
        iterator, end = iter(iterable), object()
        while (item := await asyncio.to_thread(next, iterator, end)) is not end:
            yield item

    async def read(self, iterable: Any, at_each: Callable[[Any], object] = lambda item: None) -> None:
        async for item in self.each(iterable):
            at_each(item)

    async def result(self, stream: Any) -> Any:
        return await asyncio.to_thread(stream.result) if self.sync else await stream.result()

    async def streamed(self, prompt: str, **options: Any) -> Any:
        return await self.result(self.client.stream(prompt, **options))

    async def close(self) -> None:
        if self.sync:
            self.client.close()
        else:
            await self.client.close()


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway() as server:
        yield server


Connect = Callable[..., Both]


@pytest.fixture(params=["sync", "async"])
async def connect(request: pytest.FixtureRequest, gateway: ScriptedGateway) -> AsyncIterator[Connect]:
    opened: list[Both] = []

    def make(target: str | None = None, **options: Any) -> Both:
        opened.append(Both(request.param, target or gateway.target, **options))
        return opened[-1]

    yield make
    for both in opened:
        await both.close()


@pytest.fixture
def both(connect: Connect) -> Both:
    return connect()


async def wait(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, script.DEADLINE_S)


# ---- the happy path ---------------------------------------------------------------------------------


async def test_generate_returns_text_usage_and_ids(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.generated("blue"))
    completion = await both.call("generate", "why?", max_tokens=5, temperature=0.0, seed=3, stop="x")
    assert completion.text == "blue"
    assert completion.finish_reason is sdk.FinishReason.END_OF_SEQUENCE
    assert completion.usage == sdk.Usage(3, 2, 1)
    assert (completion.request_id, completion.model, completion.seed) == ("req_1", "echo", 7)
    spec = gateway.calls[0].request.spec
    assert spec.model == "echo"
    assert spec.prompt.chat.messages[0].role == generation_pb2.ROLE_USER
    assert spec.prompt.chat.messages[0].content[0].text == "why?"
    assert (spec.max_tokens, spec.sampling.temperature, spec.sampling.seed, spec.stop) == (5, 0.0, 3, ["x"])
    assert spec.sampling.HasField("temperature")
    assert not spec.sampling.HasField("top_p")


async def test_a_call_carries_credential_trace_and_deadline(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.generated("x"))
    gateway.will(script.generated("x"))
    completion = await both.call("generate", "q")
    await both.call("generate", "q", timeout_s=5)
    first, second = gateway.calls
    assert first.metadata["authorization"] == "Bearer llmos_secret"
    found = re.fullmatch(r"00-([0-9a-f]{32})-[0-9a-f]{16}-01", str(first.metadata["traceparent"]))
    assert found
    assert found[1] == completion.trace_id
    assert 500 < first.time_remaining_s <= 601
    assert 4 < second.time_remaining_s < 6  # gRPC rounds up


async def test_stream_yields_deltas_then_knows_the_end(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(started(), delta(1, "a"), script.moved(), delta(2, "b"), finished())
    stream = both.client.stream("q", resumable=True)
    texts = [item.text async for item in both.each(stream)]
    assert texts == ["a", "b"]
    assert stream.text == "ab"
    assert stream.request_id == "req_1"
    assert stream.usage == sdk.Usage(3, 2, 0)
    assert stream.finish_reason is sdk.FinishReason.LENGTH
    assert gateway.calls[0].request.resumable
    await wait(gateway.calls[0].ended)
    assert gateway.calls[0].answered, "a stream that was read to its end must not be cancelled"


async def test_all_events_and_choices(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(started(), delta(1, "a", 0), delta(2, "x", 1), delta(3, "b", 0), finished(choices=2))
    stream = both.client.stream("q", n=2)
    kinds = [type(event).__name__ async for event in both.each(stream.events())]
    assert kinds == ["Started", "Delta", "Delta", "Delta", "Finished"]
    completion = await both.result(stream)
    assert [choice.text for choice in completion.choices] == ["ab", "x"]


async def test_an_event_of_a_later_version_is_ignored(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(started(), script.Response(), delta(1, "a"), finished())
    assert (await both.streamed("q")).text == "a"


async def test_a_conversation_raw_text_and_a_whole_spec(gateway: ScriptedGateway, both: Both) -> None:
    for _ in range(3):
        gateway.will(script.generated("x"))
    await both.call("generate", [sdk.Message("user", "1"), sdk.Message("assistant", "2")], system="be kind")
    await both.call("generate", sdk.RawText("once"))
    spec = generation_pb2.GenerationSpec(model="other", ignore_eos=True)
    spec.prompt.text = "t"
    await both.call("generate", spec, max_tokens=2)
    first, second, third = (call.request.spec for call in gateway.calls)
    assert [m.role for m in first.prompt.chat.messages] == [
        generation_pb2.ROLE_SYSTEM,
        generation_pb2.ROLE_USER,
        generation_pb2.ROLE_ASSISTANT,
    ]
    assert second.prompt.text == "once"
    assert (third.model, third.ignore_eos, third.max_tokens) == ("other", True, 2)
    assert not spec.HasField("max_tokens"), "what the caller gave must not be changed"


async def test_count_tokens_and_models(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.generation_service_pb2.CountTokensResponse(prompt_tokens=4, context_tokens=2048))
    gateway.will(script.models("echo"))
    assert await both.call("count_tokens", "q") == sdk.TokenCount(4, 2048)
    (model,) = await both.call("models")
    assert (model.id, model.capabilities, model.ready) == ("echo", ("generate", "chat"), True)
    assert all(call.time_remaining_s <= 31 for call in gateway.calls)


# ---- a stream that is not whole ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        (started(), delta(1, "a"), delta(3, "c"), finished()),
        (started(), delta(2, "b"), finished()),
        (started(), delta(1, "a"), delta(1, "a"), finished()),
        (delta(1, "a"), finished()),
        (started(), started(), finished()),
        (started(), finished(), delta(1, "a")),
    ],
    ids=["gap", "gap-at-start", "double", "no-started", "two-started", "after-finished"],
)
async def test_a_broken_stream_is_told(gateway: ScriptedGateway, both: Both, steps: Any) -> None:
    gateway.will(*steps)
    stream = both.client.stream("q")
    with pytest.raises(sdk.StreamBroken) as caught:
        await both.result(stream)
    assert caught.value.trace_id == stream.trace_id
    assert stream.usage is None or stream.finished is not None
    assert len(gateway.calls) == 1


async def test_a_stream_without_finished_is_incomplete(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(started("req_9"), delta(1, "a"))
    stream = both.client.stream("q")
    with pytest.raises(sdk.StreamIncomplete) as caught:
        await both.result(stream)
    assert caught.value.request_id == "req_9"
    assert stream.text == "a"
    assert stream.finish_reason is None


async def test_an_error_in_mid_stream_is_not_retried(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(started(), delta(1, "a"), UNAVAILABLE)
    with pytest.raises(sdk.Unavailable):
        await both.streamed("q")
    assert len(gateway.calls) == 1


# ---- errors -----------------------------------------------------------------------------------------

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
    "CONCURRENCY_LIMIT": ("RESOURCE_EXHAUSTED", sdk.RateLimited),
    "RATE_LIMIT": ("RESOURCE_EXHAUSTED", sdk.RateLimited),
    "BUDGET_EXHAUSTED": ("RESOURCE_EXHAUSTED", sdk.RateLimited),
    "OVERLOADED": ("RESOURCE_EXHAUSTED", sdk.RateLimited),
    "IDEMPOTENCY_RUNNING": ("ABORTED", sdk.Conflict),
    "IDEMPOTENCY_MISMATCH": ("FAILED_PRECONDITION", sdk.Conflict),
    "STREAM_LOST": ("ABORTED", sdk.StreamError),
    "NO_REPLICA": ("UNAVAILABLE", sdk.Unavailable),
    "REPLICA_LOST": ("UNAVAILABLE", sdk.Unavailable),
    "DRAINING": ("UNAVAILABLE", sdk.Unavailable),
    "DEPENDENCY_UNAVAILABLE": ("UNAVAILABLE", sdk.Unavailable),
    "AUDIT_UNAVAILABLE": ("UNAVAILABLE", sdk.Unavailable),
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


# ---- retries ----------------------------------------------------------------------------------------


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


# ---- deadlines and cancellation ---------------------------------------------------------------------


async def test_r01_the_deadline_ends_the_call_at_the_server_too(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(Hang)
    with pytest.raises(sdk.DeadlineExceeded):
        await both.call("generate", "q", timeout_s=0.2)
    gateway.will(started(), delta(1, "a"), Hang)
    with pytest.raises(sdk.DeadlineExceeded):
        await both.streamed("q", timeout_s=0.2)
    for call in gateway.calls:
        await wait(call.ended)


async def test_cancel_reaches_the_server_and_the_reader(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(started(), delta(1, "a"), Hang)
    stream = both.client.stream("q")
    with pytest.raises(sdk.Cancelled):
        await both.read(stream, at_each=lambda item: stream.cancel())
    assert stream.text == "a"
    await wait(gateway.calls[0].ended)
    assert not gateway.calls[0].answered


async def test_cancel_between_two_attempts(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(Fail(grpc.StatusCode.UNAVAILABLE, "NO_REPLICA", retry_after_s=25.0))
    stream = both.client.stream("q")
    reading = asyncio.create_task(both.result(stream))
    await wait((await asyncio.to_thread(gateway.wait_for_calls, 1)).ended)
    stream.cancel()
    with pytest.raises(sdk.Cancelled):
        await asyncio.wait_for(reading, 10)


async def test_leaving_a_stream_early_cancels_it(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(started(), delta(1, "a"), Hang)
    stream = both.client.stream("q")
    manager: Any = contextmanaged(stream) if both.sync else stream
    async with manager:
        async for _ in both.each(stream):
            break
    await wait(gateway.calls[0].ended)


@asynccontextmanager
async def contextmanaged(stream: sdk.Stream) -> AsyncIterator[None]:
    with stream:
        yield


async def test_a_cancelled_task_stays_cancelled(gateway: ScriptedGateway) -> None:
    gateway.will(started(), Hang)
    async with AsyncClient(gateway.target, model="echo") as client:

        async def read() -> None:
            async with client.stream("q") as stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(read())
        await asyncio.to_thread(gateway.wait_for_calls, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait(gateway.calls[0].ended)


async def test_a_call_cancelled_by_the_server_is_an_error(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(started(), Fail(grpc.StatusCode.CANCELLED, "CANCELLED"))
    with pytest.raises(sdk.Cancelled) as caught:
        await both.streamed("q")
    assert caught.value.request_id == "req_failed"


# ---- the audit log ----------------------------------------------------------------------------------


async def test_search_goes_through_the_pages(gateway: ScriptedGateway, both: Both) -> None:
    page = script.audit_service_pb2.SearchResponse
    gateway.will(page(records=[script.record(3), script.record(2)], next_page_token="more"))
    gateway.will(page(records=[script.record(1)]))
    wanted = sdk.AuditFilter(client_id="web", outcome=sdk.Outcome.SUCCEEDED)
    records = await both.call("audit.search", wanted, limit=5)
    assert [record.position for record in records] == [3, 2, 1]
    first, second = (call.request for call in gateway.calls)
    assert (first.filter.client_id, first.filter.outcome, first.page_size) == ("web", 1, 5)
    assert (second.page_token, second.page_size) == ("more", 3)
    found = records[0]
    assert found.outcome is sdk.Outcome.SUCCEEDED
    assert found.usage == sdk.Usage(3, 5)
    assert found.duration_s == 1.5
    assert (found.tenant_id, found.client_id, found.edge, found.error_reason) == ("acme", "web", "grpc", "")


async def test_tail_goes_on_after_a_break_without_loss_or_doubling(
    gateway: ScriptedGateway, both: Both
) -> None:
    gateway.will(script.tailed(4), script.tailed(5), Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING"))
    gateway.will(UNAVAILABLE)
    gateway.will(
        script.tailed(5), script.tailed(6), Fail(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    )
    gateway.will(script.tailed(7))
    gateway.will(REVOKED)
    tail = both.client.audit.tail(last=2)
    positions: list[int] = []
    with pytest.raises(sdk.AuthenticationError):
        await both.read(tail, at_each=lambda record: positions.append(record.position))
    assert positions == [4, 5, 6, 7]
    requests = [call.request for call in gateway.calls]
    assert (requests[0].last, requests[0].HasField("after_position")) == (2, False)
    assert [request.after_position for request in requests[1:]] == [5, 5, 6, 7]


async def test_tail_begins_anew_while_nothing_was_delivered(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(UNAVAILABLE)
    gateway.will(REVOKED)
    with pytest.raises(sdk.AuthenticationError):
        await both.read(both.client.audit.tail(last=3))
    assert [call.request.last for call in gateway.calls] == [3, 3]


async def test_tail_ends_on_errors_that_stay(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.tailed(1), REVOKED)
    with pytest.raises(sdk.AuthenticationError):
        await both.read(both.client.audit.tail())
    assert len(gateway.calls) == 1


async def test_tail_is_ended_by_its_own_deadline_and_by_cancel(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.tailed(1), Hang)
    with pytest.raises(sdk.DeadlineExceeded):
        await both.read(both.client.audit.tail(timeout_s=0.2))
    gateway.will(script.tailed(1), Hang)
    tail = both.client.audit.tail()
    with pytest.raises(sdk.Cancelled):
        await both.read(tail, at_each=lambda record: tail.cancel())
    await wait(gateway.calls[-1].ended)


# ---- secrets and settings ---------------------------------------------------------------------------


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
