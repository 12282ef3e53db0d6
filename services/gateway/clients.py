"""The ports over gRPC: auth, inference and logging, and the translation to and from their messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from datetime import UTC
from enum import IntEnum
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from llmos.auth.v1 import token_service_pb2, token_service_pb2_grpc
from llmos.common.v1 import identity_pb2
from llmos.gateway.v1 import generation_pb2, model_service_pb2
from llmos.inference.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from llmos.logging.v1 import audit_service_pb2, audit_service_pb2_grpc

from services.gateway.delta_watch import DeltaWatch, Inbox, WatchedDelta
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
)
from services.mesh.channel import Channel
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import DeadlineExceeded, DependencyUnavailable, ReplicaLost

WATCH_TIMEOUT_S = 86_400.0
"""More than a replica lets a call last, so that it is the replica that ends it."""
JOB_GATHER_MS = 1000
"""Whoever watches a job sees how far it is about once a second."""
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


class GrpcAuth:
    """An `AuthPort`."""

    def __init__(self, channel: Channel, *, timeout_s: float = 5.0) -> None:
        self._stub = token_service_pb2_grpc.TokenServiceStub(channel)
        self._timeout_s = timeout_s

    async def exchange(self, api_key: str) -> str:
        request = token_service_pb2.VerifyApiKeyRequest(api_key=api_key)
        response = await self._stub.VerifyApiKey(request, timeout=self._timeout_s)
        token: str = response.access_token.token
        return token


class GrpcRenewal:
    """A `RenewalPort`."""

    def __init__(self, channel: Channel, *, timeout_s: float = 5.0) -> None:
        self._stub = token_service_pb2_grpc.TokenServiceStub(channel)
        self._timeout_s = timeout_s

    async def renew(self, identity: Identity) -> str:
        message = identity_pb2.Identity(
            tenant_id=identity.tenant_id,
            client_id=identity.client_id,
            key_id=identity.key_id,
            scopes=sorted(identity.scopes),
            roles=sorted(identity.roles),
            token_id=identity.token_id,
        )
        message.issue_time.seconds = identity.issued_at_s
        request = token_service_pb2.RenewIdentityRequest(identity=message)
        try:
            response = await self._stub.RenewIdentity(request, timeout=self._timeout_s)
        except DeadlineExceeded as error:
            raise DependencyUnavailable("Auth does not answer.") from error
        token: str = response.access_token.token
        return token


class GrpcInference:
    """An `InferencePort` over one replica's channel."""

    def __init__(self, channel: Channel, clock: Clock, *, probe_timeout_s: float = 2.0) -> None:
        self._channel = channel
        self._inference = inference_service_pb2_grpc.InferenceServiceStub(channel)
        self._watch = DeltaWatch(self, clock)
        self._fleet = fleet_service_pb2_grpc.FleetServiceStub(channel)
        self._probe_timeout_s = probe_timeout_s

    @property
    def is_watching(self) -> bool:
        """Whether the deltas of what begins now come in one stream with all others."""
        return self._watch.is_open

    async def close(self) -> None:
        """Ends the watch of deltas; what runs gets the rest in its own call."""
        await self._watch.close()

    async def generate(
        self, request_id: str, request: ValidGeneration, *, whole: bool = False
    ) -> AsyncGenerator[EngineEvent, None]:
        message = inference_service_pb2.GenerateRequest(
            request_id=request_id, priority=_same(request.priority)
        )
        _fill_spec(message.spec, request)
        if request.is_job:
            message.gather_ms = JOB_GATHER_MS
        if whole:
            with _lost:
                found = await self._inference.GenerateWhole(
                    inference_service_pb2.GenerateWholeRequest(request=message)
                )
            yield _started(found.started, found.time_to_first_token_s)
            for delta in found.deltas:
                yield _delta(delta)
            yield _finished(found.finished)
            return
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

    def connection(self) -> object:
        """As a `DeltaSource`."""
        return self._channel.inner()

    async def watch(self, watch_id: str) -> AsyncGenerator[Sequence[WatchedDelta], None]:
        """As a `DeltaSource`."""
        request = inference_service_pb2.WatchDeltasRequest(watch_id=watch_id)
        call = self._inference.WatchDeltas(request, timeout=WATCH_TIMEOUT_S)
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


class GrpcAuditLog:
    """Reads the audit log at the logging service, which restricts a caller to what is theirs."""

    def __init__(self, channel: Channel) -> None:
        self._stub = audit_service_pb2_grpc.AuditServiceStub(channel)

    async def search(self, request: audit_service_pb2.SearchRequest) -> audit_service_pb2.SearchResponse:
        response: audit_service_pb2.SearchResponse = await self._stub.Search(request)
        return response

    async def tail(
        self, request: audit_service_pb2.TailRequest
    ) -> AsyncGenerator[audit_service_pb2.TailResponse, None]:
        call = self._stub.Tail(request)
        try:
            async for response in call:
                yield response
        finally:
            call.cancel()


class _Lost:
    """A replica that cannot be reached, as what it is. A fault on this side of the wire stays what it was."""

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DependencyUnavailable) and isinstance(error.__cause__, grpc.aio.AioRpcError):
            raise ReplicaLost("The replica that served the request was lost.") from error


_lost = _Lost()


def _next(before: int, seq: int, inbox: Inbox | None) -> int:
    """The number of a delta. Of two ways one may end too soon, which leaves a gap; on one alone a gap is a
    fault, and found out by those who read it. Raises ReplicaLost."""
    if inbox is not None and seq != before + 1:
        raise ReplicaLost("A part of the answer was lost on its way from the replica.")
    return seq


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
    spec.stop.extend(request.stop)
    spec.stop_token_ids.extend(request.stop_token_ids)
    spec.n = request.n
    spec.logprobs = request.logprobs
    spec.top_logprobs = request.top_logprobs
    spec.ignore_eos = request.ignore_eos
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
    ends = sorted(message.choices, key=lambda end: end.index)
    return Finished(
        tuple(FinishReason(end.finish_reason) for end in ends),
        Usage(
            message.usage.prompt_tokens, message.usage.completion_tokens, message.usage.cached_prompt_tokens
        ),
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
