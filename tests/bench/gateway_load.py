"""The load on gateways, as a process of its own: a job is a line of JSON on stdin, its answer one on stdout.

All HTTP subjects are asked by the same few lines over kept connections, all gRPC subjects through one channel
of grpc.aio with messages that are not parsed. A job is a closed loop: each of `streams` clients sends its
next request when it has the answer to the last one, so latencies count from the send, and what a subject
cannot take shows as fewer requests. `gateway_processes.Load` is the other end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import grpc
import uvloop
from llmos.gateway.v1 import generation_pb2, generation_service_pb2
from llmos.inference.v1 import inference_service_pb2

MODEL = "echo"
PIECES = "pieces"
"""What our own gateways have from a replica that is as light as what stands behind the others, and that puts
no tokens together: inference does with those that were not fetched in time."""
DIGITS = 8
MARK = b"#" + b"0" * DIGITS
TIMEOUT_S = 60.0
GENERATE = "/llmos.gateway.v1.GenerationService/Generate"
STREAM_GENERATE = "/llmos.gateway.v1.GenerationService/StreamGenerate"
INFERENCE = "/llmos.inference.v1.InferenceService/Generate"
GENERATE_WHOLE = "/llmos.inference.v1.InferenceService/GenerateWhole"
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked, and how."""

    protocol: str
    """`http`, `grpc`, or `inference`: gRPC to inference itself, as the gateway asks it."""
    address: str
    metadata: tuple[tuple[str, str], ...] = ()
    """Headers, or gRPC metadata; a value whose key ends in `-bin` is in hex."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of a target: until `seconds` have passed, or `requests` are answered."""

    target: Target
    model: str
    words: int
    """Of the prompt, and so of the answer; each is a token."""
    streamed: bool = False
    streams: int = 1
    seconds: float = 0.0
    requests: int = 0
    greedy: bool = False
    """At temperature 0, so that a cache may keep the answer; else the temperature is left to the model."""

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Job:
        given = json.loads(line)
        target = given.pop("target")
        metadata = tuple((key, value) for key, value in target.pop("metadata"))
        return cls(Target(**target, metadata=metadata), **given)


def prompt(words: int) -> str:
    """So many words; the last one stands for a number, which is another one in each request, so that no cache
    knows the answer."""
    return " ".join([*(f"word{index}" for index in range(words - 1)), MARK.decode()])


def numbered(request: bytes, number: int) -> bytes:
    """A request with `prompt` in it, whose number is set; its length stays."""
    return request.replace(MARK, b"#%0*d" % (DIGITS, number), 1)


_numbers = itertools.count(1)


class Client(Protocol):
    """Asks one target."""

    async def ask(self) -> int:
        """The number of tokens that came each for itself; 0 where the answer came in one piece. Raises
        OSError, ValueError or grpc.RpcError."""

    async def text(self) -> str:
        """Asks, and reads the answer."""

    async def close(self) -> None: ...


