"""What each operation on jobs sends, and how its answer is read. Pure; the same for both clients."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from llmos.gateway.v1 import embedding_service_pb2
from llmos.gateway.v1 import job_service_pb2 as pb

from llmos_client.calls import (
    Prompt,
    PromptOptions,
    Unary,
    build_spec,
    call_timeout,
    to_duration,
    to_timestamp,
)
from llmos_client.config import ClientConfig
from llmos_client.errors import Cancelled, DeadlineExceeded, InvalidRequest, NotFound, of_reason
from llmos_client.job_options import (
    DeadLetterFilter,
    NewJob,
    ReplayAllOptions,
    ReplayOptions,
    SubmitOptions,
    TaskRequest,
    Work,
)
from llmos_client.job_types import (
    Job,
    JobCounts,
    JobPriority,
    JobResult,
    JobState,
    JobUpdate,
    ReplayedDeadLetter,
    SubmittedJobs,
    priority_number,
    reason_number,
    state_number,
)
from llmos_client.tailing import Followed

MAX_JOBS = 10_000
"""That one call hands in."""
PAGE = 200
"""A job may tell of 20 failed attempts, each with a message: more would not fit one answer."""

Submit = Unary[pb.SubmitJobRequest, pb.SubmitJobResponse, Job]
SubmitMany = Unary[Sequence[pb.SubmitJobsRequest], pb.SubmitJobsResponse, SubmittedJobs]
Get = Unary[pb.GetJobRequest, pb.GetJobResponse, Job]
ListPage = Unary[pb.ListJobsRequest, pb.ListJobsResponse, pb.ListJobsResponse]
Count = Unary[pb.CountJobsRequest, pb.CountJobsResponse, JobCounts]
Cancel = Unary[pb.CancelJobRequest, pb.CancelJobResponse, Job]
DeadLetterPage = Unary[pb.ListDeadLettersRequest, pb.ListDeadLettersResponse, pb.ListDeadLettersResponse]
Replay = Unary[pb.ReplayDeadLetterRequest, pb.ReplayDeadLetterResponse, Job]
Discard = Unary[pb.DiscardDeadLetterRequest, pb.DiscardDeadLetterResponse, None]


def submit(config: ClientConfig, work: Work, options: SubmitOptions) -> Submit:
    request = _submission(config, work, options)
    request.idempotency_key = request.idempotency_key or new_key()
    return Unary(
        request, lambda response, _: Job.from_proto(response.job), _timeout(config, options.get("timeout_s"))
    )


def submit_many(config: ClientConfig, jobs: Iterable[Work | NewJob], options: SubmitOptions) -> SubmitMany:
    """Each job gets a key of its own, made of the call's and its place, so that sending all of them again
    makes none twice. Raises InvalidRequest, which names the job, before anything is sent."""
    shared = options.copy()
    key = shared.pop("idempotency_key", "") or new_key()
    requests: list[pb.SubmitJobsRequest] = []
    for index, job in enumerate(jobs):
        if index == MAX_JOBS:
            raise InvalidRequest(f"One call takes at most {MAX_JOBS:,} jobs.", hint="Hand in several parts.")
        own = job if isinstance(job, NewJob) else NewJob(job)
        try:
            request = _submission(config, own.work, cast(SubmitOptions, {**shared, **own.options}))
        except (InvalidRequest, TypeError, ValueError) as error:
            why = error.message if isinstance(error, InvalidRequest) else str(error)
            raise InvalidRequest(f"Job {index} cannot be sent: {why.rstrip('.')}.") from error
        request.idempotency_key = request.idempotency_key or f"{key}-{index}"
        requests.append(pb.SubmitJobsRequest(job=request))
    return Unary(
        requests,
        lambda response, _: SubmittedJobs.from_proto(response),
        call_timeout(options.get("timeout_s"), config.timeout_s),
    )


def get(config: ClientConfig, job_id: str, *, timeout_s: float | None) -> Get:
    return Unary(
        pb.GetJobRequest(id=job_id),
        lambda response, _: Job.from_proto(response.job, response.result),
        _timeout(config, timeout_s),
    )


def outcome(job: Job) -> JobResult:
    """What the job gave. Raises what it failed with, Cancelled, NotFound where its result is no longer kept,
    and DeadlineExceeded where it has not ended."""
    metadata = {"job_id": job.id}
    if job.result is not None:
        return job.result
    match job.state:
        case JobState.SUCCEEDED:
            raise NotFound(f"The result of job {job.id} is no longer kept.", metadata=metadata)
        case JobState.CANCELLED:
            raise Cancelled(f"Job {job.id} was cancelled.", metadata=metadata)
        case JobState.FAILED:
            error = job.last_error
            raise of_reason(
                error.reason if error else "INTERNAL",
                f"Job {job.id} was given up after {_times(job.attempts)}: {error.message if error else ''}",
                hint="It is a dead letter: replay it, or discard it.",
                request_id=job.last_request_id,
                metadata=metadata,
            )
        case _:
            raise DeadlineExceeded(f"Job {job.id} has not ended; it is {job.state}.", metadata=metadata)


def list_page(
    config: ClientConfig,
    *,
    states: Iterable[JobState],
    labels: Mapping[str, str],
    batch_id: str,
    with_results: bool,
    limit: int | None,
    page_token: str,
    timeout_s: float | None,
) -> ListPage:
    request = pb.ListJobsRequest(
        states=[state_number(state) for state in dict.fromkeys(states)],
        labels=labels,
        batch_id=batch_id,
        with_results=with_results,
        page_size=_page_size(limit),
        page_token=page_token,
    )
    return Unary(request, lambda response, _: response, _timeout(config, timeout_s))


def listed(page: pb.ListJobsResponse) -> list[Job]:
    """A page's jobs, with their results where those were asked for."""
    if not page.results:
        return [Job.from_proto(job) for job in page.jobs]
    return [Job.from_proto(job, result) for job, result in zip(page.jobs, page.results, strict=True)]


