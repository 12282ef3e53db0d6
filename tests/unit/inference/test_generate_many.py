"""GenerateMany as a gateway sees it on the wire: each call passes the chain by itself, and fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from llmos.gateway.v1 import generation_pb2
from llmos.inference.v1 import inference_service_pb2 as pb
from llmos.inference.v1 import inference_service_pb2_grpc

from services.inference import carrier as carriers
from services.inference.access import GENERATE_MANY, GENERATE_WHOLE
from services.inference.carrier import Carried, Carrier
from services.mesh import context, errors, status
from services.mesh.context import Caller, Identity
from services.mesh.errors import LlmosError
from services.mesh.interceptors import Chain
from tests.framework.echo_replica import EchoReplica, echo_replica
from tests.framework.waiting import eventually

TRACE = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@dataclass
class Gate:
    """An authenticator that tells what it was asked, and lets one bearer in."""

    asked: list[tuple[str, Mapping[str, str | bytes]]] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)

    async def __call__(self, method: str, metadata: Mapping[str, str | bytes], source: str) -> Caller:
        self.asked.append((method, metadata))
        self.traces.append(context.require_current().trace_id)
        if method == GENERATE_WHOLE and metadata["authorization"] != "Bearer good":
            raise errors.CredentialInvalid("no")
        return Caller(Identity("acme", "app"), "service:gateway")

    def metadata(self) -> list[Mapping[str, str | bytes]]:
        """Of the calls that were carried."""
        return [metadata for method, metadata in self.asked if method == GENERATE_WHOLE]


class Wire:
    """The stream, message by message."""

    def __init__(self, replica: EchoReplica, call: Any) -> None:
        self.replica = replica
        self.call = call

    async def send(self, *calls: pb.CarriedCall, cancelled: tuple[int, ...] = ()) -> None:
        await self.call.write(pb.GenerateManyRequest(calls=calls, cancelled=cancelled))

    async def outcomes(self, count: int) -> dict[int, str | LlmosError]:
        """The next answers: their texts, or errors."""
        found: dict[int, str | LlmosError] = {}
        while len(found) < count:
            for each in (await self.call.read()).answers:
                assert each.number not in found
                found[each.number] = (
                    each.whole.deltas[0].text if each.HasField("whole") else status.from_details(each.error)
                )
        return found


@asynccontextmanager
async def wire(folder: Path, gate: Gate | None = None, max_calls: int = 64) -> AsyncIterator[Wire]:
    async with (
        echo_replica(folder, authenticator=gate, max_calls=max_calls) as replica,
        grpc.aio.insecure_channel(f"127.0.0.1:{replica.server.ports['grpc']}") as channel,
    ):
        stub: Any = inference_service_pb2_grpc.InferenceServiceStub(channel)
        call = stub.GenerateMany()
        try:
            first = await call.read()
            assert first.max_request_bytes == 4 * 1024 * 1024
            assert not first.answers
            yield Wire(replica, call)
        finally:
            call.cancel()


def carried(number: int, text: str = "a", **fields: Any) -> pb.CarriedCall:
    spec = generation_pb2.GenerationSpec(model="echo", prompt={"text": text}, sampling={"seed": 1})
    request = pb.GenerateRequest(request_id=f"req_{number}", spec=spec, priority="PRIORITY_INTERACTIVE")
    given = {"request": request.SerializeToString(), "timeout_s": 20.0, "request_id": f"req_{number}"}
    return pb.CarriedCall(number=number, **{**given, **fields})


async def test_each_call_has_its_own_credentials_id_and_trace(tmp_path: Path) -> None:
    gate = Gate()
    async with wire(tmp_path, gate) as many:
        await many.send(
            carried(1, authorization="Bearer bad"),
            carried(2, authorization="Bearer good", traceparent=TRACE, identity=b"\x0a\x01a"),
            carried(3),
        )
        found = await many.outcomes(3)
        assert isinstance(found[1], errors.CredentialInvalid)
        assert (found[2], found[3]) == ("a", "a")
        await many.send(carried(4))
        assert await many.outcomes(1) == {4: "a"}
    assert [method for method, _ in gate.asked] == [GENERATE_MANY, *[GENERATE_WHOLE] * 4]
    of = {metadata["x-request-id"]: metadata for metadata in gate.metadata()}
    assert {key: metadata["authorization"] for key, metadata in of.items()} == {
        "req_1": "Bearer bad",
        **dict.fromkeys(("req_2", "req_3", "req_4"), "Bearer good"),
    }
    assert of["req_2"]["llmos-identity-bin"] == b"\x0a\x01a"
    assert "llmos-identity-bin" not in of["req_3"], "of nobody else's"
    traces = dict(zip([metadata.get("x-request-id") for _, metadata in gate.asked], gate.traces, strict=True))
    assert traces["req_2"] == TRACE.split("-")[1]
    assert [trace for trace in traces.values() if trace == traces["req_2"]] == [traces["req_2"]]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"request": b"\xff"}, "not a valid protobuf message"),
        ({"request": pb.GenerateRequest(request_id="req_1").SerializeToString()}, "spec"),
        ({"timeout_s": 0.001}, "deadline"),
    ],
    ids=["broken", "against the rules", "too late"],
)
async def test_one_that_cannot_be_served_fails_alone(
    fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    async with wire(tmp_path) as many:
        await many.send(carried(1, "[[delay_ms=20]] a"), carried(2, **fields), carried(3))
        found = await many.outcomes(3)
        refused = found[2]
        assert isinstance(refused, LlmosError)
        assert says in refused.message
        assert (found[1], found[3]) == ("a", "a")


async def test_each_takes_a_place(tmp_path: Path) -> None:
    async with wire(tmp_path, max_calls=3) as many:
        await many.send(carried(1, "[[hang]] a"), carried(2, "[[hang]] a"), carried(3))
        (refused,) = (await many.outcomes(1)).items()
        assert refused[0] == 3
        assert isinstance(refused[1], errors.ConcurrencyLimit)
        await many.send(cancelled=(1,))
        await eventually(lambda: many.replica.engine.load().running == 1)
        await many.send(carried(4))
        found = await many.outcomes(2)
        assert isinstance(found[1], errors.Cancelled)
        assert found[4] == "a"


async def test_the_end_of_the_stream_ends_the_work(tmp_path: Path) -> None:
    async with wire(tmp_path) as many:
        await many.send(carried(1, "[[hang]] a"), carried(2, "[[hang]] a"))
        await eventually(lambda: many.replica.engine.load().running == 2)
        many.call.cancel()
        await eventually(lambda: len(many.replica.running) == 0)
        assert many.replica.engine.load().running == 0


async def test_who_sends_no_more_gets_all_answers(tmp_path: Path) -> None:
    async with wire(tmp_path) as many:
        await many.send(carried(1, "[[delay_ms=50]] a"), carried(2))
        await many.call.done_writing()
        assert await many.outcomes(2) == {1: "a", 2: "a"}
        assert await many.call.read() is grpc.aio.EOF
        assert await many.call.code() == grpc.StatusCode.OK


@pytest.mark.parametrize("calls", [[carried(1), carried(1)], [carried(1, timeout_s=-1)]])
async def test_a_message_that_means_nothing_ends_the_stream(
    calls: list[pb.CarriedCall], tmp_path: Path
) -> None:
    async with wire(tmp_path) as many:
        await many.send(*calls)
        assert await many.call.code() == grpc.StatusCode.INVALID_ARGUMENT
        await eventually(lambda: len(many.replica.running) == 0)


async def test_answers_that_nobody_takes_hold_back_more_calls() -> None:
    carrier: Carrier[str] = Carrier(Chain({}), GENERATE_WHOLE, "")
    size_bytes = carriers.MESSAGE_BYTES // 2
    count = carriers.UNTAKEN_BYTES // size_bytes + 1
    for number in range(count):
        carrier.begin(Carried(number, {}, 10), answering(str(number), size_bytes))
    for _ in range(5):
        await asyncio.sleep(0)
    room = asyncio.ensure_future(carrier.room())
    await asyncio.sleep(0)
    assert not room.done()
    taken = [each.number for each in await carrier.take() or ()]
    assert taken == [0, 1], "a message is bounded"
    await room
    carrier.no_more()
    while (more := await carrier.take()) is not None:
        taken += [each.number for each in more]
    assert taken == list(range(count))
    await carrier.close()


async def test_whatever_ends_a_call_it_is_answered() -> None:
    carrier: Carrier[str] = Carrier(Chain({}), GENERATE_WHOLE, "")

    async def cancelled() -> tuple[str, int]:
        raise asyncio.CancelledError

    carrier.begin(Carried(1, {}, 10), cancelled)
    (answered,) = await carrier.take() or ()
    assert (answered.number, answered.answer) == (1, None)
    assert isinstance(answered.error, errors.Cancelled)
    await carrier.close()


def answering(text: str, size_bytes: int) -> Callable[[], Awaitable[tuple[str, int]]]:
    async def serve() -> tuple[str, int]:
        return text, size_bytes

    return serve
