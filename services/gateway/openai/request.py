"""Translates OpenAI's requests to the message that a gRPC caller would send; nothing is added to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from llmos.gateway.v1 import generation_pb2, generation_service_pb2

from services.gateway.openai.chat import ChatMessage, ChatRequest
from services.gateway.openai.completions import CompletionRequest
from services.gateway.openai.parsing import Sampled, refuse
from services.gateway.openai.responses import InputItem, ResponsesRequest
from services.mesh.errors import RequestInvalid

Rules = Mapping[str, Mapping[str, Any]]
"""Keywords of JSON Schema, by the type that they hold for."""
Request = ChatRequest | CompletionRequest | ResponsesRequest

_ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "developer": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
    "tool": generation_pb2.ROLE_TOOL,
}
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
_sampling_of = attrgetter(*_SAMPLING)


def to_message(body: Request) -> generation_service_pb2.StreamGenerateRequest:
    """Raises RequestInvalid."""
    _check_numbers(body)
    message = generation_service_pb2.StreamGenerateRequest()
    spec = message.spec
    try:
        _fill(spec, body)
        match body:
            case ChatRequest():
                _fill_chat(spec, body)
            case CompletionRequest():
                _fill_completion(spec, body)
            case ResponsesRequest():
                _fill_response(spec, body)
    except (ValueError, TypeError, UnicodeError) as error:
        raise RequestInvalid(f"The body holds a value that is out of range: {error}.") from None
    return message


def _check_numbers(body: Request) -> None:
    """How many of what there may be, before a message is made of them. Raises RequestInvalid."""
    values, limits = _LISTS[type(body)]
    for given, (name, limit) in zip(values(body), limits, strict=True):
        if given is not None and not isinstance(given, str) and len(given) > limit:
            raise refuse(name, f"has more than {limit} entries")


def rules() -> Mapping[str, Rules]:
    """What the message's own rules allow, by the fields of the spec and of its sampling parameters."""
    spec = generation_pb2.GenerationSpec.DESCRIPTOR
    sampling = generation_pb2.SamplingParams.DESCRIPTOR
    found = {field.name: _rules_of(field) for message in (spec, sampling) for field in _fields(message)}
    return found | {
        "messages": _rules_of(generation_pb2.Chat.DESCRIPTOR.fields_by_name["messages"]),
        "text": _rules_of(generation_pb2.Prompt.DESCRIPTOR.fields_by_name["text"]),
    }


def _fields(message: Descriptor) -> list[FieldDescriptor]:
    return list(message.fields)


def _rules_of(field: FieldDescriptor) -> Rules:
    return _keywords(field.GetOptions().Extensions[validate_pb2.field])


_SAME = {"metadata": "labels", "input": "messages"}
_KEYWORDS = {
    "gte": "minimum",
    "lte": "maximum",
    "gt": "exclusiveMinimum",
    "min_len": "minLength",
    "max_len": "maxLength",
    # No text has more characters than bytes.
    "max_bytes": "maxLength",
    "min_items": "minItems",
    "max_items": "maxItems",
    "max_pairs": "maxProperties",
}
_TYPES = {"float": "number", "uint32": "number", "string": "string", "repeated": "array", "map": "object"}
_INSIDE = {"items": "items", "values": "additionalProperties", "keys": "propertyNames"}


def _keywords(given: validate_pb2.FieldRules) -> Rules:
    kind = given.WhichOneof("type") or ""
    if kind not in _TYPES:
        return {}
    own: dict[str, Any] = {}
    for rule, value in getattr(given, kind).ListFields():
        if rule.name in _KEYWORDS:
            own[_KEYWORDS[rule.name]] = value
        elif rule.name in _INSIDE:
            own[_INSIDE[rule.name]] = _keywords(value)
    return {_TYPES[kind]: own}


def _most() -> dict[str, int]:
    """How many entries each list or map of a request may have."""
    found, known = {}, rules()
    for name in ("messages", "input", "stop", "stop_token_ids", "logit_bias", "metadata"):
        allowed = known[_SAME.get(name, name)]
        found[name] = {**allowed.get("array", {}), **allowed.get("object", {})}
    return {name: each.get("maxItems") or each["maxProperties"] for name, each in found.items()}


