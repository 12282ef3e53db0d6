"""`llmos jobs`: what there is, what became of it, and ending it."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console

from llmos_client import job_calls
from llmos_client.cli import kinds, terminal, times
from llmos_client.cli.commands import Client, connected
from llmos_client.cli.kinds import Json, Labels
from llmos_client.job_types import Job, JobCounts, JobState

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]
Batch = Annotated[str, typer.Option("--batch", help="Only jobs of this batch.", show_default=False)]

HEADERS = ("CREATED", "STATE", "ATTEMPTS", "TOKENS", "METHOD", "MODEL", "JOB", "ERROR")
COUNT_HEADERS = ("WAITING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED")


@connected
async def list_jobs(
    client: Client,
    states: Annotated[
        list[JobState] | None, typer.Option("--state", help="May be repeated.", show_default=False)
    ] = None,
    labels: Labels = None,
    batch: Batch = "",
    results: Annotated[
        bool, typer.Option("--results", help="With what each gave; needs --json.", show_default=False)
    ] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="So many at most.")] = 50,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    if results and not as_json:
        raise typer.BadParameter("a table has no room for results: add --json")
    found = client.jobs.list(
        states=states or (),
        labels=kinds.labels(labels),
        batch_id=batch,
        with_results=results,
        limit=limit,
    )
    if as_json:
        async for job in found:
            terminal.write(as_json_line(job.raw, job.result.response if job.result else None))
        return
    terminal.rows(HEADERS, [cells(job) async for job in found])


@connected
async def show(client: Client, job_id: JobId, as_json: Json = False) -> None:
    """Show all that is known of a job, but for its result."""
    job = await client.jobs.get(job_id)
    if as_json:
        terminal.write(as_json_line(job.raw))
        return
    write_facts(job)


@connected
async def result(
    client: Client,
    job_id: JobId,
    wait: Annotated[
        str | None,
        typer.Option(help="How long to wait for its end, such as 10m; 0: not at all.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Wait for a job's end, and write what it gave."""
    wait_s = float(kinds.seconds(wait)) if wait is not None else None
    job: Job | None = None
    if wait_s == 0:
        job = await client.jobs.get(job_id)
    else:
        with Console(stderr=True).status("waiting") as status:
            async with client.jobs.watch(job_id, timeout_s=wait_s) as updates:
                async for update in updates:
                    job = update.job
                    status.update(terminal.printable(sentence(job)))
    if job is None:
        raise AssertionError("a watch ends with the job's end")
    found = job_calls.outcome(job)
    if as_json or found.completion is None:
        terminal.write(as_json_line(found.response))
    else:
        terminal.write(found.text if found.text.endswith("\n") else f"{found.text}\n")


@connected
async def cancel(client: Client, job_id: JobId) -> None:
    """End a job."""
    job = await client.jobs.cancel(job_id)
    terminal.note(f"job {job.id}: {sentence(job)}")


@connected
async def stats(client: Client, batch: Batch = "", as_json: Json = False) -> None:
    """Count jobs by where they stand."""
    counts = await client.jobs.count(batch)
    if as_json:
        terminal.write(counts_as_json(counts))
        return
    terminal.rows(COUNT_HEADERS, [[str(number) for number in count_numbers(counts)]])


def count_numbers(counts: JobCounts) -> tuple[int, ...]:
    return (counts.waiting, counts.running, counts.succeeded, counts.failed, counts.cancelled)


def counts_as_json(counts: JobCounts) -> str:
    names = (header.lower() for header in COUNT_HEADERS)
    return json.dumps(dict(zip(names, count_numbers(counts), strict=True))) + "\n"


def cells(job: Job) -> tuple[str, ...]:
    return (
        times.shown(job.create_time),
        job.state,
        f"{job.attempts}/{job.max_attempts}",
        str(job.progress_tokens),
        job.method.rpartition("/")[2] or "-",
        job.model or "-",
        job.id,
        job.last_error.reason if job.last_error else "-",
    )


def sentence(job: Job) -> str:
    """Where it stands."""
    said = str(job.state)
    if job.state is JobState.WAITING:
        said += f" until {times.shown(job.next_attempt_time)}" if job.next_attempt_time else ""
    if job.attempts:
        said += f", attempt {job.attempts} of {job.max_attempts}"
    if job.state is JobState.RUNNING:
        said += f", {job.progress_tokens} tokens"
    if job.last_error is not None and job.state is not JobState.SUCCEEDED:
        said += f" ({job.last_error.reason})"
    return said


def write_facts(job: Job) -> None:
    """One a line, then the attempts that failed."""
    facts = {
        "job": job.id,
        "state": sentence(job),
        "method": job.method,
        "model": job.model or "-",
        "priority": job.priority,
        "labels": " ".join(f"{name}={value}" for name, value in sorted(job.labels.items())) or "-",
        "batch": job.batch_id or "-",
        "created": times.shown(job.create_time),
        "given up": times.shown(job.give_up_time),
        "ended": times.shown(job.end_time),
        "result kept until": times.shown(job.result_expire_time),
        "last request": job.last_request_id or "-",
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        terminal.write(f"{name.ljust(width) if sys.stdout.isatty() else name}\t{value}\n")
    if job.failed_attempts:
        terminal.write("\n")
        terminal.rows(
            ("ATTEMPT", "BEGAN", "ENDED", "REASON", "REQUEST", "MESSAGE"),
            [
                (
                    str(attempt.number),
                    times.shown(attempt.start_time),
                    times.shown(attempt.end_time),
                    attempt.error.reason,
                    attempt.request_id or "-",
                    attempt.error.message,
                )
                for attempt in job.failed_attempts
            ],
        )


def as_json_line(message: Message, result: Message | None = None) -> str:
    fields = MessageToDict(message, preserving_proto_field_name=True)
    if result is not None:
        fields["result"] = MessageToDict(result, preserving_proto_field_name=True)
    return json.dumps(fields, ensure_ascii=False) + "\n"
