"""Batches as messages (llmos.jobs.v1), their lines as work, and their results as answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from llmos.common.v1 import usage_pb2
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, job_service_pb2
from llmos.jobs.v1 import payload_pb2

from services.gateway.batches.lines import InputError
from services.gateway.batches.ports import BatchOutcome, BatchWork
from services.gateway.generation import (
    Alternative,
    Choice,
    FinishReason,
    Generation,
    Started,
    TokenLogprob,
    Usage,
)
from services.gateway.jobs.request import JobParser
from services.gateway.jobs.work import ValidWork
from services.gateway.openai import (
    chat,
    chat_answers,
    completions,
    completions_answers,
    responses,
    responses_answers,
)
from services.gateway.openai.parsing import refuse
from services.gateway.openai.request import to_message
from services.gateway.request import RequestParser
from services.mesh.errors import DataCorrupt
from services.mesh.job_codec import read_time, set_time

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class _Form:
    parse: Callable[[bytes], Any]
    answer: Callable[..., bytes]


_FORMS = {
    "/v1/chat/completions": _Form(chat.parse, chat_answers.answer),
    "/v1/completions": _Form(completions.parse, completions_answers.answer),
    "/v1/responses": _Form(responses.parse, responses_answers.answer),
}


class LineParser:
    """Bodies of lines, by the same rules as direct requests."""

    def __init__(self, parser: RequestParser, jobs: JobParser) -> None:
        self._parser = parser
        self._jobs = jobs

    def body(self, endpoint: str, body: bytes) -> Any:
        """As its route reads it. Raises RequestInvalid or NotImplementedYet."""
        found = _FORMS[endpoint].parse(body)
        if found.stream:
            raise refuse("stream", "must be false in a batch")
        return found

    def work(self, endpoint: str, body: bytes, source_address: str) -> ValidWork:
        """Raises RequestInvalid, NotImplementedYet or MessageTooLarge."""
        message = to_message(self.body(endpoint, body))
        request = self._parser.generation(message)
        return self._jobs.generation(message.spec, request, source_address)


def answer(endpoint: str, body: Any, generation: Generation, created_s: int) -> bytes:
    """The body that the route would have answered with."""
    return _FORMS[endpoint].answer(body, generation, created_s=created_s)


def encode_work(work: BatchWork) -> bytes:
    return payload_pb2.BatchPayload(
        input_file_id=work.input_file_id,
        endpoint=work.endpoint,
        metadata=work.metadata,
        completion_window_s=work.window_s,
        source_address=work.source_address,
        line_key=work.line_key,
        output_ttl_s=work.output_ttl_s,
        finishes_batch_id=work.finishes_batch_id,
    ).SerializeToString()


def decode_work(payload: bytes) -> BatchWork:
    """Raises DataCorrupt."""
    message = _parsed(payload_pb2.BatchPayload(), payload)
    if message.endpoint not in _FORMS:
        raise DataCorrupt("A batch is for an endpoint that this version does not know.")
    return BatchWork(
        input_file_id=message.input_file_id,
        endpoint=message.endpoint,
        metadata=dict(message.metadata),
        window_s=message.completion_window_s,
        source_address=message.source_address,
        line_key=message.line_key,
        output_ttl_s=message.output_ttl_s,
        finishes_batch_id=message.finishes_batch_id,
    )


def encode_outcome(outcome: BatchOutcome) -> bytes:
    message = payload_pb2.BatchResult(
        output_file_id=outcome.output_file_id,
        error_file_id=outcome.error_file_id,
        input_errors=[
            payload_pb2.InputError(line=each.line, code=each.code, message=each.message, param=each.param)
            for each in outcome.input_errors
        ],
        total=outcome.total,
        completed=outcome.completed,
        failed=outcome.failed,
        expired=outcome.expired,
        usage=usage_pb2.Usage(
            prompt_tokens=outcome.usage.prompt_tokens,
            completion_tokens=outcome.usage.completion_tokens,
            cached_prompt_tokens=outcome.usage.cached_prompt_tokens,
        ),
    )
    for name in ("in_progress_time", "finalizing_time"):
        if (time := getattr(outcome, name)) is not None:
            set_time(getattr(message, name), time)
    return message.SerializeToString()


def decode_outcome(payload: bytes) -> BatchOutcome:
    """Raises DataCorrupt."""
    message = _parsed(payload_pb2.BatchResult(), payload)

    def time(name: str) -> datetime | None:
        return read_time(getattr(message, name)) if message.HasField(name) else None  # type: ignore[arg-type]

    return BatchOutcome(
        output_file_id=message.output_file_id,
        error_file_id=message.error_file_id,
        input_errors=tuple(
            InputError(each.line, each.code, each.message, each.param) for each in message.input_errors
        ),
        total=message.total,
        completed=message.completed,
        failed=message.failed,
        expired=message.expired,
        in_progress_time=time("in_progress_time"),
        finalizing_time=time("finalizing_time"),
        usage=_usage(message.usage),
    )


def decode_generation(result: bytes) -> Generation:
    """Of a sealed JobResult. Raises DataCorrupt."""
    message = _parsed(job_service_pb2.JobResult(), result)
    if message.WhichOneof("response") != "generate":
        raise DataCorrupt("The result of a batch's request is of another kind.")
    return _generation(message.generate)


def _generation(message: generation_service_pb2.GenerateResponse) -> Generation:
    return Generation(
        Started(message.request_id, message.model, message.model_revision, message.seed),
        tuple(
            Choice(
                index=choice.index,
                text=choice.text,
                token_ids=tuple(choice.token_ids),
                finish_reason=FinishReason(choice.finish_reason),
                logprobs=_logprobs(choice.logprobs),
            )
            for choice in message.choices
        ),
        _usage(message.usage),
    )


def _logprobs(entries: Sequence[generation_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(_alternative(entry.chosen), tuple(_alternative(each) for each in entry.top))
        for entry in entries
    )


def _alternative(entry: generation_pb2.TokenLogprob.Alternative) -> Alternative:
    return Alternative(entry.token_id, entry.token, entry.logprob)


def _usage(usage: usage_pb2.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens)


def _parsed(message: M, payload: bytes) -> M:
    try:
        message.ParseFromString(payload)
    except DecodeError:
        raise DataCorrupt("What a batch holds cannot be read.") from None
    return message
