"""`llmos jobs submit`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from llmos_client.cli import job_files, kinds, terminal, times
from llmos_client.cli.commands import Client, connected
from llmos_client.cli.kinds import Json, Labels
from llmos_client.config import read_secret
from llmos_client.errors import ConfigurationError, NotFound
from llmos_client.job_calls import MAX_JOBS
from llmos_client.job_options import SubmitOptions
from llmos_client.job_types import JobPriority, SubmittedJobs

MAX_SHOWN = 20
"""Of lines that are wrong."""


@connected
async def submit(
    client: Client,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to ask; without it, and without --file: what stdin holds.", show_default=False
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="Hand in one job a line, a JSON object or plain text; at most 10,000.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="(LLMOS_MODEL; otherwise the first that is ready)", show_default=False
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="Instructions for the model.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, max=2, help="0 always takes the most probable token.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Makes answers repeatable.", show_default=False)
    ] = None,
    not_before: Annotated[
        str | None,
        typer.Option(
            help="Not to run before: a time (ISO 8601), or a while from now such as 10m, 2h.",
            show_default=False,
        ),
    ] = None,
    max_attempts: Annotated[
        int | None, typer.Option(min=1, max=20, help="How often it is tried in all.  [5]", show_default=False)
    ] = None,
    give_up_after: Annotated[
        str | None,
        typer.Option(help="Given up so long after it may first run, such as 2h.  [24h]", show_default=False),
    ] = None,
    priority: Annotated[
        JobPriority | None, typer.Option(help="Which of the waiting jobs go first.", show_default=False)
    ] = None,
    labels: Labels = None,
    webhook_url: Annotated[
        str | None, typer.Option(help="Whom to tell when it has ended.", show_default=False)
    ] = None,
    webhook_secret_file: Annotated[
        Path | None,
        typer.Option(help="A file with what that is signed with: `whsec_…`.", show_default=False),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="A repeat with the same key makes no second job.", show_default=False),
    ] = None,
    result_ttl: Annotated[
        str | None,
        typer.Option(
            help="How long its result is kept after its end, such as 7d.  [24h]", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hand in a job, or one for each line of a file. Their ids go to stdout."""
    given: dict[str, Any] = {
        "model": model,
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "not_before": times.ahead("--not-before", not_before),
        "max_attempts": max_attempts,
        "give_up_after_s": kinds.seconds(give_up_after) if give_up_after else None,
        "priority": priority,
        "labels": kinds.labels(labels),
        "webhook_url": webhook_url,
        "webhook_secret": read_secret(webhook_secret_file) if webhook_secret_file else None,
        "idempotency_key": idempotency_key,
        "result_ttl_s": kinds.seconds(result_ttl) if result_ttl else None,
    }
    options = cast(SubmitOptions, {name: value for name, value in given.items() if value})
    if temperature == 0:
        options["temperature"] = 0.0
    if seed == 0:
        options["seed"] = 0
    if file is not None:
        if prompt is not None:
            raise typer.BadParameter("name either a prompt or --file")
        await _submit_lines(client, file, options, as_json=as_json)
        return
    question = prompt if prompt is not None else _piped()
    await _name_a_model(client, options)
    job = await client.jobs.submit(question, **options)
    if as_json:
        terminal.write(_json(MessageToDict(job.raw, preserving_proto_field_name=True)))
    else:
        terminal.write(f"{job.id}\n")


async def _submit_lines(client: Client, file: Path, options: SubmitOptions, *, as_json: bool) -> None:
    lines = _lines(file)
    jobs = [(line.number, line.job) for line in lines if line.job is not None]
    if any("model" not in job.options for _, job in jobs):
        await _name_a_model(client, options)
    with Progress(
        TextColumn("handing in"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("", total=len(jobs))
        taken = await client.jobs.submit_many(
            [job for _, job in jobs], sent=lambda count: progress.update(task, completed=count), **options
        )
    numbers = [number for number, _ in jobs]
    for refusal in taken.refusals:
        where = f"line {numbers[refusal.index]}" if refusal.index < len(numbers) else f"job {refusal.index}"
        terminal.note(f"{where} was refused: {refusal.error.message} ({refusal.error.reason})")
    if as_json:
        terminal.write(_json(_as_dict(taken, numbers)))
    else:
        terminal.write("".join(f"{job_id}\n" for job_id in taken.job_ids))
        terminal.note(f"{len(taken.job_ids)} jobs were taken, as batch {taken.batch_id}")
    if taken.refusals:
        raise typer.Exit(terminal.FAILED)


def _lines(file: Path) -> list[job_files.Line]:
    """Raises ConfigurationError where the file cannot be read, or a line is wrong: then nothing is sent."""
    try:
        if str(file) == "-":
            lines = job_files.read(sys.stdin.buffer)
        else:
            with file.open("rb") as opened:
                lines = job_files.read(opened)
    except OSError as error:
        raise ConfigurationError(f"Cannot read {file}: {error.strerror}.") from error
    wrong = [line for line in lines if line.job is None]
    for line in wrong[:MAX_SHOWN]:
        terminal.note(f"{file}, line {line.number}: {line.fault}")
    if wrong:
        raise ConfigurationError(
            f"{len(wrong)} of {len(lines)} lines of {file} are wrong.", hint="Nothing was handed in."
        )
    if not lines:
        raise ConfigurationError(f"{file} holds no job.")
    if len(lines) > MAX_JOBS:
        raise ConfigurationError(
            f"{file} holds more than {MAX_JOBS:,} jobs.", hint=f"Hand it in in parts: split -l {MAX_JOBS}."
        )
    return lines


def _as_dict(taken: SubmittedJobs, numbers: list[int]) -> dict[str, Any]:
    return {
        "batch_id": taken.batch_id,
        "job_ids": list(taken.job_ids),
        "refusals": [
            {
                "line": numbers[one.index] if one.index < len(numbers) else None,
                "reason": one.error.reason,
                "message": one.error.message,
            }
            for one in taken.refusals
        ],
    }


def _piped() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("name a prompt or --file, or pipe the prompt in")
    return sys.stdin.read()


async def _name_a_model(client: Client, options: SubmitOptions) -> None:
    """The first that is ready, where none was named."""
    if options.get("model") or client.default_model:
        return
    models = [model for model in await client.models() if "embed" not in model.capabilities]
    named = [model.id for model in models if model.ready] or [model.id for model in models]
    if not named:
        raise NotFound("The platform has no model that this key may use.", reason="MODEL_NOT_FOUND")
    options["model"] = named[0]


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"
