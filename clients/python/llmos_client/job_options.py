"""What operations on jobs are told: work, and keyword arguments."""

from __future__ import annotations

from datetime import datetime
from typing import TypedDict, Unpack

from llmos.gateway.v1 import embedding_service_pb2, task_service_pb2
from llmos.gateway.v1 import job_service_pb2 as pb

from llmos_client.calls import Prompt, PromptOptions
from llmos_client.job_types import JobPriority

TaskRequest = (
    embedding_service_pb2.EmbedRequest
    | task_service_pb2.ClassifyRequest
    | task_service_pb2.AnalyzeSentimentRequest
    | task_service_pb2.ExtractEntitiesRequest
    | task_service_pb2.SummarizeRequest
    | task_service_pb2.TranslateRequest
    | task_service_pb2.AnswerQuestionRequest
    | task_service_pb2.GenerateCodeRequest
)
Work = Prompt | TaskRequest | pb.JobWork
"""What a job does: a prompt as `generate` takes it, or the request of another method."""


class SubmitOptions(PromptOptions, total=False):
    """The keyword arguments of `jobs.submit`. `labels` are the job's; `timeout_s` is for handing it in.

    `idempotency_key` makes a repeat answer with the first one's job; without, the client makes one, so that
    its own repeats after a lost connection make no second job.
    """

    not_before: datetime
    """It does not run before this time; aware."""
    max_attempts: int
    """How often it is tried in all: 1 to 20; otherwise 5."""
    give_up_after_s: float
    """How long after it may first run it is given up: 7 days at most; otherwise 24 hours."""
    priority: JobPriority
    webhook_url: str
    """Whom to tell when it has ended."""
    webhook_secret: str
    """What that is signed with: `whsec_` and 24 to 64 bytes in base64."""
    result_ttl_s: float
    """How long its result is kept after it ended: 30 days at most; otherwise 24 hours."""


class NewJob:
    """One of many jobs, with options of its own."""

    def __init__(self, work: Work, **options: Unpack[SubmitOptions]) -> None:
        self.work = work
        self.options = options


class ReplayOptions(TypedDict, total=False):
    """What a replay changes; what is left out is as it was."""

    max_attempts: int
    """How often the new job is tried in all: 1 to 20; otherwise 5."""
    give_up_after_s: float
    """How long after now it is given up: 7 days at most; otherwise 24 hours."""
    model: str
    max_tokens: int
    temperature: float
    timeout_s: float | None
    """Deadline over all attempts."""


class DeadLetterFilter(TypedDict, total=False):
    """Which dead letters; what is set must all hold."""

    reason: str
    """The name of an ErrorReason, such as `NO_REPLICA`."""
    model: str
    """That the job asked for."""
    since: datetime
    """Given up at or after this time; aware."""
    until: datetime
    """Given up before this time; aware."""
    unreadable: bool
    """Events that could not be read, which belong to no tenant; needs the scope `admin`."""


class ReplayAllOptions(ReplayOptions, total=False):
    """The keyword arguments of `dead_letters.replay_all`."""

    reason: str
    """Only those of this reason."""
    model_was: str
    """Only those whose job asked for this model."""
    since: datetime
    """Only those given up at or after this time; aware."""
    until: datetime
    """Only those given up before this time; aware."""
