"""One replica of inference over gRPC, and the translation to and from its messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import UTC
from enum import IntEnum
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from llmos.gateway.v1 import generation_pb2, model_service_pb2
from llmos.inference.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)

from services.gateway.generation import (
    Alternative,
    Capability,
    Delta,
    EngineEvent,
    EngineStarted,
    Finished,
    FinishReason,
    Model,
    Prompt,
    TokenCount,
    TokenLogprob,
    Usage,
    ValidGeneration,
    ValidPrompt,
    WholeAnswer,
)
from services.gateway.replica.carrier import CarriedCall, Carriers, CarryStream, Said
from services.gateway.replica.delta_watch import DeltaWatch, Inbox, WatchedDelta
from services.mesh import status
from services.mesh.channel import IDENTITY_KEY, Channel
from services.mesh.clock import Clock
from services.mesh.errors import DependencyUnavailable, ReplicaLost
from services.mesh.interceptors import REQUEST_ID_KEY
from services.mesh.outgoing import OutgoingExchange

LASTING_TIMEOUT_S = 86_400.0
"""More than a replica lets a call last that carries others, so that it is the replica that ends it."""
JOB_GATHER_MS = 1000
"""Whoever watches a job sees how far it is about once a second."""
_CARRIED_METADATA = (
    (REQUEST_ID_KEY, "request_id"),
    (IDENTITY_KEY, "identity"),
    ("traceparent", "traceparent"),
    ("tracestate", "tracestate"),
)
_REASONS = {int(reason): reason for reason in FinishReason}
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


class GrpcInference:
    """An `InferencePort` over one replica's channel."""

    def __init__(self, channel: Channel, clock: Clock, *, probe_timeout_s: float = 2.0) -> None:
        self._channel = channel
        self._inference = inference_service_pb2_grpc.InferenceServiceStub(channel)
        self._watch = DeltaWatch(self, clock)
        self._carriers = Carriers(self, clock)
        self._fleet = fleet_service_pb2_grpc.FleetServiceStub(channel)
        self._probe_timeout_s = probe_timeout_s

    @property
    def is_watching(self) -> bool:
        """Whether the deltas of what begins now come in one stream with all others."""
        return self._watch.is_open

    @property
    def is_carrying(self) -> bool:
        """Whether what begins now and is not read along goes in one stream with all others."""
        return self._carriers.is_open

    async def close(self) -> None:
        """Ends what is shared: of what runs, streams get the rest in their own calls, and others are lost."""
        await self._watch.close()
        await self._carriers.close()

    async def generate(self, request_id: str, request: ValidGeneration) -> AsyncGenerator[EngineEvent, None]:
        message = _message(request_id, request)
        # Of a job's deltas there are few.
        inbox = None if request.is_job else self._watch.inbox()
        if inbox is not None:
            message.watched.watch_id, message.watched.number = inbox.watch_id, inbox.number
        call = self._inference.Generate(message)
        seq = 0
        try:
            with _lost:
                async for response in call:
                    # The token path: no more than what an edge or the check of the sequence needs.
                    if response.HasField("delta"):
                        seq = _next(seq, response.delta.seq, inbox)
                        yield _delta(response.delta)
                    elif response.HasField("started"):
                        yield _started(response.started)
                        if inbox is not None and response.watched:
                            async for watched in inbox:
                                seq = _next(seq, watched.seq, inbox)
                                yield watched
                    elif response.HasField("finished"):
                        _next(seq, response.last_seq + 1, inbox)
                        yield _finished(response.finished)
        finally:
            call.cancel()
            if inbox is not None:
                inbox.close()

    async def generate_whole(self, request_id: str, request: ValidGeneration) -> WholeAnswer:
        message = _message(request_id, request)
        found: inference_service_pb2.GenerateWholeResponse | None = None
        carrier = self._carriers.carrier()
        if carrier is not None:
            metadata, left_s = await self._channel.prepare(None)
            try:
                found = await carrier.ask(
                    message.SerializeToString(), dict(metadata), min(left_s, LASTING_TIMEOUT_S)
                )
            except DependencyUnavailable as error:
                raise _replica_lost() from error
        if found is None:
            with _lost:
                found = await self._inference.GenerateWhole(
                    inference_service_pb2.GenerateWholeRequest(request=message)
                )
        return WholeAnswer(
            _started(found.started, found.time_to_first_token_s),
            [_delta(delta) for delta in found.deltas],
            _finished(found.finished),
        )

    def carry(self) -> CarryStream[inference_service_pb2.GenerateWholeResponse]:
        """As a `CarrySource`."""
        return _CarryStream(self._inference)

    def connection(self) -> object:
        """As a `DeltaSource` and a `CarrySource`."""
        return self._channel.inner()

    async def watch(self, watch_id: str) -> AsyncGenerator[Sequence[WatchedDelta], None]:
        """As a `DeltaSource`."""
        request = inference_service_pb2.WatchDeltasRequest(watch_id=watch_id)
        call = self._inference.WatchDeltas(request, timeout=LASTING_TIMEOUT_S)
        try:
            async for response in call:
                yield [
                    WatchedDelta(
                        each.number, _delta(each.delta) if each.HasField("delta") else None, each.last
                    )
                    for each in response.deltas
                ]
        finally:
            call.cancel()

    async def unwatch(self, watch_id: str, number: int) -> None:
        """As a `DeltaSource`."""
        request = inference_service_pb2.UnwatchDeltasRequest()
        request.watched.watch_id, request.watched.number = watch_id, number
        await self._inference.UnwatchDeltas(request, timeout=self._probe_timeout_s)

    async def count_tokens(self, request: ValidPrompt) -> TokenCount:
        message = inference_service_pb2.TokenizeRequest(model=request.model)
        _fill_prompt(message.prompt, request.prompt)
        with _lost:
            found = await self._inference.Tokenize(message)
        return TokenCount(found.prompt_tokens, found.context_tokens)

    async def list_models(self) -> tuple[Model, ...]:
        with _lost:
            found = await self._fleet.ListModels(
                fleet_service_pb2.ListModelsRequest(), timeout=self._probe_timeout_s
            )
        return tuple(_model(each) for each in found.models)

    async def max_running(self) -> int:
        call = self._fleet.WatchLoad(fleet_service_pb2.WatchLoadRequest(), timeout=self._probe_timeout_s)
        try:
            with _lost:
                async for load in call:
                    return max(int(load.max_running), 1)
            raise ReplicaLost("The replica did not say how much it takes.")
        finally:
            call.cancel()

    async def is_healthy(self) -> bool:
        # Health is open to everyone: asked without a token, it tells of the replica alone.
        stub: Any = health_pb2_grpc.HealthStub(self._channel.inner())
        try:
            found = await stub.Check(health_pb2.HealthCheckRequest(), timeout=self._probe_timeout_s)
        except grpc.aio.AioRpcError:
            return False
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)


