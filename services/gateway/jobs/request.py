"""Parses what is handed in as a job, once, into types that can only be valid.

The request inside is checked as a direct one: by the same parser, and by the rules of the same message.
"""

from __future__ import annotations

import base64
import binascii
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, job_service_pb2
from llmos.jobs.v1 import payload_pb2

from services.gateway.generation import Prompt, ValidGeneration
from services.gateway.jobs.ports import DeadLetterFilter, JobFilter
from services.gateway.jobs.retries import Retry
from services.gateway.jobs.work import (
    DAY_S,
    DEFAULT_MAX_ATTEMPTS,
    GENERATE,
    MAX_AHEAD_DAYS,
    PREFIX_CHARACTERS,
    Again,
    RetryPolicy,
    ValidSubmission,
    ValidWork,
)
from services.gateway.request import RequestParser, refuse_unoffered, validate
from services.mesh.clock import Clock
from services.mesh.errors import DataCorrupt, LlmosError, NotImplementedYet, RequestInvalid, Violation
from services.mesh.job_codec import read_duration, read_time, reason_name
from services.mesh.jobs import JobPriority, JobState

RETRY_HEADER = "x-llmos-retry-on-failure"
"""On HTTP: `max_attempts=5`, and `give_up_after_s=3600` after a comma."""
_WEBHOOK_PREFIX = "whsec_"
_WEBHOOK_KEY_BYTES = range(24, 65)


