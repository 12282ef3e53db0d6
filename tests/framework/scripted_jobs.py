"""What JobService says, for a gateway that answers by a script."""

from __future__ import annotations

from llmos.common.v1 import error_reason_pb2
from llmos.gateway.v1 import job_service_pb2 as pb

from tests.framework.scripted_gateway import generated

WAITING, RUNNING, SUCCEEDED, FAILED, CANCELLED = (
    pb.JOB_STATE_WAITING,
    pb.JOB_STATE_RUNNING,
    pb.JOB_STATE_SUCCEEDED,
    pb.JOB_STATE_FAILED,
    pb.JOB_STATE_CANCELLED,
)
FINAL = {SUCCEEDED, FAILED, CANCELLED}


def job(
    state: pb.JobState.ValueType = WAITING, job_id: str = "job_1", *, attempts: int = 0, tokens: int = 0
) -> pb.Job:
    made = pb.Job(
        id=job_id,
        state=state,
        method="/llmos.gateway.v1.GenerationService/Generate",
        model="echo",
        attempts=attempts,
        max_attempts=5,
        labels={"team": "a"},
        priority=pb.JOB_PRIORITY_LOW,
        progress_tokens=tokens,
        last_request_id="req_9" if attempts else "",
    )
    made.create_time.FromSeconds(1_700_000_000)
    if state in FINAL:
        made.end_time.FromSeconds(1_700_000_060)
    if state == FAILED:
        made.last_error.CopyFrom(error())
        attempt = made.failed_attempts.add(number=attempts, request_id="req_9", error=error())
        attempt.start_time.FromSeconds(1_700_000_000)
    return made


def error(reason: str = "NO_REPLICA", message: str = "No replica can serve.") -> pb.JobError:
    number = error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}")
    return pb.JobError(reason=number, status_code=14, message=message)


def result(text: str = "done") -> pb.JobResult:
    return pb.JobResult(generate=generated(text))


def submitted(job_id: str = "job_1") -> pb.SubmitJobResponse:
    return pb.SubmitJobResponse(job=job(job_id=job_id))


def got(
    state: pb.JobState.ValueType = SUCCEEDED, text: str | None = "done", attempts: int = 1
) -> pb.GetJobResponse:
    return pb.GetJobResponse(
        job=job(state, attempts=attempts), result=result(text) if text is not None else None
    )


def update(
    state: pb.JobState.ValueType, *, partial: str = "", text: str | None = None, attempts: int = 1
) -> pb.WatchJobResponse:
    return pb.WatchJobResponse(
        job=job(state, attempts=attempts, tokens=len(partial)),
        result=result(text) if text is not None else None,
        partial_texts=[partial] if partial else [],
    )


def listed(*ids: str, token: str = "") -> pb.ListJobsResponse:
    return pb.ListJobsResponse(jobs=[job(SUCCEEDED, one) for one in ids], next_page_token=token)


def dead_letter(letter_id: str = "dl_1") -> pb.DeadLetter:
    letter = pb.DeadLetter(id=letter_id, job=job(FAILED, f"job_of_{letter_id}", attempts=5), error=error())
    letter.create_time.FromSeconds(1_700_000_060)
    letter.expire_time.FromSeconds(1_700_600_000)
    return letter


def unreadable(letter_id: str = "dl_9") -> pb.DeadLetter:
    return pb.DeadLetter(
        id=letter_id,
        topic="llmos.jobs.v1",
        place="0/42",
        error=error("DATA_CORRUPT", "It cannot be read."),
    )


def dead_letters(*letters: pb.DeadLetter, token: str = "") -> pb.ListDeadLettersResponse:
    return pb.ListDeadLettersResponse(dead_letters=letters, next_page_token=token)


def replayed(letter_id: str, job_id: str = "") -> pb.ReplayDeadLettersResponse:
    if not job_id:
        return pb.ReplayDeadLettersResponse(dead_letter_id=letter_id, error=error("CREDENTIAL_REVOKED"))
    return pb.ReplayDeadLettersResponse(dead_letter_id=letter_id, job=job(job_id=job_id))
