"""Batches as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal

from msgspec import Struct

from services.gateway.batches.batches import Batch, Status
from services.gateway.openai.answers import encode


class BatchErrorObject(Struct):
    """What is wrong with a line of the input, or with the batch."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrorList(Struct):
    """What is wrong with the input: nothing of it was run."""

    object: Literal["list"]
    data: list[BatchErrorObject]


class RequestCounts(Struct):
    """How many requests have ended, and how."""

    total: int
    completed: int
    failed: int


class InputTokensDetails(Struct):
    cached_tokens: int


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class BatchTokenUsage(Struct):
    """What was counted over all answers, when the batch has ended."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchObject(Struct):
    """A batch. Times are seconds since 1970, null for what has not happened."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrorList | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None
    usage: BatchTokenUsage | None


class BatchList(Struct):
    """Batches of the caller's tenant, newest first."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch(found: Batch) -> bytes:
    return encode(_object(found))


def batches(found: Sequence[Batch], more: bool) -> bytes:
    first, last = (found[0].batch_id, found[-1].batch_id) if found else (None, None)
    return encode(BatchList("list", [_object(each) for each in found], first, last, more))


def _object(found: Batch) -> BatchObject:
    outcome, ended = found.outcome, found.end_time

    def ended_as(status: Status) -> int | None:
        return _seconds(ended) if found.status is status else None

    return BatchObject(
        id=found.batch_id,
        object="batch",
        endpoint=found.work.endpoint,
        errors=_errors(found),
        input_file_id=found.work.input_file_id,
        completion_window=f"{found.work.window_s // 3600}h",
        status=found.status.value,
        output_file_id=outcome.output_file_id or None,
        error_file_id=outcome.error_file_id or None,
        created_at=int(found.create_time.timestamp()),
        in_progress_at=_seconds(outcome.in_progress_time),
        expires_at=int(found.expire_time.timestamp()),
        finalizing_at=_seconds(outcome.finalizing_time),
        completed_at=ended_as(Status.COMPLETED),
        failed_at=ended_as(Status.FAILED),
        expired_at=ended_as(Status.EXPIRED),
        cancelling_at=_seconds(found.cancel_time),
        cancelled_at=ended_as(Status.CANCELLED),
        request_counts=RequestCounts(outcome.total, outcome.completed, outcome.failed),
        metadata=_metadata(found.work.metadata),
        usage=_usage(found),
    )


def _errors(found: Batch) -> BatchErrorList | None:
    if found.error:
        return BatchErrorList("list", [BatchErrorObject("batch_failed", found.error, None, None)])
    if not found.outcome.input_errors:
        return None
    return BatchErrorList(
        "list",
        [
            BatchErrorObject(each.code, each.message, each.param or None, each.line or None)
            for each in found.outcome.input_errors
        ],
    )


def _usage(found: Batch) -> BatchTokenUsage | None:
    if found.end_time is None:
        return None
    usage = found.outcome.usage
    return BatchTokenUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(usage.cached_prompt_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(0),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _metadata(given: Mapping[str, str]) -> dict[str, str] | None:
    return dict(given) or None


def _seconds(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())
