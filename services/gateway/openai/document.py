"""The HTTP edge's OpenAPI document, made of the types that it reads and writes and the message's rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from services.gateway.batches import document as batch_document
from services.gateway.openai import chat, completions, responses
from services.gateway.openai.answers import ErrorAnswer, ModelList, ModelObject
from services.gateway.openai.chat import ChatMessage, ChatRequest
from services.gateway.openai.chat_answers import ChatCompletion, ChatCompletionChunk
from services.gateway.openai.completions import CompletionRequest
from services.gateway.openai.completions_answers import Completion
from services.gateway.openai.document_parts import REFS, Json, headers, reads, ref, refs
from services.gateway.openai.parsing import Harmless
from services.gateway.openai.request import Rules, rules
from services.gateway.openai.responses import ResponsesRequest, TextConfig
from services.gateway.openai.responses_answers import Response, ResponseEvent

MODEL = "smollm2-135m-instruct"
_HELLO = [{"role": "user", "content": "Hello"}]
EXAMPLES: Mapping[type, Mapping[str, Json]] = {
    ChatRequest: {
        "plain": {"model": MODEL, "messages": _HELLO},
        "streamed": {
            "model": MODEL,
            "messages": [{"role": "developer", "content": "Be brief."}, *_HELLO],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "sampled": {
            "model": MODEL,
            "messages": _HELLO,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 7,
            "max_completion_tokens": 16,
            "n": 2,
            "stop": ["\n"],
            "logprobs": True,
            "top_logprobs": 3,
            "metadata": {"team": "blue"},
        },
    },
    CompletionRequest: {
        "plain": {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 16},
        "streamed": {"model": MODEL, "prompt": ["Once upon a time"], "stream": True, "logprobs": 2},
    },
    ResponsesRequest: {
        "plain": {"model": MODEL, "input": "Hello", "instructions": "Be brief."},
        "streamed": {
            "model": MODEL,
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
            "stream": True,
            "max_output_tokens": 16,
        },
        "log probabilities": {
            "model": MODEL,
            "input": _HELLO,
            "include": [responses.LOGPROBS],
            "top_logprobs": 2,
        },
    },
}

_RULE_OF = {
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "metadata": "labels",
    "user": "end_user",
    "safety_identifier": "end_user",
    "prompt": "text",
}
"""The message's field, where the parameter has another name."""
_ERRORS: Mapping[int, str] = {
    400: "The request is invalid, or names a parameter that is not offered.",
    401: "The credential is missing, wrong, expired or revoked.",
    403: "The credential lacks a scope, or policy forbids it.",
    404: "There is no such model, or no such thing.",
    405: "The route does not take this method.",
    408: "The request did not arrive in time.",
    409: "The request conflicts with another.",
    413: "The body is too large.",
    415: "The body is not JSON, or is compressed.",
    422: "The request does not fit to the state of what it names.",
    429: "Too much at once, or a limit or budget is spent.",
    431: "The request's head is too large.",
    499: "The caller went away.",
    500: "The server or the engine failed.",
    501: "This version of the server does not offer it.",
    503: "No replica can serve the request now.",
    504: "The deadline passed.",
}
_WAIT = {"retry-after": "Seconds to wait.", "retry-after-ms": "Milliseconds to wait."}


def document(*, max_body_bytes: int) -> bytes:
    """The document, as JSON."""
    types = [
        *(ChatRequest, ChatCompletion, ChatCompletionChunk, CompletionRequest, Completion),
        *(ResponsesRequest, Response, ResponseEvent, ModelList, ModelObject, ErrorAnswer),
        *batch_document.TYPES,
    ]
    _, schemas = msgspec.json.schema_components(types, ref_template=REFS)
    _complete(schemas)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "llmos",
                "version": "1",
                "description": (
                    "OpenAI's routes, as far as this server offers them. A parameter that it does not know "
                    f"or offer is refused by name. A body may have {max_body_bytes} bytes."
                ),
            },
            "servers": [{"url": "/"}],
            "security": [{"bearer": []}],
            "paths": _paths(),
            "components": {
                "schemas": schemas,
                "responses": {str(code): _error(code, text) for code, text in _ERRORS.items()},
                "securitySchemes": {
                    "bearer": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "An API key or an access token.",
                    }
                },
            },
        }
    )


