"""The least that a gateway can be: one hop with grpc.aio and uvloop, no policy, bytes as they came.

`python -m tests.bench.gateway_proxy PORT UPSTREAM`
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
import uvloop

from tests.bench.gateway_load import CHANNEL_OPTIONS, GENERATE, STREAM_GENERATE
from tests.bench.gateway_upstream import serve_grpc


class Proxy(grpc.GenericRpcHandler):
    """Forwards GenerationService's two methods. A caller that goes away cancels the call behind it."""

    def __init__(self, upstream: grpc.aio.Channel) -> None:
        self._generate: Any = upstream.unary_unary(GENERATE)
        self._stream: Any = upstream.unary_stream(STREAM_GENERATE)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if details.method == GENERATE:
            return grpc.unary_unary_rpc_method_handler(self._forward)
        if details.method == STREAM_GENERATE:
            return grpc.unary_stream_rpc_method_handler(self._forward_stream)
        return None

    async def _forward(self, request: bytes, context: Any) -> bytes:
        answer: bytes = await self._generate(request, timeout=context.time_remaining())
        return answer

    async def _forward_stream(self, request: bytes, context: Any) -> None:
        call = self._stream(request, timeout=context.time_remaining())
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                await context.write(message)
        finally:
            call.cancel()


async def main(port: int, upstream: str) -> None:
    await serve_grpc(port, Proxy(grpc.aio.insecure_channel(upstream, options=CHANNEL_OPTIONS)))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
