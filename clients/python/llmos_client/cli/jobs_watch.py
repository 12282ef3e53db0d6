"""`llmos jobs watch`: live on a terminal, a line for each change anywhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Annotated, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmos_client import job_calls
from llmos_client.cli import jobs, terminal
from llmos_client.cli.commands import Client, connected
from llmos_client.cli.kinds import Json
from llmos_client.errors import NotFound, Unavailable
from llmos_client.job_types import Job, JobCounts, JobState, JobUpdate
from llmos_client.tailing import GIVE_UP_AFTER_S

POLL_S = 1.0
MAX_SHOWN_JOBS = 20
OPEN = (JobState.RUNNING, JobState.WAITING)


@connected
async def watch(
    client: Client,
    job_id: Annotated[
        str | None,
        typer.Argument(metavar="[ID]", help="A job; without: all that have not ended.", show_default=False),
    ] = None,
    batch: jobs.Batch = "",
    as_json: Json = False,
) -> None:
    """Watch a job or a batch until it has ended, or all jobs until Ctrl-C."""
    if job_id is not None and batch:
        raise typer.BadParameter("name either ID or --batch")
    if job_id is not None:
        await _watch_one(client, job_id, as_json=as_json)
    else:
        await _watch_many(client, batch, as_json=as_json)


async def _watch_one(client: Client, job_id: str, *, as_json: bool) -> None:
    last: Job | None = None
    with _Screen(live=not as_json) as screen:
        async with client.jobs.watch(job_id) as updates:
            async for update in updates:
                last = update.job
                if as_json:
                    terminal.write(jobs.as_json_line(update.job.raw))
                else:
                    screen.show(partial(_drawn, update), _line(update))
    if last is not None and last.state is not JobState.SUCCEEDED:
        job_calls.outcome(last)


async def _watch_many(client: Client, batch_id: str, *, as_json: bool) -> None:
    loop = asyncio.get_running_loop()
    answered_s = loop.time()
    last = JobCounts()
    shown_once = False
    with _Screen(live=not as_json) as screen:
        while True:
            try:
                counts = await client.jobs.count(batch_id)
                shown = [
                    job
                    async for job in client.jobs.list(states=OPEN, batch_id=batch_id, limit=MAX_SHOWN_JOBS)
                ]
            except Unavailable:
                if loop.time() - answered_s > GIVE_UP_AFTER_S:
                    raise
            else:
                answered_s = loop.time()
                if batch_id and not counts.total:
                    raise NotFound(f"There is no job of batch {batch_id}.")
                if as_json and (counts != last or not shown_once):
                    terminal.write(jobs.counts_as_json(counts))
                elif not as_json:
                    line = [str(number) for number in jobs.count_numbers(counts)]
                    screen.show(partial(_table, counts, shown), line, headers=jobs.COUNT_HEADERS)
                last, shown_once = counts, True
                if batch_id and not counts.unfinished:
                    break
            await asyncio.sleep(POLL_S)
    if last.failed:
        terminal.note(f"{last.failed} were given up: see `llmos jobs dead-letters list`")
        raise typer.Exit(terminal.FAILED)


class _Screen:
    """Draws anew on a terminal; writes a line where it has changed anywhere else."""

    def __init__(self, *, live: bool) -> None:
        self._stack = ExitStack()
        console = Console()
        drawn = live and console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False) if drawn else None
        self._last: tuple[str, ...] | None = None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._stack.enter_context(self._live)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def show(
        self,
        draw: Callable[[], RenderableType],
        line: Sequence[str],
        *,
        headers: Sequence[str] = ("STATE", "ATTEMPTS", "TOKENS", "ERROR"),
    ) -> None:
        if self._live is not None:
            self._live.update(draw(), refresh=True)
            return
        if self._last is None:
            terminal.write("\t".join(headers) + "\n")
        if tuple(line) != self._last:
            terminal.write("\t".join(line) + "\n")
        self._last = tuple(line)


def _line(update: JobUpdate) -> tuple[str, ...]:
    job = update.job
    return (
        job.state,
        f"{job.attempts}/{job.max_attempts}",
        str(job.progress_tokens),
        job.last_error.reason if job.last_error else "-",
    )


def _drawn(update: JobUpdate) -> RenderableType:
    job = update.job
    head = Text(terminal.printable(f"{job.id}  {jobs.sentence(job)}"), style="bold")
    texts = update.partial_texts or ((job.result.text,) if job.result and job.result.text else ())
    return Group(head, *(Text(terminal.printable(text)) for text in texts))


def _table(counts: JobCounts, shown: Sequence[Job]) -> RenderableType:
    numbers = Table(*jobs.COUNT_HEADERS, box=None, pad_edge=False, header_style="bold")
    numbers.add_row(*(str(number) for number in jobs.count_numbers(counts)))
    listed = Table(*jobs.HEADERS, box=None, pad_edge=False, header_style="bold")
    for job in shown:
        listed.add_row(*(Text(terminal.printable(cell)) for cell in jobs.cells(job)))
    return Group(numbers, Text(), listed) if shown else numbers