def _paths() -> Json:
    one = {"parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]}
    gone = {"security": [], "responses": refs(404, 405, 431)}
    return {
        "/v1/chat/completions": _generates("Answers a conversation.", ChatRequest, ChatCompletion),
        "/v1/completions": _generates("Continues a text.", CompletionRequest, Completion),
        "/v1/responses": _generates("Answers a text or messages.", ResponsesRequest, Response),
        "/v1/responses/{id}": one
        | {
            "get": {"summary": "No response is stored.", "operationId": "get_response", **gone},
            "delete": {"summary": "No response is stored.", "operationId": "delete_response", **gone},
        },
        "/v1/embeddings": {
            "post": {
                "summary": "Not offered by this version of the server.",
                "operationId": "embed",
                "responses": refs(401, 403, 405, 408, 429, 431, 500, 501, 503, 504),
            }
        },
        "/v1/models": {"get": reads("Lists the models that the caller may use.", "list_models", ModelList)},
        "/v1/models/{id}": one | {"get": reads("Describes a model.", "get_model", ModelObject)},
        **batch_document.paths(),
        "/healthz": {"get": _open("Whether the process runs.", "live", {"type": "object"})},
        "/readyz": {
            "get": _open("Whether it serves.", "ready", {"type": "object"}, {"503": "What it waits for."})
        },
        "/openapi.json": {"get": _open("This document.", "describe", {"type": "object"})},
    }


def _generates(summary: str, request: type, answer: type) -> Json:
    events: Mapping[type, type] = {ChatCompletion: ChatCompletionChunk, Response: ResponseEvent}
    examples = {name: {"value": value} for name, value in EXAMPLES[request].items()}
    return {
        "post": {
            "summary": summary,
            "operationId": request.__name__,
            "parameters": [
                {
                    "name": "x-request-timeout-ms",
                    "in": "header",
                    "description": "How long the caller will wait for the whole answer.",
                    "schema": {"type": "integer", "minimum": 1, "maximum": 999999999},
                }
            ],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": ref(request), "examples": examples}},
            },
            "responses": {
                "200": {
                    "description": "The answer; with `stream`, server-sent events of the second form.",
                    "headers": headers({"x-request-id": "The request's id in every log."}),
                    "content": {
                        "application/json": {"schema": ref(answer)},
                        "text/event-stream": {
                            "schema": {"type": "string"},
                            "x-event": ref(events.get(answer, answer)),
                        },
                    },
                },
                **refs(*_ERRORS),
            },
        }
    }


def _open(summary: str, name: str, schema: Json, others: Mapping[str, str] | None = None) -> Json:
    content = {"application/json": {"schema": schema}}
    texts = {"200": "The answer.", **(others or {})}
    answers = {code: {"description": text, "content": content} for code, text in texts.items()}
    return {
        "summary": summary,
        "operationId": name,
        "security": [],
        "responses": {**answers, **refs(405, 431)},
    }


def _error(code: int, text: str) -> Json:
    found: Json = {"description": text, "content": {"application/json": {"schema": ref(ErrorAnswer)}}}
    if code in (429, 503):
        found["headers"] = headers(_WAIT)
    if code == 405:
        found["headers"] = {"allow": {"description": "What it takes.", "schema": {"type": "string"}}}
    return found


def _complete(schemas: dict[str, Json]) -> None:
    """Adds what the types do not say: the message's own rules, and which values are taken for nothing."""
    known = rules()
    for request in (ChatRequest, CompletionRequest, ResponsesRequest):
        for name, schema in schemas[request.__name__]["properties"].items():
            _tighten(schema, known.get(_RULE_OF.get(name, name), {}))
    completion = schemas[CompletionRequest.__name__]["properties"]
    _tighten(completion["logprobs"], known["top_logprobs"])
    prompt = next(each for each in completion["prompt"]["anyOf"] if each["type"] == "array")
    prompt |= {"minItems": 1, "maxItems": 1, "items": {"type": "string"}}
    for kind, refused, tolerated in (
        (ChatRequest, chat.REFUSED, chat.TOLERATED),
        (ChatMessage, chat.REFUSED_IN_MESSAGE, ()),
        (CompletionRequest, completions.REFUSED, ()),
        (ResponsesRequest, responses.REFUSED, responses.TOLERATED),
        (TextConfig, responses.REFUSED_IN_TEXT, ()),
    ):
        _explain(schemas[kind.__name__]["properties"], refused, tolerated)


def _explain(properties: dict[str, Json], refused: Harmless, tolerated: Iterable[str]) -> None:
    for name, harmless in refused.items():
        properties[name] = {
            "description": "Not offered: only values that ask for nothing are taken.",
            "enum": [None, *harmless],
        }
    for name in tolerated:
        properties[name] = {"description": "Tolerated: has no effect on the answer."}


def _tighten(schema: Json, known: Rules) -> None:
    for alternative in schema.get("anyOf", (schema,)):
        kind = alternative.get("type")
        keywords = known.get("number" if kind == "integer" else kind, {})
        if kind == "string" and "array" in known:
            # A single one of what may also be a list.
            keywords = known["array"].get("items", {}).get("string", {})
        for keyword, value in keywords.items():
            if keyword in ("items", "additionalProperties", "propertyNames"):
                _tighten(alternative.setdefault(keyword, {"type": "string"}), value)
            else:
                alternative[keyword] = value