class _Connection(asyncio.Protocol):
    """One connection, one request at a time. The answer is cut into pieces only after its end."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[bytes] | None = None
        self._received = bytearray()
        self._due_bytes = 0
        """Of the whole answer; 0: not known yet, -1: it is chunked."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            said = bytes(self._received[:200])
            self._waiting.set_exception(OSError(f"the connection was closed after {said!r}"))

    def exchange(self, request: bytes) -> asyncio.Future[bytes]:
        """The whole answer, head included."""
        assert self._transport is not None
        self._received.clear()
        self._due_bytes = 0
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._waiting

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if not self._due_bytes:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(received[:end]).lower() + b"\r\n"
            if b"\r\ntransfer-encoding: chunked\r\n" in head:
                self._due_bytes = -1
            else:
                length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
                self._due_bytes = end + 4 + int(length)
        # An event ends in two line feeds, so nothing but the last chunk ends like this.
        whole = (
            received.endswith(b"\r\n0\r\n\r\n") if self._due_bytes < 0 else len(received) >= self._due_bytes
        )
        if whole and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(bytes(received))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def whole(chunked: bytes) -> bytes:
    """A body without the sizes of its chunks."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = chunked.index(b"\r\n", at)
        size = int(chunked[at:end], 16)
        if not size:
            return b"".join(parts)
        parts.append(chunked[end + 2 : end + 2 + size])
        at = end + 4 + size


class HttpClient:
    """OpenAI's chat completions."""

    def __init__(self, job: Job, connection: _Connection) -> None:
        body: dict[str, Any] = {
            "model": job.model,
            "messages": [{"role": "user", "content": prompt(job.words)}],
            "max_tokens": job.words,
        }
        body |= ({"temperature": 0} if job.greedy else {}) | ({"stream": True} if job.streamed else {})
        content = json.dumps(body).encode()
        lines = [
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: {job.target.address}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            *(f"{name}: {value}" for name, value in job.target.metadata),
        ]
        self._request = "\r\n".join(lines).encode() + b"\r\n\r\n" + content
        self._streamed = job.streamed
        self._connection = connection

    @classmethod
    async def open(cls, job: Job) -> HttpClient:
        host, _, port = job.target.address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, host, int(port))
        return cls(job, connection)

    async def ask(self) -> int:
        body = await self._body()
        # Without the first event, which has the role alone, the last one with the reason, and [DONE].
        return body.count(b"data: {") - 2 if self._streamed else 0

    async def text(self) -> str:
        body = await self._body()
        if not self._streamed:
            found: str = json.loads(body)["choices"][0]["message"]["content"]
            return found
        events = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]
        choices = [choice for event in events for choice in event["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    async def _body(self) -> bytes:
        answer = await self._connection.exchange(numbered(self._request, next(_numbers)))
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise ValueError(answer[:1000].decode(errors="replace"))
        return whole(body) if b"chunked" in head else body

    async def close(self) -> None:
        self._connection.close()


class GrpcClient:
    """GenerationService of the gateway; of InferenceService behind it what answers in one piece."""

    def __init__(self, job: Job, channel: grpc.aio.Channel) -> None:
        spec = generation_pb2.GenerationSpec(
            model=job.model,
            prompt=generation_pb2.Prompt(
                chat=generation_pb2.Chat(
                    messages=[
                        generation_pb2.ChatMessage(
                            role=generation_pb2.ROLE_USER,
                            content=[generation_pb2.ContentPart(text=prompt(job.words))],
                        )
                    ]
                )
            ),
            sampling=generation_pb2.SamplingParams(temperature=0.0 if job.greedy else None),
            max_tokens=job.words,
        )
        self._metadata = tuple(
            (name, bytes.fromhex(value) if name.endswith("-bin") else value)
            for name, value in job.target.metadata
        )
        self._streamed = job.streamed
        self._call: Any
        self._read: Callable[[bytes], str]
        if job.target.protocol == "inference":
            inner = inference_service_pb2.GenerateRequest(
                request_id="bench", spec=spec, priority=inference_service_pb2.PRIORITY_INTERACTIVE
            )
            asked: Any = inference_service_pb2.GenerateWholeRequest(request=inner)
            self._call = channel.unary_unary(GENERATE_WHOLE)
            self._read = _whole_text
        elif job.streamed:
            asked = generation_service_pb2.StreamGenerateRequest(spec=spec)
            self._call = channel.unary_stream(STREAM_GENERATE)
            self._read = _delta_text
        else:
            asked = generation_service_pb2.GenerateRequest(spec=spec)
            self._call = channel.unary_unary(GENERATE)
            self._read = _choice_text
        self._many = isinstance(self._call, grpc.aio.UnaryStreamMultiCallable)
        self._request = asked.SerializeToString()

    async def ask(self) -> int:
        call = self._call(numbered(self._request, next(_numbers)), metadata=self._metadata, timeout=TIMEOUT_S)
        if not self._many:
            await call
            return 0
        count = 0
        while await call.read() is not grpc.aio.EOF:
            count += 1
        return count - 2 if self._streamed else 0  # without Started and Finished

    async def text(self) -> str:
        call = self._call(numbered(self._request, next(_numbers)), metadata=self._metadata, timeout=TIMEOUT_S)
        if not self._many:
            return self._read(await call)
        return "".join([self._read(each) async for each in call])

    async def close(self) -> None:
        """The channel is the job's."""


def _choice_text(answer: bytes) -> str:
    return generation_service_pb2.GenerateResponse.FromString(answer).choices[0].text


def _delta_text(answer: bytes) -> str:
    return generation_service_pb2.StreamGenerateResponse.FromString(answer).delta.text


def _whole_text(answer: bytes) -> str:
    return "".join(
        each.text for each in inference_service_pb2.GenerateWholeResponse.FromString(answer).deltas
    )


async def clients(job: Job, stack: list[Callable[[], Awaitable[object]]]) -> list[Client]:
    """As many as the job has streams; `stack` gets what closes them."""
    made: list[Client] = []
    if job.target.protocol == "http":
        made += [await HttpClient.open(job) for _ in range(job.streams)]
    else:
        channel = grpc.aio.insecure_channel(job.target.address, options=CHANNEL_OPTIONS)
        stack.append(channel.close)
        await asyncio.wait_for(channel.channel_ready(), TIMEOUT_S)
        made += [GrpcClient(job, channel) for _ in range(job.streams)]
    stack += [client.close for client in made]
    return made


async def run(job: Job) -> dict[str, Any]:
    """Does a job; one with neither time nor number reads one answer, and says its text."""
    stack: list[Callable[[], Awaitable[object]]] = []
    try:
        asking = await clients(job, stack)
        if not job.seconds and not job.requests:
            return {"text": await asyncio.wait_for(asking[0].text(), TIMEOUT_S)}
        latencies_s: list[float] = []
        tokens = 0
        begun_s = time.perf_counter()
        until_s = begun_s + (job.seconds or float("inf"))
        left = job.requests or sys.maxsize

        async def ask(client: Client) -> None:
            nonlocal tokens, left
            sent_s = time.perf_counter()
            while sent_s < until_s and left > 0:
                left -= 1
                came = await client.ask()
                tokens += came
                now_s = time.perf_counter()
                latencies_s.append(now_s - sent_s)
                sent_s = now_s

        async with asyncio.timeout(job.seconds + TIMEOUT_S * 5), asyncio.TaskGroup() as group:
            for client in asking:
                group.create_task(ask(client))
        took_s = time.perf_counter() - begun_s
    finally:
        for close in reversed(stack):
            await close()
    latencies_s.sort()
    return {
        "requests": len(latencies_s),
        "tokens": tokens,
        "took_s": took_s,
        "p50_s": _at(latencies_s, 0.5),
        "p99_s": _at(latencies_s, 0.99),
    }


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def main() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
        try:
            answer = await run(Job.read(line))
        except BaseExceptionGroup as group:
            answer = {"error": repr(group.exceptions[0])}
        except (OSError, ValueError, LookupError, grpc.RpcError) as error:
            answer = {"error": repr(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(main())
