"""`llmos jobs dead-letters`: what was given up, running it again, and forgetting it."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer
from rich.console import Console

from llmos_client.cli import jobs, kinds, terminal, times
from llmos_client.cli.commands import Client, connected
from llmos_client.cli.kinds import Json
from llmos_client.errors import NotFound
from llmos_client.job_options import DeadLetterFilter, ReplayAllOptions, ReplayOptions
from llmos_client.job_types import DeadLetter, JobError

LetterId = Annotated[str, typer.Argument(metavar="ID", help="The dead letter's id.")]
Reason = Annotated[
    str, typer.Option(help="Only those given up for this reason, such as NO_REPLICA.", show_default=False)
]
Since = Annotated[
    str | None,
    typer.Option(
        help="Given up at or after: a time (ISO 8601), or an age such as 30s, 10m, 2h, 1d.",
        show_default=False,
    ),
]
Until = Annotated[str | None, typer.Option(help="Given up before; as --since.", show_default=False)]


@connected
async def list_letters(
    client: Client,
    reason: Reason = "",
    model: Annotated[str, typer.Option(help="Only jobs that asked for this model.", show_default=False)] = "",
    since: Since = None,
    until: Until = None,
    unreadable: Annotated[
        bool, typer.Option("--unreadable", help="Events that could not be read (needs the scope admin).")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="So many at most.")] = 50,
    as_json: Json = False,
) -> None:
    """List what was given up, newest first."""
    wanted = cast(
        DeadLetterFilter, _set(reason=reason, model=model, unreadable=unreadable) | _between(since, until)
    )
    found = client.jobs.dead_letters.list(limit=limit, **wanted)
    if as_json:
        async for letter in found:
            terminal.write(jobs.as_json_line(letter.raw))
        return
    terminal.rows(
        ("GIVEN UP", "REASON", "ATTEMPTS", "METHOD", "MODEL", "ID", "MESSAGE"),
        [_cells(letter) async for letter in found],
    )


@connected
async def show(client: Client, letter_id: LetterId, as_json: Json = False) -> None:
    """Show a dead letter with each attempt."""
    letter = await _found(client, letter_id)
    if as_json:
        terminal.write(jobs.as_json_line(letter.raw))
        return
    terminal.write(f"dead letter\t{letter.id}\nreason\t{_why(letter.error)}\n")
    terminal.write(f"given up\t{times.shown(letter.create_time)}\n")
    terminal.write(f"deleted\t{times.shown(letter.expire_time)}\n\n")
    if letter.job is not None:
        jobs.write_facts(letter.job)
    else:
        terminal.write(f"topic\t{letter.topic}\nplace\t{letter.place}\n")


@connected
async def replay(
    client: Client,
    letter_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="This one.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All that match the options below.")] = False,
    reason: Reason = "",
    model_was: Annotated[
        str, typer.Option(help="Only jobs that asked for this model.", show_default=False)
    ] = "",
    since: Since = None,
    until: Until = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model this time.", show_default=False)
    ] = "",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most this time.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="The temperature this time.", show_default=False)
    ] = None,
    max_attempts: Annotated[
        int | None,
        typer.Option(min=1, max=20, help="How often it is tried in all.  [5]", show_default=False),
    ] = None,
    give_up_after: Annotated[
        str | None,
        typer.Option(help="Given up again so long from now, such as 2h.  [24h]", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make new jobs of dead letters, which are gone then."""
    narrowed = _set(reason=reason, model_was=model_was) | _between(since, until)
    if (letter_id is None) is not every or (letter_id is not None and narrowed):
        raise typer.BadParameter("name either ID, or --all with what narrows it")
    changes = _set(
        model=model,
        max_tokens=max_tokens,
        max_attempts=max_attempts,
        give_up_after_s=kinds.seconds(give_up_after) if give_up_after else None,
    )
    if temperature is not None:
        changes["temperature"] = temperature
    if letter_id is not None:
        job = await client.jobs.dead_letters.replay(letter_id, **cast(ReplayOptions, changes))
        terminal.write(jobs.as_json_line(job.raw) if as_json else f"{job.id}\n")
        return
    await _replay_all(client, cast(ReplayAllOptions, narrowed | changes), as_json=as_json)


async def _replay_all(client: Client, options: ReplayAllOptions, *, as_json: bool) -> None:
    done = failed = 0
    with Console(stderr=True).status("replaying") as status:
        async with client.jobs.dead_letters.replay_all(**options) as replayed:
            async for one in replayed:
                if one.error is not None:
                    failed += 1
                    terminal.note(f"{one.dead_letter_id} cannot be replayed: {_why(one.error)}")
                else:
                    done += 1
                if as_json:
                    terminal.write(jobs.as_json_line(one.raw))
                elif one.job is not None:
                    terminal.write(f"{one.job.id}\n")
                status.update(f"{done} replayed, {failed} could not be")
    terminal.note(f"{done} replayed, {failed} could not be")
    if failed:
        raise typer.Exit(terminal.FAILED)


@connected
async def discard(client: Client, letter_id: LetterId) -> None:
    """Forget a dead letter and what it holds."""
    await client.jobs.dead_letters.discard(letter_id)
    terminal.note(f"dead letter {letter_id} is forgotten")


async def _found(client: Client, letter_id: str) -> DeadLetter:
    async for letter in client.jobs.dead_letters.list():
        if letter.id == letter_id:
            return letter
    raise NotFound(
        f"There is no dead letter {letter_id}.", hint="It may have been replayed, discarded or deleted."
    )


def _cells(letter: DeadLetter) -> tuple[str, ...]:
    job = letter.job
    return (
        times.shown(letter.create_time),
        letter.error.reason,
        f"{job.attempts}/{job.max_attempts}" if job else "-",
        job.method.rpartition("/")[2] if job else f"{letter.topic} {letter.place}",
        (job.model if job else "") or "-",
        letter.id,
        letter.error.message,
    )


def _why(error: JobError) -> str:
    return f"{error.message} ({error.reason})"


def _set(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value}


def _between(since: str | None, until: str | None) -> dict[str, Any]:
    return _set(since=times.ago("--since", since), until=times.ago("--until", until))
