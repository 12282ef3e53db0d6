"""The gRPC edge of inference: parse, call the engine, number what it says. Policy stands in the chain."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial

import grpc
from llmos.inference.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)

from services.inference import request as requests
from services.inference.access import GENERATE_WHOLE
from services.inference.carrier import Carrier
from services.inference.delta_watches import DeltaWatch, DeltaWatches, Way
from services.inference.engine.port import Delta, Direct, Engine, EngineEvent, Started
from services.inference.whole import Whole
from services.mesh import context
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError, MessageTooLarge
from services.mesh.interceptors import Chain
from services.mesh.running import RunningCalls

CARRY_S = 300.0
"""So long a GenerateMany takes calls; it lasts as much longer as they may."""
MAX_ANSWER_BYTES = 4 * 1024 * 1024 - 4096
"""The gateway takes messages of 4 MiB."""
WATCH_END_MARGIN_S = 5.0
"""So long before its deadline a watch of deltas ends by itself."""

_Carrier = Carrier[inference_service_pb2.GenerateWholeResponse]


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Runs models."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        *,
        replica: str,
        chain: Chain,
        running: RunningCalls,
        max_request_bytes: int,
    ) -> None:
        """`chain`: what each carried call passes; `max_request_bytes`: what the server takes."""
        self._engine = engine
        self._clock = clock
        self._replica = replica
        self._chain = chain
        self._running = running
        self._max_request_bytes = max_request_bytes
        self._watches = DeltaWatches()

    async def Generate(
        self,
        request: inference_service_pb2.GenerateRequest,
        servicer_context: grpc.aio.ServicerContext[
            inference_service_pb2.GenerateRequest, inference_service_pb2.GenerateResponse
        ],
    ) -> AsyncIterator[inference_service_pb2.GenerateResponse]:
        seq = request.after_seq
        way = self._way(request)
        try:
            # Whatever ends the call closes the generator, and so the work.
            direct = None if way is None else way.offer
            async with aclosing(self._generated(request, direct=direct)) as events:
                async for event in events:
                    if way is not None and not isinstance(event, Started):
                        if isinstance(event, Delta) and await way.put(event):
                            continue
                        for entry in await way.left():
                            yield requests.left_message(entry)
                        seq = max(seq, way.seq)
                    if isinstance(event, Delta):
                        seq += 1
                    yield requests.event_message(
                        event, seq=seq, replica=self._replica, watched=way is not None
                    )
        finally:
            if way is not None:
                way.close()

    def _way(self, request: inference_service_pb2.GenerateRequest) -> Way | None:
        """Where the deltas go, if not into the call."""
        if not request.HasField("watched"):
            return None
        watch = self._watches.get(request.watched.watch_id)
        return None if watch is None else watch.way(request.watched.number, request.after_seq)

    async def WatchDeltas(
        self,
        request: inference_service_pb2.WatchDeltasRequest,
        servicer_context: grpc.aio.ServicerContext[
            inference_service_pb2.WatchDeltasRequest, inference_service_pb2.WatchDeltasResponse
        ],
    ) -> AsyncIterator[inference_service_pb2.WatchDeltasResponse]:
        with self._watches.open(request.watch_id) as watch:
            left_s = context.require_current().deadline_s - self._clock.monotonic()
            # Before the deadline cuts it off: so all that was taken arrives.
            ending = asyncio.create_task(self._end_in(watch, left_s - WATCH_END_MARGIN_S))
            try:
                yield inference_service_pb2.WatchDeltasResponse()
                while entries := await watch.take():
                    yield requests.watched_message(entries)
            finally:
                ending.cancel()

    async def _end_in(self, watch: DeltaWatch, left_s: float) -> None:
        if left_s < math.inf:
            await self._clock.sleep(max(left_s, 0.0))
            watch.end_soon()

    async def UnwatchDeltas(
        self,
        request: inference_service_pb2.UnwatchDeltasRequest,
        servicer_context: grpc.aio.ServicerContext[
            inference_service_pb2.UnwatchDeltasRequest, inference_service_pb2.UnwatchDeltasResponse
        ],
    ) -> inference_service_pb2.UnwatchDeltasResponse:
        watch = self._watches.get(request.watched.watch_id)
        if watch is not None:
            watch.leave(request.watched.number)
        return inference_service_pb2.UnwatchDeltasResponse()

    async def GenerateWhole(
        self,
        request: inference_service_pb2.GenerateWholeRequest,
        servicer_context: grpc.aio.ServicerContext[
            inference_service_pb2.GenerateWholeRequest, inference_service_pb2.GenerateWholeResponse
        ],
    ) -> inference_service_pb2.GenerateWholeResponse:
        return await self._whole(request.request)

    async def _whole(
        self, request: inference_service_pb2.GenerateRequest
    ) -> inference_service_pb2.GenerateWholeResponse:
        arrived_s = self._clock.monotonic()
        whole = Whole(request.spec.n or 1)
        async with aclosing(self._generated(request, gather_s=math.inf)) as events:
            async for event in events:
                if isinstance(event, Delta) and not whole.time_to_first_token_s:
                    whole.time_to_first_token_s = self._clock.monotonic() - arrived_s
                whole.add(event)
        return requests.whole_message(whole, after_seq=request.after_seq, replica=self._replica)

    async def GenerateMany(
        self,
        request_iterator: AsyncIterator[inference_service_pb2.GenerateManyRequest],
        servicer_context: grpc.aio.ServicerContext[
            inference_service_pb2.GenerateManyRequest, inference_service_pb2.GenerateManyResponse
        ],
    ) -> AsyncIterator[inference_service_pb2.GenerateManyResponse]:
        carrier: _Carrier = Carrier(self._chain, GENERATE_WHOLE, context.require_current().source_address)
        beside = (
            asyncio.create_task(self._read_calls(carrier, request_iterator)),
            asyncio.create_task(self._retire(carrier)),
        )
        try:
            yield inference_service_pb2.GenerateManyResponse(max_request_bytes=self._max_request_bytes)
            while (answers := await carrier.take()) is not None:
                yield requests.many_message(answers, retired=carrier.take_retired())
        finally:
            for task in beside:
                task.cancel()
            await carrier.close()

    async def _read_calls(
        self, carrier: _Carrier, messages: AsyncIterator[inference_service_pb2.GenerateManyRequest]
    ) -> None:
        authorization = ""
        failed: LlmosError | None = None
        try:
            async for message in messages:
                for number in message.cancelled:
                    carrier.cancel(number)
                for call in message.calls:
                    authorization = call.authorization or authorization
                    carried, request = requests.carried(call, authorization)
                    carrier.begin(carried, partial(self._carried_whole, request))
                await carrier.room()
        except LlmosError as error:
            failed = error
        finally:
            carrier.no_more(failed)

    async def _carried_whole(
        self, request: Callable[[], inference_service_pb2.GenerateRequest]
    ) -> tuple[inference_service_pb2.GenerateWholeResponse, int]:
        whole = await self._whole(request())
        size_bytes = whole.ByteSize()
        if size_bytes > MAX_ANSWER_BYTES:
            raise MessageTooLarge(f"The answer is longer than {MAX_ANSWER_BYTES} bytes.")
        return whole, size_bytes

    async def _retire(self, carrier: _Carrier) -> None:
        """A drain waits for calls that run, and so for those that a carrier still takes; nor may one outlast
        its deadline."""
        begins = asyncio.create_task(self._running.drain_begins())
        ages = asyncio.create_task(self._clock.sleep(CARRY_S))
        try:
            await asyncio.wait((begins, ages), return_when=asyncio.FIRST_COMPLETED)
            carrier.retire()
        finally:
            begins.cancel()
            ages.cancel()

    def _generated(
        self,
        request: inference_service_pb2.GenerateRequest,
        *,
        gather_s: float = 0.0,
        direct: Direct | None = None,
    ) -> AsyncGenerator[EngineEvent, None]:
        current = context.require_current()
        left_s = current.deadline_s - self._clock.monotonic()
        parsed = requests.parse_generate(
            request,
            tenant=current.identity.tenant_id,
            timeout_s=left_s if left_s < float("inf") else None,
            gather_s=gather_s,
        )
        return self._engine.generate(parsed, direct)

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
    """Tells what this replica serves, and how busy it is."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

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

    async def WatchLoad(
        self,
        request: fleet_service_pb2.WatchLoadRequest,
        servicer_context: grpc.aio.ServicerContext[
            fleet_service_pb2.WatchLoadRequest, fleet_service_pb2.WatchLoadResponse
        ],
    ) -> AsyncIterator[fleet_service_pb2.WatchLoadResponse]:
        shortest_s, longest_s = requests.parse_watch(request)
        told = None
        due_s = self._clock.monotonic()
        while True:
            load = requests.load_message(self._engine.health(), self._engine.load(), self._engine.models()[0])
            now_s = self._clock.monotonic()
            if load != told or now_s >= due_s:
                told, due_s = load, now_s + longest_s
                yield load
            await self._clock.sleep(min(shortest_s, due_s - now_s))
