"""What each operation sends, and how its answer is read. Pure; the same for both clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypedDict, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, model_service_pb2
from llmos.logging.v1 import audit_service_pb2

from llmos_client.audit_types import AuditFilter
from llmos_client.config import ClientConfig
from llmos_client.errors import FieldViolation, InvalidRequest
from llmos_client.generation_types import Completion, Message, Model, Role, TokenCount
from llmos_client.job_types import RetryOnFailure

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ResultT = TypeVar("ResultT")

MAX_PAGE_RECORDS = 1000
MAX_SEARCH_RECORDS = 100_000
MAX_DURATION_S = 10 * 365 * 86_400.0


@dataclass(frozen=True)
class RawText:
    """A prompt that the model continues as it is, without its chat template."""

    text: str


Prompt = str | RawText | Sequence[Message] | generation_pb2.GenerationSpec
"""What can be asked: a question, raw text, a conversation, or the whole protobuf specification, to which
the keyword arguments are then added."""


class PromptOptions(TypedDict, total=False):
    """The keyword arguments of what generates. What is left out is the model's or the server's default."""

    model: str
    system: str
    """Instructions that stand above the conversation."""
    max_tokens: int
    temperature: float
    """0 is greedy; to 2."""
    top_p: float
    top_k: int
    seed: int
    """Makes sampling repeatable; without, the server draws one and returns it."""
    stop: str | Sequence[str]
    n: int
    """How many choices, at most 8."""
    end_user: str
    """An opaque id of the person asked for; erasure works by it."""
    labels: Mapping[str, str]
    """Kept with the audit record."""
    idempotency_key: str
    """Makes a repeat of this request answer with the first one's result."""
    timeout_s: float | None
    """Deadline over all attempts."""


class GenerateOptions(PromptOptions, total=False):
    """The keyword arguments of `generate`."""

    retry_on_failure: RetryOnFailure
    """A request that fails for a passing reason becomes a job: the error's `job_id` names it, and the client
    does not try again by itself."""


class StreamOptions(PromptOptions, total=False):
    """The keyword arguments of `stream`."""

    resumable: bool
    """Whether the work goes on at the server when this client goes away."""


@dataclass(frozen=True)
class Unary(Generic[RequestT, ResponseT, ResultT]):
    """One unary operation, ready to be sent."""

    request: RequestT
    decode: Callable[[ResponseT, str], ResultT]
    """(response, trace id) -> what the caller gets."""
    timeout_s: float
    retries: bool = True
    """False: doing it twice is not the same as doing it once."""


Generate = Unary[generation_service_pb2.GenerateRequest, generation_service_pb2.GenerateResponse, Completion]
CountTokens = Unary[
    generation_service_pb2.CountTokensRequest, generation_service_pb2.CountTokensResponse, TokenCount
]
ListModels = Unary[model_service_pb2.ListModelsRequest, model_service_pb2.ListModelsResponse, list[Model]]
SearchPage = Unary[
    audit_service_pb2.SearchRequest, audit_service_pb2.SearchResponse, audit_service_pb2.SearchResponse
]


def generate(config: ClientConfig, prompt: Prompt, options: GenerateOptions) -> Generate:
    request = generation_service_pb2.GenerateRequest(
        spec=build_spec(config.model, prompt, options), idempotency_key=options.get("idempotency_key", "")
    )
    if (retry := options.get("retry_on_failure")) is not None:
        if not 2 <= retry.max_attempts <= 20:
            raise InvalidRequest(f"max_attempts must be from 2 to 20, not {retry.max_attempts}.")
        request.retry_on_failure.max_attempts = retry.max_attempts
        request.retry_on_failure.give_up_after.CopyFrom(to_duration("give_up_after_s", retry.give_up_after_s))
    return Unary(request, Completion.from_proto, call_timeout(options.get("timeout_s"), config.timeout_s))


@dataclass(frozen=True)
class StreamCall:
    """A streamed operation, ready to be sent."""

    request: generation_service_pb2.StreamGenerateRequest
    timeout_s: float


def stream(config: ClientConfig, prompt: Prompt, options: StreamOptions) -> StreamCall:
    request = generation_service_pb2.StreamGenerateRequest(
        spec=build_spec(config.model, prompt, options),
        idempotency_key=options.get("idempotency_key", ""),
        resumable=options.get("resumable", False),
    )
    return StreamCall(request, call_timeout(options.get("timeout_s"), config.timeout_s))


def count_tokens(
    config: ClientConfig, prompt: Prompt, *, model: str | None, system: str | None, timeout_s: float | None
) -> CountTokens:
    options = PromptOptions()
    if model is not None:
        options["model"] = model
    if system is not None:
        options["system"] = system
    spec = build_spec(config.model, prompt, options)
    request = generation_service_pb2.CountTokensRequest(model=spec.model, prompt=spec.prompt)
    return Unary(
        request,
        lambda response, _: TokenCount(response.prompt_tokens, response.context_tokens),
        call_timeout(timeout_s, config.query_timeout_s),
    )