class JobParser:
    """Holds the deployment's limits."""

    def __init__(
        self, parser: RequestParser, clock: Clock, *, max_tokens_limit: int, webhook_allow_http: bool = False
    ) -> None:
        self._parser = parser
        self._clock = clock
        self._max_tokens_limit = max_tokens_limit
        self._schemes = ("https", "http") if webhook_allow_http else ("https",)

    def submission(self, message: job_service_pb2.SubmitJobRequest, source_address: str) -> ValidSubmission:
        """Raises RequestInvalid, NotImplementedYet or MessageTooLarge, which name what is wrong."""
        validate(message)
        if message.HasField("webhook"):
            self._check_webhook(message.webhook)
        work = self.work(message.work, source_address, message.webhook)
        content = job_service_pb2.SubmitJobRequest()
        content.CopyFrom(message)
        content.ClearField("idempotency_key")
        return ValidSubmission(
            work=work,
            content=content.SerializeToString(deterministic=True),
            idempotency_key=message.idempotency_key,
            not_before=self._not_before(message),
            max_attempts=message.max_attempts or DEFAULT_MAX_ATTEMPTS,
            give_up_after_s=_seconds(message.give_up_after) or DAY_S,
            result_ttl_s=_seconds(message.result_ttl) or DAY_S,
            priority=JobPriority(message.priority or JobPriority.NORMAL),
            labels=dict(message.labels),
        )

    def work(
        self,
        message: job_service_pb2.JobWork,
        source_address: str,
        webhook: job_service_pb2.Webhook | None = None,
    ) -> ValidWork:
        """Raises RequestInvalid, NotImplementedYet or MessageTooLarge."""
        case = message.WhichOneof("request")
        if case != "generate":
            refuse_unoffered([f"work.{case}"])
        try:
            request = self._parser.generation(generation_service_pb2.GenerateRequest(spec=message.generate))
        except (RequestInvalid, NotImplementedYet) as error:
            raise _renamed(error) from None
        payload = payload_pb2.RequestPayload(work=message, source_address=source_address)
        has_webhook = webhook is not None and bool(webhook.url)
        if webhook is not None and has_webhook:
            payload.webhook.CopyFrom(webhook)
        return self._valid(request, payload, has_webhook)

    def retry(
        self,
        spec: generation_pb2.GenerationSpec,
        request: ValidGeneration,
        source_address: str,
        policy: RetryPolicy | None,
    ) -> Retry | None:
        """How a request that was parsed already goes on where it fails. Raises MessageTooLarge."""
        return None if policy is None else Retry(self.generation(spec, request, source_address), policy)

    def generation(
        self, spec: generation_pb2.GenerationSpec, request: ValidGeneration, source_address: str
    ) -> ValidWork:
        """Of a request that was parsed already. Raises MessageTooLarge."""
        payload = payload_pb2.RequestPayload(source_address=source_address)
        payload.work.generate.CopyFrom(spec)
        return self._valid(request, payload, False)

    def again(self, payload: bytes, again: Again) -> ValidWork:
        """What was sealed in a job, changed. Raises as `work`, or DataCorrupt."""
        try:
            message = payload_pb2.RequestPayload.FromString(payload)
        except DecodeError:
            raise DataCorrupt("What the job holds is no request.") from None
        if message.work.WhichOneof("request") == "generate":
            spec = message.work.generate
            if again.model:
                spec.model = again.model
            if again.max_tokens:
                spec.max_tokens = again.max_tokens
            if again.temperature is not None:
                spec.sampling.temperature = again.temperature
        webhook = message.webhook if message.HasField("webhook") else None
        return self.work(message.work, message.source_address, webhook)

    def _valid(
        self, request: ValidGeneration, payload: payload_pb2.RequestPayload, has_webhook: bool
    ) -> ValidWork:
        return ValidWork(
            method=GENERATE,
            model=request.model,
            task=request.prompt.task,
            max_tokens=request.n * (request.max_tokens or self._max_tokens_limit),
            labels=request.labels,
            prefix=_prefix(request.prompt),
            payload=payload.SerializeToString(),
            has_webhook=has_webhook,
        )

    def _not_before(self, message: job_service_pb2.SubmitJobRequest) -> datetime | None:
        if not message.HasField("not_before_time"):
            return None
        given = read_time(message.not_before_time)
        if given > self._clock.now() + timedelta(days=MAX_AHEAD_DAYS):
            raise _refused("not_before_time", f"must be within {MAX_AHEAD_DAYS} days")
        return given

    def _check_webhook(self, webhook: job_service_pb2.Webhook) -> None:
        """Where it may lead to is looked at when it is called. Raises RequestInvalid."""
        try:
            parts = urlsplit(webhook.url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or port == 0 or parts.username is not None or parts.fragment or not _plain(webhook.url):
            raise _refused("webhook.url", "must be an absolute URL without a user, a fragment and spaces")
        if parts.scheme not in self._schemes:
            raise _refused("webhook.url", f"must begin with {' or '.join(f'{s}://' for s in self._schemes)}")
        prefix, secret = webhook.secret[: len(_WEBHOOK_PREFIX)], webhook.secret[len(_WEBHOOK_PREFIX) :]
        try:
            length = len(base64.b64decode(secret, validate=True))
        except (ValueError, binascii.Error):
            length = 0
        if prefix != _WEBHOOK_PREFIX or length not in _WEBHOOK_KEY_BYTES:
            raise _refused("webhook.secret", "must be `whsec_` and 24 to 64 bytes in base64")


def job_filter(message: job_service_pb2.ListJobsRequest) -> JobFilter:
    """Raises RequestInvalid."""
    validate(message)
    states = frozenset(JobState(state) for state in message.states)
    return JobFilter(states=states, labels=dict(message.labels), batch_id=message.batch_id)


def dead_letter_filter(message: job_service_pb2.DeadLetterFilter) -> DeadLetterFilter:
    """Of a request that was validated."""
    bounds = {
        name: read_time(getattr(message, name)) if message.HasField(name) else None
        for name in ("create_time_from", "create_time_before")
    }
    return DeadLetterFilter(
        error_reason=reason_name(message.error_reason),
        model=message.model,
        unreadable=message.unreadable,
        **bounds,
    )


def again(
    message: job_service_pb2.ReplayDeadLetterRequest | job_service_pb2.ReplayDeadLettersRequest,
) -> Again:
    """Raises RequestInvalid."""
    validate(message)
    given = message.override
    return Again(
        max_attempts=message.max_attempts or DEFAULT_MAX_ATTEMPTS,
        give_up_after_s=_seconds(message.give_up_after) or DAY_S,
        model=given.model,
        max_tokens=given.max_tokens,
        temperature=given.temperature if given.HasField("temperature") else None,
    )


def retry_policy(message: generation_service_pb2.GenerateRequest) -> RetryPolicy | None:
    """Of a request that was validated."""
    if not message.HasField("retry_on_failure"):
        return None
    given = message.retry_on_failure
    return RetryPolicy(given.max_attempts, _seconds(given.give_up_after) or DAY_S)


def retry_policy_of_header(value: str | None, *, streams: bool) -> RetryPolicy | None:
    """Raises RequestInvalid."""
    if not value:
        return None
    if streams:
        raise _refused(RETRY_HEADER, "is for whole answers: send it without `stream`")
    given = generation_service_pb2.RetryOnFailure()
    try:
        for part in value.split(","):
            name, _, number = part.strip().partition("=")
            if name == "max_attempts":
                given.max_attempts = int(number)
            elif name == "give_up_after_s":
                given.give_up_after.seconds = int(number)
            else:
                raise ValueError(name)
        validate(given)
    except (ValueError, RequestInvalid):
        said = (
            "must be such as `max_attempts=5, give_up_after_s=3600`, with 2 to 20 attempts in 7 days at most"
        )
        raise _refused(RETRY_HEADER, said) from None
    return RetryPolicy(given.max_attempts, _seconds(given.give_up_after) or DAY_S)


def _prefix(prompt: Prompt) -> bytes:
    if not prompt.is_chat:
        return prompt.text[:PREFIX_CHARACTERS].encode()
    first = prompt.messages[0]
    return f"{int(first.role)} {''.join(first.parts)[:PREFIX_CHARACTERS]}".encode()


def _seconds(given: Duration) -> float:
    return read_duration(given)


def _plain(url: str) -> bool:
    return url.isascii() and url.isprintable() and " " not in url and "\\" not in url


def _refused(field: str, rule: str) -> RequestInvalid:
    return RequestInvalid(f"The request is invalid: `{field}` {rule}.", violations=[Violation(field, rule)])


def _renamed(error: RequestInvalid | NotImplementedYet) -> LlmosError:
    """The fields by the names that they have in a job."""
    return type(error)(
        error.message.replace("`spec.", "`work.generate."),
        hint=error.hint,
        violations=[
            Violation(each.field.replace("spec.", "work.generate.", 1), each.description)
            for each in error.violations
        ],
    )