def count(config: ClientConfig, *, batch_id: str, timeout_s: float | None) -> Count:
    return Unary(
        pb.CountJobsRequest(batch_id=batch_id),
        lambda response, _: JobCounts.from_proto(response),
        _timeout(config, timeout_s),
    )


def cancel(config: ClientConfig, job_id: str, *, timeout_s: float | None) -> Cancel:
    return Unary(
        pb.CancelJobRequest(id=job_id),
        lambda response, _: Job.from_proto(response.job),
        _timeout(config, timeout_s),
    )


class WatchState(Followed[pb.WatchJobRequest, pb.WatchJobResponse, JobUpdate]):
    """A job that is watched until it has ended."""

    def __init__(self, job_id: str) -> None:
        self._request = pb.WatchJobRequest(id=job_id)
        self._last = pb.WatchJobResponse()

    def request(self) -> pb.WatchJobRequest:
        """A watch begins with the job as it is, so nothing but the time between is lost."""
        return self._request

    def accept(self, response: pb.WatchJobResponse) -> JobUpdate | None:
        if response == self._last:
            return None
        self._last = response
        result = response.result if response.HasField("result") else None
        job = Job.from_proto(response.job, result)
        self.ended = job.state.is_final
        return JobUpdate(job, tuple(response.partial_texts))


class ReplayState(
    Followed[pb.ReplayDeadLettersRequest, pb.ReplayDeadLettersResponse, ReplayedDeadLetter],
):
    """A replay of all that match. Begun anew after a break it replays none twice."""

    def __init__(self, options: ReplayAllOptions) -> None:
        wanted = {name: options.get(name) for name in ("reason", "since", "until")}
        wanted["model"] = options.get("model_was", "")
        self._request = pb.ReplayDeadLettersRequest(filter=_filter(cast(DeadLetterFilter, wanted)))
        _change(self._request, options)

    def request(self) -> pb.ReplayDeadLettersRequest:
        return self._request

    def accept(self, response: pb.ReplayDeadLettersResponse) -> ReplayedDeadLetter:
        return ReplayedDeadLetter.from_proto(response)

    def closed(self) -> None:
        self.ended = True


def dead_letter_page(
    config: ClientConfig,
    wanted: DeadLetterFilter,
    *,
    limit: int | None,
    page_token: str,
    timeout_s: float | None,
) -> DeadLetterPage:
    request = pb.ListDeadLettersRequest(
        page_size=_page_size(limit), page_token=page_token, filter=_filter(wanted)
    )
    return Unary(request, lambda response, _: response, _timeout(config, timeout_s))


def replay(config: ClientConfig, dead_letter_id: str, options: ReplayOptions) -> Replay:
    request = pb.ReplayDeadLetterRequest(id=dead_letter_id)
    _change(request, options)
    return Unary(
        request, lambda response, _: Job.from_proto(response.job), _timeout(config, options.get("timeout_s"))
    )


def discard(config: ClientConfig, dead_letter_id: str, *, timeout_s: float | None) -> Discard:
    return Unary(
        pb.DiscardDeadLetterRequest(id=dead_letter_id), lambda response, _: None, _timeout(config, timeout_s)
    )