class _CarryStream:
    """A GenerateMany call, as a `CarryStream`."""

    def __init__(self, stub: Any) -> None:
        # As our channel makes it, of which the stub's types do not know.
        call: OutgoingExchange = stub.GenerateMany(timeout=LASTING_TIMEOUT_S)
        self._call = call
        self._authorization = ""
        """As last said."""

    async def __aiter__(self) -> AsyncIterator[Said[inference_service_pb2.GenerateWholeResponse]]:
        async for response in self._call:
            yield Said(
                [
                    (each.number, status.from_details(each.error) if each.HasField("error") else each.whole)
                    for each in response.answers
                ],
                response.retired,
                response.max_request_bytes,
            )

    async def write(self, calls: Sequence[CarriedCall], cancelled: Sequence[int]) -> None:
        message = inference_service_pb2.GenerateManyRequest(cancelled=cancelled)
        for call in calls:
            added, metadata = message.calls.add(), call.metadata
            added.number, added.request, added.timeout_s = call.number, call.request, call.timeout_s
            for key, name in _CARRIED_METADATA:
                if key in metadata:
                    setattr(added, name, metadata[key])
            authorization = metadata.get("authorization", "")
            if isinstance(authorization, str) and authorization != self._authorization:
                added.authorization = self._authorization = authorization
        await self._call.write(message)

    async def done_writing(self) -> None:
        await self._call.done_writing()

    def cancel(self) -> None:
        self._call.cancel()