def list_models(config: ClientConfig, *, timeout_s: float | None) -> ListModels:
    return Unary(
        model_service_pb2.ListModelsRequest(),
        lambda response, _: [Model.from_proto(model) for model in response.models],
        call_timeout(timeout_s, config.query_timeout_s),
    )


def check_limit(limit: int) -> int:
    if not 1 <= limit <= MAX_SEARCH_RECORDS:
        raise ValueError(f"limit must be from 1 to {MAX_SEARCH_RECORDS}")
    return limit


def search_page(
    config: ClientConfig, wanted: AuditFilter, *, limit: int, page_token: str, timeout_s: float | None
) -> SearchPage:
    request = audit_service_pb2.SearchRequest(
        filter=wanted.to_proto(), page_size=min(limit, MAX_PAGE_RECORDS), page_token=page_token
    )
    return Unary(request, lambda response, _: response, call_timeout(timeout_s, config.query_timeout_s))


def build_spec(
    default_model: str | None, prompt: Prompt, options: PromptOptions
) -> generation_pb2.GenerationSpec:
    """Raises InvalidRequest where no model is named, or a number does not fit its field."""
    spec = generation_pb2.GenerationSpec()
    if isinstance(prompt, generation_pb2.GenerationSpec):
        spec.CopyFrom(prompt)
    elif isinstance(prompt, RawText):
        spec.prompt.text = prompt.text
    elif isinstance(prompt, str):
        spec.prompt.chat.messages.append(_message(Message("user", prompt)))
    else:
        spec.prompt.chat.messages.extend(_message(message) for message in prompt)
    try:
        _apply(spec, options)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"An argument cannot be sent: {error}.") from error
    spec.model = options.get("model") or spec.model or default_model or ""
    if not spec.model:
        raise InvalidRequest(
            "No model was named.",
            hint="Pass model=, give the client one, or set LLMOS_MODEL; models() lists what there is.",
            violations=[FieldViolation("spec.model", "is required")],
        )
    return spec


def _apply(spec: generation_pb2.GenerationSpec, options: PromptOptions) -> None:
    if (system := options.get("system")) is not None:
        if spec.prompt.WhichOneof("kind") != "chat":
            raise ValueError("system needs a conversation, not raw text")
        spec.prompt.chat.messages.insert(0, _message(Message("system", system)))
    if (max_tokens := options.get("max_tokens")) is not None:
        spec.max_tokens = max_tokens
    if (temperature := options.get("temperature")) is not None:
        spec.sampling.temperature = temperature
    if (top_p := options.get("top_p")) is not None:
        spec.sampling.top_p = top_p
    if (top_k := options.get("top_k")) is not None:
        spec.sampling.top_k = top_k
    if (seed := options.get("seed")) is not None:
        spec.sampling.seed = seed
    if (stop := options.get("stop")) is not None:
        spec.stop.extend([stop] if isinstance(stop, str) else stop)
    if (n := options.get("n")) is not None:
        spec.n = n
    if (end_user := options.get("end_user")) is not None:
        spec.end_user = end_user
    if (labels := options.get("labels")) is not None:
        spec.labels.update(labels)


_ROLES: dict[Role, generation_pb2.Role.ValueType] = {
    "system": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
    "tool": generation_pb2.ROLE_TOOL,
}


def _message(message: Message) -> generation_pb2.ChatMessage:
    proto = generation_pb2.ChatMessage(
        role=_ROLES[message.role], tool_call_id=message.tool_call_id, name=message.name
    )
    if message.content or not message.tool_calls:
        proto.content.add(text=message.content)
    for call in message.tool_calls:
        proto.tool_calls.add(id=call.id, name=call.name, arguments_json=call.arguments_json)
    return proto


def call_timeout(given: float | None, default: float) -> float:
    """`given` or the default, in seconds. Raises ValueError where it is not a positive number."""
    if given is None:
        return default
    if not 0 < given < float("inf"):
        raise ValueError(f"timeout_s must be above 0 and finite, not {given:g}")
    return given


def to_duration(name: str, seconds: float) -> Duration:
    """Raises InvalidRequest where it is not a positive number."""
    if not 0 < seconds < MAX_DURATION_S:
        raise InvalidRequest(f"{name} must be above 0 s and below 10 years, not {seconds:g} s.")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def to_timestamp(name: str, moment: datetime) -> Timestamp:
    """Raises ValueError where the time is naive."""
    if moment.tzinfo is None:
        raise ValueError(f"{name} needs a time zone, such as datetime.now(UTC)")
    timestamp = Timestamp()
    timestamp.FromDatetime(moment.astimezone(UTC))
    return timestamp
