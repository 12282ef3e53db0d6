"""Messages to the engine's types, once, and back. What the engine cannot do yet is refused here by name.

The rules of the protos have been checked before: values are in range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llmos.common.v1 import finish_reason_pb2, usage_pb2
from llmos.gateway.v1 import generation_pb2, model_service_pb2
from llmos.inference.v1 import fleet_service_pb2, inference_service_pb2

from services.inference.carrier import Answered, Carried
from services.inference.delta_watches import Entry
from services.inference.engine.port import (
    Alternative,
    Capability,
    Delta,
    EngineEvent,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    Load,
    Message,
    ModelInfo,
    Priority,
    Prompt,
    Role,
    Sampling,
    Started,
    TokenLogprob,
)
from services.inference.whole import Whole
from services.mesh import status, validation
from services.mesh.channel import IDENTITY_KEY
from services.mesh.errors import EngineFault, NotImplementedYet, RequestInvalid, Violation
from services.mesh.interceptors import REQUEST_ID_KEY

_ROLES = {
    generation_pb2.ROLE_SYSTEM: Role.SYSTEM,
    generation_pb2.ROLE_USER: Role.USER,
    generation_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
}
_REASONS = {
    FinishReason.END_OF_SEQUENCE: finish_reason_pb2.FINISH_REASON_END_OF_SEQUENCE,
    FinishReason.STOP: finish_reason_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: finish_reason_pb2.FINISH_REASON_LENGTH,
}
_CAPABILITIES = {
    Capability.GENERATE: model_service_pb2.MODEL_CAPABILITY_GENERATE,
    Capability.CHAT: model_service_pb2.MODEL_CAPABILITY_CHAT,
}
_PRIORITIES = {
    # A gateway of before there were priorities sent none, and people waited for its answers.
    inference_service_pb2.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    inference_service_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    inference_service_pb2.PRIORITY_BATCH: Priority.BATCH,
}
MIN_INTERVAL_MS = 100
HEARTBEAT_MS = 1000


def parse_generate(
    message: inference_service_pb2.GenerateRequest,
    *,
    tenant: str,
    timeout_s: float | None,
    gather_s: float = 0.0,
) -> GenerationRequest:
    """`gather_s` goes before the message's. Raises NotImplementedYet and RequestInvalid, which name the
    field."""
    spec = message.spec
    if spec.tools or spec.HasField("tool_choice"):
        raise _not_yet("spec.tools")
    if spec.HasField("response_format"):
        raise _not_yet("spec.response_format")
    return GenerationRequest(
        request_id=message.request_id,
        model=spec.model,
        prompt=parse_prompt(spec.prompt, "spec.prompt"),
        sampling=_sampling(spec.sampling),
        max_tokens=spec.max_tokens if spec.HasField("max_tokens") else None,
        stop=tuple(spec.stop),
        stop_token_ids=tuple(spec.stop_token_ids),
        n=spec.n or 1,
        logprobs=spec.logprobs,
        top_logprobs=spec.top_logprobs,
        ignore_eos=spec.ignore_eos,
        timeout_s=timeout_s,
        tenant=tenant,
        priority=_PRIORITIES[message.priority],
        delivered=tuple(tuple(choice.token_ids) for choice in message.delivered),
        gather_s=gather_s or message.gather_ms / 1000,
    )


def parse_prompt(prompt: generation_pb2.Prompt, path: str) -> Prompt:
    """`path` is the field's name in errors. Raises NotImplementedYet and RequestInvalid."""
    if prompt.WhichOneof("kind") == "text":
        return Prompt(text=prompt.text)
    messages = []
    for index, message in enumerate(prompt.chat.messages):
        field = f"{path}.chat.messages[{index}]"
        if message.role == generation_pb2.ROLE_TOOL or message.tool_calls:
            raise _not_yet(f"{field}.tool_calls")
        if message.name:
            # The templates of the models at hand know no names; dropping one would change the meaning.
            raise _not_yet(f"{field}.name")
        messages.append(Message(_ROLES[message.role], "".join(part.text for part in message.content)))
    if not messages:
        what = "a prompt needs text or messages"
        raise RequestInvalid(f"`{path}`: {what}.", violations=[Violation(path, what)])
    return Prompt(messages=tuple(messages))


def parse_watch(message: fleet_service_pb2.WatchLoadRequest) -> tuple[float, float]:
    """The shortest and the longest time between two responses, in seconds."""
    shortest_ms = message.min_interval_ms or MIN_INTERVAL_MS
    longest_ms = max(message.heartbeat_ms or HEARTBEAT_MS, shortest_ms)
    return shortest_ms / 1000, longest_ms / 1000


def _sampling(message: generation_pb2.SamplingParams) -> Sampling:
    def given(name: str) -> float | None:
        return getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type]

    return Sampling(
        seed=message.seed,
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=message.top_k if message.HasField("top_k") else None,
        min_p=given("min_p"),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=given("repetition_penalty"),
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )


def _not_yet(field: str) -> NotImplementedYet:
    return NotImplementedYet(f"`{field}` is not offered yet.", metadata={"field": field})


def event_message(
    event: EngineEvent, *, seq: int, replica: str, watched: bool = False
) -> inference_service_pb2.GenerateResponse:
    """`seq` is the number of the last Delta, this one included. `watched`: it goes by a watch, if it can."""
    match event:
        case Started():
            return inference_service_pb2.GenerateResponse(started=_started(event, replica), watched=watched)
        case Delta():
            return inference_service_pb2.GenerateResponse(delta=_delta(event, seq))
        case Finished():
            return inference_service_pb2.GenerateResponse(finished=_finished(event), last_seq=seq)


