"""Load for tests of limits: clients that each ask for more than they may have, of two gateways in turn."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field

import grpc
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc

from services.mesh import status
from tests.framework.identities import bearer

TIMEOUT_S = 10


@dataclass
class Result:
    """What became of one client's requests."""

    tokens: int = 0
    seconds: float = 0.0
    """From a bucket that held nothing to the last request."""
    answered: int = 0
    refused: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Reasons of errors that its limit does not explain."""


class LimitedClient:
    """One client with a key of its own."""

    def __init__(self, channels: list[grpc.aio.Channel], key: str, model: str) -> None:
        self._stubs = itertools.cycle(
            [generation_service_pb2_grpc.GenerationServiceStub(channel) for channel in channels]
        )
        self._metadata = bearer(key)
        self._model = model
        self.result = Result()

    async def ask(self, text: str, max_tokens: int) -> bool:
        """Whether it was answered."""
        spec = generation_pb2.GenerationSpec(model=self._model, max_tokens=max_tokens)
        spec.prompt.text = text
        request = generation_service_pb2.GenerateRequest(spec=spec)
        result = self.result
        try:
            answer = await next(self._stubs).Generate(request, metadata=self._metadata, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            reason = status.from_rpc_error(error).reason
            if reason == "RATE_LIMIT":
                result.refused += 1
            else:
                result.failed[f"{reason}: {error.details()}"] += 1
            return False
        result.answered += 1
        result.tokens += answer.usage.prompt_tokens + answer.usage.completion_tokens
        return True

    async def drain(self, text: str, max_tokens: int) -> None:
        """Takes what its bucket holds."""
        while await self.ask(text, max_tokens):
            pass

    async def ask_steadily(self, text: str, max_tokens: int, *, per_s: float, seconds: float) -> Result:
        """Begins so many requests a second, whatever becomes of those before; returns what became of them.
        Its bucket has just been drained."""
        self.result = Result()
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(round(per_s * seconds)):
                await asyncio.sleep(begun_s + number / per_s - loop.time())
                group.create_task(self.ask(text, max_tokens))
            self.result.seconds = loop.time() - begun_s
        return self.result