def new_key() -> str:
    """Of a submission that names none."""
    return f"auto-{secrets.token_hex(16)}"


def _submission(config: ClientConfig, work: Work, options: SubmitOptions) -> pb.SubmitJobRequest:
    """Without a key where none is given."""
    request = pb.SubmitJobRequest(
        work=_work(config, work, options), idempotency_key=options.get("idempotency_key", "")
    )
    try:
        request.max_attempts = options.get("max_attempts", 0)
        request.labels.update(options.get("labels", {}))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"An argument cannot be sent: {error}.") from error
    if (not_before := options.get("not_before")) is not None:
        request.not_before_time.CopyFrom(to_timestamp("not_before", not_before))
    if (give_up_after_s := options.get("give_up_after_s")) is not None:
        request.give_up_after.CopyFrom(to_duration("give_up_after_s", give_up_after_s))
    if (result_ttl_s := options.get("result_ttl_s")) is not None:
        request.result_ttl.CopyFrom(to_duration("result_ttl_s", result_ttl_s))
    if (priority := options.get("priority")) is not None:
        request.priority = priority_number(JobPriority(priority))
    url, secret = options.get("webhook_url", ""), options.get("webhook_secret", "")
    if bool(url) != bool(secret):
        raise InvalidRequest("webhook_url and webhook_secret belong together: give both or none.")
    if url:
        request.webhook.url, request.webhook.secret = url, secret
    return request


def _work(config: ClientConfig, work: Work, options: SubmitOptions) -> pb.JobWork:
    if isinstance(work, pb.JobWork):
        kind = work.WhichOneof("request")
        if kind is None:
            raise InvalidRequest("The JobWork is empty.")
        work = getattr(work, kind)
    if not isinstance(work, TaskRequest):
        spec = build_spec(config.model, cast(Prompt, work), _of_a_prompt(options))
        return pb.JobWork(generate=spec)
    if unfit := sorted(_of_a_prompt(options).keys() - {"model"}):
        raise InvalidRequest(f"{', '.join(unfit)}: only a prompt takes that; set it in the request.")
    job = pb.JobWork()
    request: Any = getattr(job, _FIELDS[work.DESCRIPTOR.full_name])
    request.CopyFrom(work)
    named = request if isinstance(work, embedding_service_pb2.EmbedRequest) else request.options
    named.model = options.get("model") or named.model or config.model or ""
    return job


def _of_a_prompt(options: SubmitOptions) -> PromptOptions:
    """Those that change the prompt's request; the labels are the job's."""
    names = PromptOptions.__annotations__.keys() - {"labels", "idempotency_key", "timeout_s"}
    return cast(PromptOptions, {name: value for name, value in options.items() if name in names})


_FIELDS: dict[str, str] = {
    field.message_type.full_name: field.name
    for field in pb.JobWork.DESCRIPTOR.oneofs_by_name["request"].fields
    if field.message_type is not None
}


def _filter(wanted: DeadLetterFilter) -> pb.DeadLetterFilter:
    proto = pb.DeadLetterFilter(model=wanted.get("model", ""), unreadable=wanted.get("unreadable", False))
    if reason := wanted.get("reason"):
        proto.error_reason = reason_number(reason)
    if (since := wanted.get("since")) is not None:
        proto.create_time_from.CopyFrom(to_timestamp("since", since))
    if (until := wanted.get("until")) is not None:
        proto.create_time_before.CopyFrom(to_timestamp("until", until))
    return proto


def _change(
    request: pb.ReplayDeadLetterRequest | pb.ReplayDeadLettersRequest, options: ReplayOptions
) -> None:
    try:
        request.max_attempts = options.get("max_attempts", 0)
        if model := options.get("model"):
            request.override.model = model
        if (max_tokens := options.get("max_tokens")) is not None:
            request.override.max_tokens = max_tokens
        if (temperature := options.get("temperature")) is not None:
            request.override.temperature = temperature
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"An argument cannot be sent: {error}.") from error
    if (give_up_after_s := options.get("give_up_after_s")) is not None:
        request.give_up_after.CopyFrom(to_duration("give_up_after_s", give_up_after_s))


def _page_size(limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise ValueError("limit must be at least 1")
    return PAGE if limit is None else min(limit, PAGE)


def _times(count: int) -> str:
    return "1 attempt" if count == 1 else f"{count} attempts"


def _timeout(config: ClientConfig, given: float | None) -> float:
    return call_timeout(given, config.query_timeout_s)