def watched_message(entries: Sequence[Entry]) -> inference_service_pb2.WatchDeltasResponse:
    message = inference_service_pb2.WatchDeltasResponse()
    for entry in entries:
        added = message.deltas.add()
        added.number = entry.number
        added.last = entry.last
        if entry.delta is not None:
            _fill_delta(added.delta, entry.delta, entry.seq)
    return message


def carried(
    call: inference_service_pb2.CarriedCall, authorization: str
) -> tuple[Carried, Callable[[], inference_service_pb2.GenerateRequest]]:
    """A call of a GenerateMany, and what gives its request: that raises RequestInvalid."""
    metadata: dict[str, str | bytes] = {"authorization": authorization, REQUEST_ID_KEY: call.request_id}
    if call.identity:
        metadata[IDENTITY_KEY] = call.identity
    if call.traceparent:
        metadata["traceparent"] = call.traceparent
    if call.tracestate:
        metadata["tracestate"] = call.tracestate
    return Carried(call.number, metadata, call.timeout_s), partial(_carried_request, call.request)


def _carried_request(data: bytes) -> inference_service_pb2.GenerateRequest:
    request = validation.parsed(data, inference_service_pb2.GenerateRequest.FromString)
    validation.validate(request)
    return request


def many_message(
    answers: Sequence[Answered[inference_service_pb2.GenerateWholeResponse]], *, retired: bool
) -> inference_service_pb2.GenerateManyResponse:
    message = inference_service_pb2.GenerateManyResponse(retired=retired)
    for answered in answers:
        added = message.answers.add()
        added.number = answered.number
        if answered.answer is not None:
            added.whole.CopyFrom(answered.answer)
        elif answered.error is not None:
            added.error = status.to_status(answered.error, answered.request_id).SerializeToString()
    return message


def left_message(entry: Entry) -> inference_service_pb2.GenerateResponse:
    """A delta that did not get into its watch."""
    if entry.delta is None:
        raise ValueError("there is no delta in it")
    return inference_service_pb2.GenerateResponse(delta=_delta(entry.delta, entry.seq))


def whole_message(
    whole: Whole, *, after_seq: int, replica: str
) -> inference_service_pb2.GenerateWholeResponse:
    """Raises EngineFault where the generation has no beginning or no end."""
    if whole.started is None or whole.finished is None:
        raise EngineFault("The engine ended the generation without saying how.")
    return inference_service_pb2.GenerateWholeResponse(
        started=_started(whole.started, replica),
        deltas=[_delta(delta, after_seq + place) for place, delta in enumerate(whole.deltas(), 1)],
        finished=_finished(whole.finished),
        time_to_first_token_s=whole.time_to_first_token_s,
    )


def _started(event: Started, replica: str) -> inference_service_pb2.EngineStarted:
    return inference_service_pb2.EngineStarted(
        model_revision=event.model_revision,
        prompt_tokens=event.prompt_tokens,
        numerics_id=event.numerics_id,
        exact_replay=event.exact_replay,
        replica=replica,
        cached_prompt_tokens=event.cached_prompt_tokens,
    )


def _delta(event: Delta, seq: int) -> generation_pb2.Delta:
    message = generation_pb2.Delta()
    _fill_delta(message, event, seq)
    return message


def _fill_delta(message: generation_pb2.Delta, event: Delta, seq: int) -> None:
    """Field by field: names in the call would take three times as long, for each token."""
    message.seq = seq
    message.choice_index = event.choice
    message.text = event.text
    message.token_ids.extend(event.token_ids)
    if event.logprobs:
        message.logprobs.extend(_logprob(entry) for entry in event.logprobs)


def _finished(event: Finished) -> generation_pb2.Finished:
    return generation_pb2.Finished(
        choices=[
            generation_pb2.ChoiceEnd(index=index, finish_reason=_REASONS[reason])
            for index, reason in enumerate(event.reasons)
        ],
        usage=usage_pb2.Usage(
            prompt_tokens=event.usage.prompt_tokens,
            completion_tokens=event.usage.completion_tokens,
            cached_prompt_tokens=event.usage.cached_prompt_tokens,
        ),
    )


def model_message(model: ModelInfo) -> model_service_pb2.Model:
    return model_service_pb2.Model(
        id=model.id,
        revision=model.revision,
        capabilities=sorted(_CAPABILITIES[capability] for capability in model.capabilities),
        context_tokens=model.context_tokens,
        ready=model.ready,
        numerics_id=model.numerics_id,
    )


def load_message(health: Health, load: Load, model: ModelInfo) -> fleet_service_pb2.WatchLoadResponse:
    return fleet_service_pb2.WatchLoadResponse(
        serving=health.serving,
        running=load.running,
        waiting=load.waiting,
        waiting_prompt_tokens=load.waiting_tokens,
        max_running=load.max_running,
        max_waiting=load.max_waiting,
        kv_pages_used=load.kv_pages_used,
        kv_pages=load.kv_pages,
        step_ms=load.step_s * 1000,
        restarts=load.restarts,
        model=model.id,
        numerics_id=model.numerics_id,
        exact_replay=model.exact_replay,
    )


def _logprob(entry: TokenLogprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(
        chosen=_alternative(entry.chosen), top=[_alternative(each) for each in entry.top]
    )


def _alternative(entry: Alternative) -> generation_pb2.TokenLogprob.Alternative:
    return generation_pb2.TokenLogprob.Alternative(
        token_id=entry.token_id, token=entry.token, logprob=entry.logprob
    )