class _Lost:
    """A replica that cannot be reached, as what it is. A fault on this side of the wire stays what it was."""

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DependencyUnavailable) and isinstance(error.__cause__, grpc.aio.AioRpcError):
            raise _replica_lost() from error


_lost = _Lost()


def _replica_lost() -> ReplicaLost:
    return ReplicaLost("The replica that served the request was lost.")


def _next(before: int, seq: int, inbox: Inbox | None) -> int:
    """The number of a delta. Of two ways one may end too soon, which leaves a gap; on one alone a gap is a
    fault, and found out by those who read it. Raises ReplicaLost."""
    if inbox is not None and seq != before + 1:
        raise ReplicaLost("A part of the answer was lost on its way from the replica.")
    return seq


def _message(request_id: str, request: ValidGeneration) -> inference_service_pb2.GenerateRequest:
    message = inference_service_pb2.GenerateRequest(request_id=request_id, priority=_same(request.priority))
    _fill_spec(message.spec, request)
    if request.is_job:
        message.gather_ms = JOB_GATHER_MS
    return message


def _fill_spec(spec: generation_pb2.GenerationSpec, request: ValidGeneration) -> None:
    spec.model = request.model
    _fill_prompt(spec.prompt, request.prompt)
    spec.sampling.seed = request.sampling.seed
    for name in _SAMPLING:
        value = getattr(request.sampling, name)
        if value is not None:
            setattr(spec.sampling, name, value)
    for token_id, bias in request.sampling.logit_bias:
        spec.sampling.logit_bias[token_id] = bias
    if request.max_tokens is not None:
        spec.max_tokens = request.max_tokens
    spec.n = request.n
    # What nearly nobody asks for.
    if request.stop:
        spec.stop.extend(request.stop)
    if request.stop_token_ids:
        spec.stop_token_ids.extend(request.stop_token_ids)
    if request.logprobs:
        spec.logprobs, spec.top_logprobs = True, request.top_logprobs
    if request.ignore_eos:
        spec.ignore_eos = True
    # end_user and labels stay here: the engine has no use for them.


def _fill_prompt(message: generation_pb2.Prompt, prompt: Prompt) -> None:
    if not prompt.is_chat:
        message.text = prompt.text
        return
    for given in prompt.messages:
        added = message.chat.messages.add(role=given.role.value, name=given.name)
        for part in given.parts:
            added.content.add(text=part)


def _started(
    message: inference_service_pb2.EngineStarted, first_token_s: float | None = None
) -> EngineStarted:
    return EngineStarted(
        message.model_revision, message.prompt_tokens, message.replica, first_token_s, message.numerics_id
    )


def _delta(message: generation_pb2.Delta) -> Delta:
    return Delta(
        message.seq,
        message.choice_index,
        message.text,
        message.token_ids,
        [_logprob(entry) for entry in message.logprobs] if message.logprobs else (),
    )


def _same(number: IntEnum) -> Any:
    """Our enums have the numbers of the protos, which a test keeps so."""
    return number.value


def _finished(message: generation_pb2.Finished) -> Finished:
    ends: Sequence[generation_pb2.ChoiceEnd] = message.choices
    usage = message.usage
    if len(ends) > 1:
        ends = sorted(ends, key=lambda end: end.index)
    return Finished(
        tuple([_REASONS[end.finish_reason] for end in ends]),
        Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens),
    )


def _logprob(entry: generation_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(_alternative(entry.chosen), tuple(_alternative(each) for each in entry.top))


def _alternative(entry: generation_pb2.TokenLogprob.Alternative) -> Alternative:
    return Alternative(entry.token_id, entry.token, entry.logprob)


def _model(message: model_service_pb2.Model) -> Model:
    known = {item.value for item in Capability}
    return Model(
        id=message.id,
        revision=message.revision,
        capabilities=tuple(Capability(value) for value in message.capabilities if value in known),
        context_tokens=message.context_tokens,
        create_time=message.create_time.ToDatetime(tzinfo=UTC) if message.HasField("create_time") else None,
        ready=message.ready,
        numerics_id=message.numerics_id,
    )
