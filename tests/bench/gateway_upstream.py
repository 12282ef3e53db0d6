"""What stands behind gateways: echoes as fast as Python allows, each as a process of its own.

`python -m tests.bench.gateway_upstream http PORT` speaks OpenAI's chat completions, `grpc PORT` our public
GenerationService and, for our own gateways, InferenceService. All say what inference's echo
backend says, each token written for itself; answers are made once and kept.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from typing import Any

import grpc
import httptools
import uvloop
from grpc_health.v1 import health_pb2
from llmos.common.v1 import finish_reason_pb2, usage_pb2
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, model_service_pb2
from llmos.inference.v1 import fleet_service_pb2, inference_service_pb2

from deploy.dev.ports import HOST
from tests.bench.gateway_load import (
    DIGITS,
    GENERATE,
    GENERATE_WHOLE,
    INFERENCE,
    MARK,
    MODEL,
    PIECES,
    STREAM_GENERATE,
)
from tests.bench.gateway_watch import Watches

_NUMBER = re.compile(rb"#\d{%d}" % DIGITS)
MAX_RUNNING = 256
LIST_MODELS = "/llmos.inference.v1.FleetService/ListModels"
GENERATE_MANY = "/llmos.inference.v1.InferenceService/GenerateMany"
WATCH_DELTAS = "/llmos.inference.v1.InferenceService/WatchDeltas"
WATCH_LOAD = "/llmos.inference.v1.FleetService/WatchLoad"
HEALTH = "/grpc.health.v1.Health/Check"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n"


def pieces(text: str) -> list[str]:
    """The tokens of echo: a word with the space before it."""
    first, *rest = text.split()
    return [first, *(f" {word}" for word in rest)]


def answered(request: bytes, answer: Callable[[bytes], list[bytes]]) -> list[bytes]:
    """The answer to a request with a number, made once for all numbers."""
    found = _NUMBER.search(request)
    number = found[0] if found else MARK
    said = list(answer(request.replace(number, MARK)))
    for index in range(len(said) - 1, -1, -1):  # it is the last word
        if MARK in said[index]:
            said[index] = said[index].replace(MARK, number)
            break
    return said


@lru_cache(maxsize=64)
def completion(body: bytes) -> list[bytes]:
    """What is written for a request over HTTP, piece by piece."""
    asked = json.loads(body)
    said = pieces(asked["messages"][-1]["content"])
    usage = {"prompt_tokens": len(said), "completion_tokens": len(said), "total_tokens": 2 * len(said)}
    known = {"id": "chatcmpl-0", "created": 1700000000, "model": MODEL}
    if not asked.get("stream"):
        message = {"role": "assistant", "content": "".join(said)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
        content = json.dumps({**known, "object": "chat.completion", "choices": [choice], "usage": usage})
        head = HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(content)
        return [head + content.encode()]
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": each}, None) for each in said]
    deltas.append(({}, "length"))
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        for delta, reason in deltas
    ]
    if (asked.get("stream_options") or {}).get("include_usage"):
        events.append({"choices": [], "usage": usage})
    lines = [json.dumps({**known, "object": "chat.completion.chunk", **event}) for event in events]
    chunks = [_chunk(b"data: %s\n\n" % line.encode()) for line in [*lines, "[DONE]"]]
    head = HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n"
    return [head + chunks[0], *chunks[1:-1], chunks[-1] + b"0\r\n\r\n"]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class HttpEcho(asyncio.Protocol):
    """One connection. Routes other than a chat answer with the list of models."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self._body:
            models = b'{"object":"list","data":[{"id":"%s","object":"model"}]}' % MODEL.encode()
            self._say([HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(models) + models], 0)
            return
        self._say(answered(self._body, completion), 0)

    def _say(self, said: list[bytes], index: int) -> None:
        """A piece, and the next one in the next turn of the loop: a write of its own, beside others."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(said[index])
        if index + 1 < len(said):
            self._loop.call_soon(self._say, said, index + 1)


@lru_cache(maxsize=64)
def generation(request: bytes) -> list[bytes]:
    """What Generate answers."""
    spec = generation_service_pb2.GenerateRequest.FromString(request).spec
    said = pieces(spec.prompt.chat.messages[-1].content[0].text)
    choice = generation_pb2.Choice(
        text="".join(said),
        token_ids=range(2**30, 2**30 + len(said)),
        finish_reason=finish_reason_pb2.FINISH_REASON_LENGTH,
    )
    usage = usage_pb2.Usage(prompt_tokens=len(said), completion_tokens=len(said))
    answer = generation_service_pb2.GenerateResponse(
        request_id="req_" + "0" * 32, model=MODEL, choices=[choice], usage=usage
    )
    return [answer.SerializeToString()]


@lru_cache(maxsize=64)
def stream(request: bytes) -> list[bytes]:
    """What StreamGenerate answers."""
    spec = generation_service_pb2.StreamGenerateRequest.FromString(request).spec
    said = pieces(spec.prompt.chat.messages[-1].content[0].text)
    response = generation_service_pb2.StreamGenerateResponse
    events = [response(started=generation_pb2.Started(request_id="req_" + "0" * 32, model=MODEL))]
    events += [
        response(delta=generation_pb2.Delta(seq=index, text=each, token_ids=[2**30 + index]))
        for index, each in enumerate(said, 1)
    ]
    end = generation_pb2.ChoiceEnd(finish_reason=finish_reason_pb2.FINISH_REASON_LENGTH)
    usage = usage_pb2.Usage(prompt_tokens=len(said), completion_tokens=len(said))
    events.append(response(finished=generation_pb2.Finished(choices=[end], usage=usage)))
    return [event.SerializeToString() for event in events]


@lru_cache(maxsize=64)
def engine_stream(request: bytes) -> list[bytes]:
    """What InferenceService answers."""
    spec = inference_service_pb2.GenerateRequest.FromString(request).spec
    asked = generation_service_pb2.StreamGenerateRequest(spec=spec)
    found = []
    for event in map(
        generation_service_pb2.StreamGenerateResponse.FromString, stream(asked.SerializeToString())
    ):
        response = inference_service_pb2.GenerateResponse()
        if event.HasField("started"):
            response.started.prompt_tokens = len(spec.prompt.chat.messages[-1].content[0].text.split())
            response.started.model_revision = "pieces-1"
        elif event.HasField("delta"):
            response.delta.CopyFrom(event.delta)
        else:
            response.finished.CopyFrom(event.finished)
        found.append(response.SerializeToString())
    return found


@lru_cache(maxsize=64)
def engine_whole(request: bytes) -> list[bytes]:
    """What InferenceService answers in one piece."""
    answer = inference_service_pb2.GenerateWholeResponse(time_to_first_token_s=0.0001)
    for event in map(inference_service_pb2.GenerateResponse.FromString, engine_stream(request)):
        if event.HasField("started"):
            answer.started.CopyFrom(event.started)
        elif event.HasField("finished"):
            answer.finished.CopyFrom(event.finished)
        elif answer.deltas:
            answer.deltas[0].text += event.delta.text
            answer.deltas[0].token_ids.extend(event.delta.token_ids)
        else:
            answer.deltas.append(event.delta)
    return [answer.SerializeToString()]


class GrpcEcho(grpc.GenericRpcHandler):
    """Our public service, and what a gateway asks of a replica, without parsing a request twice."""

    def __init__(self) -> None:
        self._watches = Watches()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if details.method == GENERATE:
            return grpc.unary_unary_rpc_method_handler(self._generate)
        if details.method == STREAM_GENERATE:
            return grpc.unary_stream_rpc_method_handler(self._stream)
        if details.method == INFERENCE:
            return grpc.unary_stream_rpc_method_handler(self._engine_stream)
        if details.method == WATCH_DELTAS:
            return grpc.unary_stream_rpc_method_handler(self._watch_deltas)
        if details.method == GENERATE_WHOLE:
            return grpc.unary_unary_rpc_method_handler(self._engine_whole)
        if details.method == GENERATE_MANY:
            return grpc.stream_stream_rpc_method_handler(self._engine_many)
        if details.method == LIST_MODELS:
            return grpc.unary_unary_rpc_method_handler(self._models)
        if details.method == WATCH_LOAD:
            return grpc.unary_stream_rpc_method_handler(self._load)
        if details.method == HEALTH:
            return grpc.unary_unary_rpc_method_handler(self._healthy)
        return None

    async def _generate(self, request: bytes, context: Any) -> bytes:
        return answered(request, generation)[0]

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for each in answered(request, stream):
            yield each

    async def _engine_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        asked = inference_service_pb2.GenerateRequest.FromString(request)
        watched = inference_service_pb2.WatchedAs()
        watched.CopyFrom(asked.watched)
        asked.ClearField("watched")
        said = answered(asked.SerializeToString(), engine_stream)
        async for each in self._watches.call(watched, said):
            yield each

    async def _watch_deltas(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        asked = inference_service_pb2.WatchDeltasRequest.FromString(request)
        async for each in self._watches.watch(asked.watch_id):
            yield each

    async def _engine_whole(self, request: bytes, context: Any) -> bytes:
        asked = inference_service_pb2.GenerateWholeRequest.FromString(request).request
        return answered(asked.SerializeToString(), engine_whole)[0]

    async def _engine_many(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """All calls that came in a message have their answers in one."""
        yield inference_service_pb2.GenerateManyResponse(max_request_bytes=2**22).SerializeToString()
        async for message in messages:
            response = inference_service_pb2.GenerateManyResponse()
            for call in inference_service_pb2.GenerateManyRequest.FromString(message).calls:
                answer = response.answers.add(number=call.number)
                answer.whole.ParseFromString(answered(call.request, engine_whole)[0])
            yield response.SerializeToString()

    async def _models(self, request: bytes, context: Any) -> bytes:
        model = model_service_pb2.Model(
            id=PIECES,
            revision="pieces-1",
            capabilities=[
                model_service_pb2.MODEL_CAPABILITY_GENERATE,
                model_service_pb2.MODEL_CAPABILITY_CHAT,
            ],
            context_tokens=8192,
            ready=True,
            numerics_id="pieces-1",
        )
        return fleet_service_pb2.ListModelsResponse(models=[model]).SerializeToString()

    async def _load(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """As often as asked, or once a second."""
        asked = fleet_service_pb2.WatchLoadRequest.FromString(request)
        load = fleet_service_pb2.WatchLoadResponse(
            serving=True,
            max_running=MAX_RUNNING,
            max_waiting=MAX_RUNNING,
            model=PIECES,
            numerics_id="pieces-1",
        )
        while True:
            yield load.SerializeToString()
            await asyncio.sleep((asked.heartbeat_ms or 1000) / 1000)

    async def _healthy(self, request: bytes, context: Any) -> bytes:
        serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        return serving.SerializeToString()


async def serve_grpc(port: int, handler: grpc.GenericRpcHandler) -> None:
    """Until the process is ended."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"{HOST}:{port}")
    await server.start()
    await server.wait_for_termination()


async def main(protocol: str, port: int) -> None:
    if protocol == "grpc":
        await serve_grpc(port, GrpcEcho())
    server = await asyncio.get_running_loop().create_server(HttpEcho, HOST, port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
