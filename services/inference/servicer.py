"""The gRPC edge of inference: parse, call the engine, number what it says. Policy stands in the chain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
from llmos.inference.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)

from services.inference import request as requests
from services.inference.engine.port import Delta, Engine
from services.mesh import context
from services.mesh.clock import Clock


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Runs models."""

    def __init__(self, engine: Engine, clock: Clock, *, replica: str) -> None:
        self._engine = engine
        self._clock = clock
        self._replica = replica

    async def Generate(
        self,
        request: inference_service_pb2.GenerateRequest,
        servicer_context: grpc.aio.ServicerContext[
            inference_service_pb2.GenerateRequest, inference_service_pb2.GenerateResponse
        ],
    ) -> AsyncIterator[inference_service_pb2.GenerateResponse]:
        left_s = context.require_current().deadline_s - self._clock.monotonic()
        parsed = requests.parse_generate(request, timeout_s=left_s if left_s < float("inf") else None)
        seq = 0
        # Whatever ends the call closes the generator, and so the work.
        async with aclosing(self._engine.generate(parsed)) as events:
            async for event in events:
                seq += isinstance(event, Delta)
                yield requests.event_message(event, seq=seq, replica=self._replica)

    async def Tokenize(
        self,
        request: inference_service_pb2.TokenizeRequest,
        servicer_context: grpc.aio.ServicerContext[
            inference_service_pb2.TokenizeRequest, inference_service_pb2.TokenizeResponse
        ],
    ) -> inference_service_pb2.TokenizeResponse:
        count = await self._engine.count_tokens(
            request.model, requests.parse_prompt(request.prompt, "prompt")
        )
        return inference_service_pb2.TokenizeResponse(
            prompt_tokens=count.prompt_tokens, context_tokens=count.context_tokens
        )


class FleetServicer(fleet_service_pb2_grpc.FleetServiceServicer):
    """Tells what this replica serves."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ListModels(
        self,
        request: fleet_service_pb2.ListModelsRequest,
        servicer_context: grpc.aio.ServicerContext[
            fleet_service_pb2.ListModelsRequest, fleet_service_pb2.ListModelsResponse
        ],
    ) -> fleet_service_pb2.ListModelsResponse:
        return fleet_service_pb2.ListModelsResponse(
            models=[requests.model_message(model) for model in self._engine.models()]
        )