def _lists(
    kind: type[Request], most: Mapping[str, int]
) -> tuple[Callable[[Request], tuple[Any, ...]], list[tuple[str, int]]]:
    limits = [(name, limit) for name, limit in most.items() if name in kind.__struct_fields__]
    return attrgetter(*(name for name, _ in limits)), limits


_MOST = _most()
_LISTS = {kind: _lists(kind, _MOST) for kind in (ChatRequest, CompletionRequest, ResponsesRequest)}
"""Of each kind of request its lists and maps, and how many entries each may have."""


def _fill(spec: generation_pb2.GenerationSpec, body: Sampled) -> None:
    spec.model = body.model
    sampling = spec.sampling
    for name, value in zip(_SAMPLING, _sampling_of(body), strict=True):
        if value is not None:
            setattr(sampling, name, value)
    if body.seed is not None:
        sampling.seed = body.seed % 2**64
    # What nearly nobody sends.
    if body.logit_bias:
        sampling.logit_bias.update(body.logit_bias)
    if body.stop is not None:
        spec.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop)
    if body.stop_token_ids:
        spec.stop_token_ids.extend(body.stop_token_ids)
    if body.ignore_eos:
        spec.ignore_eos = True
    if end_user := body.user or body.safety_identifier:
        spec.end_user = end_user
    if body.metadata:
        spec.labels.update(body.metadata)


def _fill_chat(spec: generation_pb2.GenerationSpec, body: ChatRequest) -> None:
    chat = spec.prompt.chat
    chat.SetInParent()  # no messages are an empty conversation, not a prompt that is missing
    for index, given in enumerate(body.messages):
        _add_chat_message(chat, given, f"messages[{index}].role")
    if body.token_limit is not None:
        spec.max_tokens = body.token_limit
    if body.n:
        spec.n = body.n
    if body.logprobs:
        spec.logprobs, spec.top_logprobs = True, body.top_logprobs or 0


def _add_chat_message(chat: generation_pb2.Chat, given: ChatMessage, role_field: str) -> None:
    texts: Iterable[str] = ()
    if isinstance(given.content, str):
        texts = (given.content,)
    elif given.content is not None:
        texts = [part.text or "" for part in given.content]
    message = _add(chat, given.role, texts, role_field)
    if given.name:
        message.name = given.name
    if given.tool_call_id:
        message.tool_call_id = given.tool_call_id


def _fill_completion(spec: generation_pb2.GenerationSpec, body: CompletionRequest) -> None:
    spec.prompt.text = body.text
    if body.max_tokens is not None:
        spec.max_tokens = body.max_tokens
    spec.n = body.n or 0
    spec.logprobs = body.logprobs is not None
    spec.top_logprobs = body.logprobs or 0


def _fill_response(spec: generation_pb2.GenerationSpec, body: ResponsesRequest) -> None:
    chat = spec.prompt.chat
    chat.SetInParent()
    if body.instructions is not None:
        _add(chat, "system", (body.instructions,), "instructions")
    items = [InputItem("user", body.input)] if isinstance(body.input, str) else body.input
    for index, item in enumerate(items):
        texts = (item.content,) if isinstance(item.content, str) else [part.text for part in item.content]
        _add(chat, item.role, texts, f"input[{index}].role")
    if body.max_output_tokens is not None:
        spec.max_tokens = body.max_output_tokens
    spec.logprobs = body.logprobs
    spec.top_logprobs = body.top_logprobs or 0


def _add(
    chat: generation_pb2.Chat, role_name: str, texts: Iterable[str], role_field: str
) -> generation_pb2.ChatMessage:
    role = _ROLES.get(role_name)
    if role is None:
        raise refuse(role_field, "must be system, developer, user or assistant")
    message = chat.messages.add(role=role)
    for text in texts:
        message.content.add(text=text)
    return message
