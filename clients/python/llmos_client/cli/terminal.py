"""What the commands print, and how they fail.

A model's text and whatever else comes from a server is shown without control characters on a terminal, so
that it can move no cursor and send no escape sequence. Into a pipe it goes as it is.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmos_client.errors import ConfigurationError, InvalidRequest, LlmosError

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130

T = TypeVar("T")

_KEPT = "\n\t"
_CONTROL = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in _KEPT
}


def printable(text: str) -> str:
    """`text` without control characters, save new line and tab."""
    return text.translate(_CONTROL)


def write(text: str) -> None:
    """Writes to stdout at once."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line on stderr, beside the answer."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(printable(text), style="dim"))


def report(error: LlmosError) -> None:
    """One sentence on stderr: what happened, what to do, and the ids that find it."""
    line = Text()
    line.append("error: ", style="bold red")
    line.append(printable(str(error)))
    if error.hint:
        line.append(printable(f" {error.hint}"))
    if error.retry_after_s is not None and error.retryable:
        line.append(f" Try again in {error.retry_after_s:.3g} s.")
    if error.request_id:
        line.append(printable(f" [request {error.request_id}]"), style="dim")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(line)
    for violation in error.violations:
        console.print(Text(printable(f"  {violation.field}: {violation.description}")))


def exit_code(error: LlmosError) -> int:
    """Wrong use where nothing was sent, failed where a server was asked."""
    local = isinstance(error, ConfigurationError) or (
        isinstance(error, InvalidRequest) and not error.request_id
    )
    return WRONG_USE if local else FAILED


@contextmanager
def failing_well() -> Iterator[None]:
    """Around a whole command. Raises typer.Exit."""
    try:
        yield
        sys.stdout.flush()
    except LlmosError as error:
        report(error)
        raise typer.Exit(exit_code(error)) from None
    except ValueError as error:
        report(ConfigurationError(f"{error}."))
        raise typer.Exit(WRONG_USE) from None
    except BrokenPipeError:
        # The reader has what it wanted. Python would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a command to its end. Ctrl-C cancels it, and with it its calls at the server."""
    with failing_well():
        return asyncio.run(work())
    raise AssertionError("failing_well never swallows")


def rows(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; tab-separated lines, headers first, anywhere else."""
    if not sys.stdout.isatty():
        for cells in (headers, *lines):
            write("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in cells) + "\n")
        return
    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for cells in lines:
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(table)
