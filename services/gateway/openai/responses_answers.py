"""The answers of POST /v1/responses, as bytes: an object, or its events in OpenAI's order."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from services.gateway import http_errors
from services.gateway.generation import (
    Delta,
    Finished,
    FinishReason,
    Generation,
    Started,
    Usage,
)
from services.gateway.openai import answers
from services.gateway.openai.answers import Logprob, encode
from services.gateway.openai.responses import ResponsesRequest
from services.mesh.errors import LlmosError

ID, MESSAGE_ID = "resp_", "msg_"
Status = Literal["in_progress", "completed", "incomplete", "failed"]
_INCOMPLETE: dict[FinishReason, Literal["max_output_tokens", "content_filter"]] = {
    FinishReason.LENGTH: "max_output_tokens",
    FinishReason.CONTENT_FILTER: "content_filter",
}


class OutputText(Struct):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Logprob]


class OutputMessage(Struct):
    """The one item of an answer."""

    id: str
    type: Literal["message"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class InputTokensDetails(Struct):
    cached_tokens: int


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    """What was counted."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens", "content_filter"]


class ResponseError(Struct):
    """Why a stream broke off."""

    code: str
    message: str


class TextFormat(Struct):
    type: Literal["text"]


class ResponseText(Struct):
    format: TextFormat


class Response(Struct, kw_only=True):
    """The whole answer; the first events of a stream hold it as it begins, the last one as it is."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: Literal[False] = False
    background: Literal[False] = False
    temperature: float | None
    top_p: float | None
    top_logprobs: int
    text: ResponseText
    tool_choice: Literal["auto"] = "auto"
    tools: list[Any]
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponseEvent(Struct):
    """One event of a stream; its further fields depend on `type`. `sequence_number` counts from 0."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    ]
    sequence_number: int


class EventWriter:
    """Writes one stream's events as server-sent events. Keeps the text, which the last events repeat: it is
    bounded by the request's tokens."""

    def __init__(self, body: ResponsesRequest, started: Started, *, created_s: int, n: int) -> None:
        del n  # one choice: the route knows no other number
        self._body = body
        self._response = _begun(body, started, created_s)
        self._item_id = encode(answers.id_of(MESSAGE_ID, started.request_id))
        self._place = b',"item_id":' + self._item_id + b',"output_index":0,"content_index":0'
        name = b"response.output_text.delta"
        self._delta_head = b'event: %s\ndata: {"type":"%s"%s,"delta":' % (name, name, self._place)
        self._sequence = 0
        self._texts: list[str] = []
        self._logprobs: list[Logprob] = []

    def opening(self) -> bytes:
        """All that comes before the text."""
        response = b',"response":' + encode(self._response)
        message = self._message("in_progress", [])
        return b"".join(
            (
                self._event(b"response.created", response),
                self._event(b"response.in_progress", response),
                self._event(b"response.output_item.added", b',"output_index":0,"item":' + encode(message)),
                self._event(
                    b"response.content_part.added", self._place + b',"part":' + encode(_text("", []))
                ),
            )
        )

    def delta(self, delta: Delta) -> bytes:
        """A piece of text; empty where the delta has nothing to say yet."""
        if not delta.text and not delta.logprobs:
            return b""
        self._texts.append(delta.text)
        logprobs = b"[]"
        if delta.logprobs:
            entries = answers.logprobs(delta.logprobs)
            self._logprobs += entries
            logprobs = encode(entries)
        number = self._number()
        tail = b',"logprobs":%s,"sequence_number":%d}\n\n' % (logprobs, number)
        return b"".join((self._delta_head, encode(delta.text), tail))

    def closing(self, finished: Finished) -> bytes:
        """The whole text, part, item and response."""
        text = "".join(self._texts)
        part = _text(text, self._logprobs)
        response = self._response
        _finish(response, finished.finish_reasons[0], finished.usage)
        message = self._message("completed" if response.status == "completed" else "incomplete", [part])
        response.output = [message]
        logprobs = encode(self._logprobs)
        whole = b',"text":' + encode(text) + b',"logprobs":' + logprobs
        return b"".join(
            (
                self._event(b"response.output_text.done", self._place + whole),
                self._event(b"response.content_part.done", self._place + b',"part":' + encode(part)),
                self._event(b"response.output_item.done", b',"output_index":0,"item":' + encode(message)),
                self._event(b"response." + response.status.encode(), b',"response":' + encode(response)),
            )
        )

    def failed(self, error: LlmosError) -> bytes:
        """The last events of a broken stream."""
        said = http_errors.said(error, self._body.parameter)
        response = self._response
        response.status = "failed"
        response.error = ResponseError(
            "rate_limit_exceeded" if said.type == "rate_limit_error" else "server_error", said.message
        )
        if self._texts:
            part = _text("".join(self._texts), self._logprobs)
            response.output = [self._message("incomplete", [part])]
        fields = {"code": said.code, "message": said.message, "param": said.param}
        return self._event(b"error", b"," + encode(fields)[1:-1]) + self._event(
            b"response.failed", b',"response":' + encode(response)
        )

    def _event(self, name: bytes, fields: bytes) -> bytes:
        """`fields` begin with a comma."""
        return b'event: %s\ndata: {"type":"%s"%s,"sequence_number":%d}\n\n' % (
            name,
            name,
            fields,
            self._number(),
        )

    def _number(self) -> int:
        number = self._sequence
        self._sequence += 1
        return number

    def _message(
        self, status: Literal["in_progress", "completed", "incomplete"], content: list[OutputText]
    ) -> OutputMessage:
        return _message(self._response.id, status, content)


def answer(body: ResponsesRequest, generation: Generation, *, created_s: int) -> bytes:
    """The body of an answer in one piece."""
    response = _begun(body, generation.started, created_s)
    (choice,) = generation.choices
    _finish(response, choice.finish_reason, generation.usage)
    part = _text(choice.text, answers.logprobs(choice.logprobs))
    status: Literal["completed", "incomplete"] = (
        "completed" if response.status == "completed" else "incomplete"
    )
    response.output = [_message(response.id, status, [part])]
    return encode(response)


def _begun(body: ResponsesRequest, started: Started, created_s: int) -> Response:
    return Response(
        id=answers.id_of(ID, started.request_id),
        created_at=created_s,
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=started.model,
        output=[],
        temperature=body.temperature,
        top_p=body.top_p,
        top_logprobs=body.top_logprobs or 0,
        text=ResponseText(TextFormat("text")),
        tools=[],
        user=body.user,
    )


def _finish(response: Response, reason: FinishReason, usage: Usage) -> None:
    incomplete = _INCOMPLETE.get(reason)
    response.status = "incomplete" if incomplete else "completed"
    response.incomplete_details = IncompleteDetails(incomplete) if incomplete else None
    response.usage = ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(usage.cached_prompt_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(0),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _message(
    response_id: str, status: Literal["in_progress", "completed", "incomplete"], content: list[OutputText]
) -> OutputMessage:
    message_id = MESSAGE_ID + response_id.removeprefix(ID)
    return OutputMessage(message_id, "message", status, "assistant", content)


def _text(text: str, logprobs: list[Logprob]) -> OutputText:
    return OutputText("output_text", text, [], logprobs)
