"""The gRPC edge: parse, call the use case, translate. Identity, limits of the wire, scopes, audit and errors
stand in the chain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime, timedelta
from enum import IntEnum
from functools import partial
from typing import Any

import grpc
from llmos.common.v1 import identity_pb2, usage_pb2
from llmos.gateway.v1 import (
    generation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
)
from llmos.logging.v1 import audit_service_pb2, audit_service_pb2_grpc

from services.gateway import request as requests
from services.gateway.auditing import current_record
from services.gateway.clients import GrpcAuditLog
from services.gateway.completion import Completions
from services.gateway.generation import (
    Alternative,
    Delta,
    Event,
    Finished,
    Generation,
    Model,
    Moved,
    Started,
    TokenLogprob,
    Usage,
)
from services.gateway.jobs.request import JobParser, retry_policy
from services.gateway.jobs.retries import Retries
from services.gateway.limits.guard import Left
from services.gateway.models import Models
from services.gateway.policy_view import EffectivePolicy, PolicyView
from services.gateway.request import RequestParser
from services.mesh.errors import NotImplementedYet

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(generation_service_pb2_grpc.GenerationServiceServicer):
    """llmos.gateway.v1.GenerationService"""

    def __init__(
        self, parser: RequestParser, completions: Completions, jobs: JobParser, retries: Retries
    ) -> None:
        self._parser = parser
        self._completions = completions
        self._jobs = jobs
        self._retries = retries

    async def Generate(
        self, request: generation_service_pb2.GenerateRequest, context: Context
    ) -> generation_service_pb2.GenerateResponse:
        record, valid = current_record(), self._parser.generation(request)
        retry = self._jobs.retry(request.spec, valid, record.source_address, retry_policy(request))
        generate = partial(self._completions.generate, record, valid)
        return _answer(await self._retries.around(record, retry, generate))

    async def StreamGenerate(
        self, request: generation_service_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[generation_service_pb2.StreamGenerateResponse]:
        valid = self._parser.generation(request)
        async with aclosing(self._completions.stream(current_record(), valid)) as events:
            async for event in events:
                yield _event(event)

    async def ResumeGenerate(
        self, request: generation_service_pb2.ResumeGenerateRequest, context: Context
    ) -> AsyncIterator[generation_service_pb2.ResumeGenerateResponse]:
        requests.validate(request)
        nothing: Any
        for nothing in ():  # makes this a stream, as the method is one
            yield nothing
        raise _not_yet("Resuming a stream")

    async def CancelGenerate(
        self, request: generation_service_pb2.CancelGenerateRequest, context: Context
    ) -> generation_service_pb2.CancelGenerateResponse:
        requests.validate(request)
        raise _not_yet("Cancelling by id")

    async def CountTokens(
        self, request: generation_service_pb2.CountTokensRequest, context: Context
    ) -> generation_service_pb2.CountTokensResponse:
        valid = self._parser.count_tokens(request)
        count = await self._completions.count_tokens(current_record(), valid)
        return generation_service_pb2.CountTokensResponse(
            prompt_tokens=count.prompt_tokens, context_tokens=count.context_tokens
        )


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """llmos.gateway.v1.ModelService"""

    def __init__(self, parser: RequestParser, models: Models) -> None:
        self._parser = parser
        self._models = models

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: Context
    ) -> model_service_pb2.ListModelsResponse:
        record = current_record()
        record.begin()
        found = await self._models.visible(record)
        await record.committed()
        return model_service_pb2.ListModelsResponse(models=[_model(model) for model in found])

    async def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: Context
    ) -> model_service_pb2.GetModelResponse:
        model_id = self._parser.model(request)
        record = current_record()
        record.model = model_id
        record.begin()
        found = await self._models.named(record, model_id)
        await record.committed()
        return model_service_pb2.GetModelResponse(model=_model(found))


class PolicyServicer(policy_service_pb2_grpc.PolicyServiceServicer):
    """llmos.gateway.v1.PolicyService"""

    def __init__(self, view: PolicyView) -> None:
        self._view = view

    async def GetEffectivePolicy(
        self, request: policy_service_pb2.GetEffectivePolicyRequest, context: Context
    ) -> policy_service_pb2.GetEffectivePolicyResponse:
        record = current_record()
        record.begin()
        found = await self._view.effective(record)
        await record.committed()
        return _policy(found)


class AuditServicer(audit_service_pb2_grpc.AuditServiceServicer):
    """llmos.logging.v1.AuditService, forwarded: the logging service sees who asks, and what is theirs."""

    def __init__(self, log: GrpcAuditLog) -> None:
        self._log = log

    async def Search(
        self, request: audit_service_pb2.SearchRequest, context: Context
    ) -> audit_service_pb2.SearchResponse:
        requests.validate(request)
        record = current_record()
        record.begin()
        found = await self._log.search(request)
        await record.committed()
        return found

    async def Tail(
        self, request: audit_service_pb2.TailRequest, context: Context
    ) -> AsyncIterator[audit_service_pb2.TailResponse]:
        requests.validate(request)
        record = current_record()
        record.begin()
        # Before the first record: this very request may be the next one to be told of.
        await record.committed()
        async with aclosing(self._log.tail(request)) as found:
            async for response in found:
                yield response


def pending(base: type, methods: list[tuple[str, bool]]) -> object:
    """A servicer that refuses all its methods, given as (name, whether it streams): a later version offers
    them."""

    def unary(name: str) -> Any:
        async def refuse(self: object, request: Any, context: Context) -> Any:
            raise _not_yet(f"`{name}`")

        return refuse

    def stream(name: str) -> Any:
        async def refuse(self: object, request: Any, context: Context) -> AsyncIterator[Any]:
            nothing: Any
            for nothing in ():
                yield nothing
            raise _not_yet(f"`{name}`")

        return refuse

    members = {name: (stream if streams else unary)(name) for name, streams in methods}
    servicer: object = type(f"Pending{base.__name__}", (base,), members)()
    return servicer


def _not_yet(what: str) -> NotImplementedYet:
    return NotImplementedYet(
        f"{what} is not offered by this version of the server.", hint="A later version will offer it."
    )


def _event(event: Event) -> generation_service_pb2.StreamGenerateResponse:
    message = generation_service_pb2.StreamGenerateResponse()
    if isinstance(event, Delta):
        delta = message.delta
        delta.seq = event.seq
        delta.choice_index = event.choice_index
        delta.text = event.text
        delta.token_ids.extend(event.token_ids)
        if event.logprobs:
            delta.logprobs.extend(_logprob(entry) for entry in event.logprobs)
    elif isinstance(event, Started):
        message.started.request_id = event.request_id
        message.started.model = event.model
        message.started.model_revision = event.model_revision
        message.started.seed = event.seed
    elif isinstance(event, Moved):
        message.moved.stream_id = event.stream_id
    else:
        message.finished.CopyFrom(_finished(event))
    return message


def _finished(event: Finished) -> generation_pb2.Finished:
    ends = [
        generation_pb2.ChoiceEnd(index=index, finish_reason=_same(reason))
        for index, reason in enumerate(event.finish_reasons)
    ]
    return generation_pb2.Finished(choices=ends, usage=_usage(event.usage))


def _answer(generation: Generation) -> generation_service_pb2.GenerateResponse:
    started = generation.started
    return generation_service_pb2.GenerateResponse(
        request_id=started.request_id,
        model=started.model,
        model_revision=started.model_revision,
        seed=started.seed,
        choices=[
            generation_pb2.Choice(
                index=choice.index,
                text=choice.text,
                token_ids=choice.token_ids,
                logprobs=[_logprob(entry) for entry in choice.logprobs],
                finish_reason=_same(choice.finish_reason),
            )
            for choice in generation.choices
        ],
        usage=_usage(generation.usage),
    )


def _same(number: IntEnum) -> Any:
    """Our enums have the numbers of the protos, which a test keeps so."""
    return number.value


def _usage(usage: Usage) -> usage_pb2.Usage:
    return usage_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
    )


def _logprob(entry: TokenLogprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(
        chosen=_alternative(entry.chosen), top=[_alternative(each) for each in entry.top]
    )


def _alternative(entry: Alternative) -> generation_pb2.TokenLogprob.Alternative:
    return generation_pb2.TokenLogprob.Alternative(
        token_id=entry.token_id, token=entry.token, logprob=entry.logprob
    )


def _policy(policy: EffectivePolicy) -> policy_service_pb2.GetEffectivePolicyResponse:
    identity = policy.identity
    message = policy_service_pb2.GetEffectivePolicyResponse(
        identity=identity_pb2.Identity(
            tenant_id=identity.tenant_id,
            client_id=identity.client_id,
            key_id=identity.key_id,
            scopes=sorted(identity.scopes),
        ),
        methods=policy.methods,
        models=policy.models,
        limits=[_limit(each, policy.at) for each in policy.limits],
        max_request_bytes=policy.max_request_bytes,
        max_tokens=policy.max_tokens,
        content_capture=policy_service_pb2.CONTENT_CAPTURE_NONE,
    )
    if policy.credential_expires_at is not None:
        message.credential_expire_time.FromDatetime(policy.credential_expires_at)
    return message


def _limit(left: Left, at: datetime) -> policy_service_pb2.Limit:
    limit, standing = left.limit, left.standing
    message = policy_service_pb2.Limit(
        unit=_same(limit.unit),
        scope=_same(limit.scope),
        model=limit.model,
        limit=limit.limit,
        remaining=standing.remaining,
    )
    if standing.reset_s > 0:
        message.reset_time.FromDatetime(at + timedelta(seconds=standing.reset_s))
    return message


def _model(model: Model) -> model_service_pb2.Model:
    message = model_service_pb2.Model(
        id=model.id,
        revision=model.revision,
        capabilities=sorted(_same(capability) for capability in model.capabilities),
        context_tokens=model.context_tokens,
        ready=model.ready,
        numerics_id=model.numerics_id,
    )
    if model.create_time is not None:
        message.create_time.FromDatetime(model.create_time)
    return message


def whole_answer(generation: Generation) -> generation_service_pb2.GenerateResponse:
    """A whole answer as a message, also for what is no call: a job."""
    return _answer(generation)
