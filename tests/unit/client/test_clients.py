"""What both clients send and return, whole streams and broken ones, deadlines and cancellation."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import llmos_client as sdk
import pytest
from llmos.gateway.v1 import generation_pb2
from llmos_client import AsyncClient

from tests.framework import scripted_gateway as script
from tests.framework.both_clients import UNAVAILABLE, Both, wait
from tests.framework.scripted_gateway import Fail, Hang, ScriptedGateway, delta, finished, started

# ---- the happy path -------------------------------------------------------------------------------------


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


# ---- a stream that is not whole -------------------------------------------------------------------------


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


# ---- deadlines and cancellation -------------------------------------------------------------------------


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


async def test_an_async_client_may_be_made_before_its_loop(gateway: ScriptedGateway) -> None:
    made = await asyncio.to_thread(AsyncClient, gateway.target, api_key="key", model="m")
    gateway.will(*script.answer("hello"))
    async with made as client, client.stream("hi") as stream:
        assert [delta.text async for delta in stream] == ["hello"]
