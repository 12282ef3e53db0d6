"""`llmos admin export` and `apply`: the configuration as a file that is kept in version control."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from llmos.auth.v1 import admin_service_pb2 as pb

from llmos_client import documents
from llmos_client.admin_types import ResourceKind
from llmos_client.cli import terminal
from llmos_client.cli.commands import Client, connected
from llmos_client.errors import ConfigurationError, InvalidRequest

_TIMEOUT_S = 120.0
_DONE = {
    pb.AppliedResource.ACTION_UNCHANGED: "unchanged",
    pb.AppliedResource.ACTION_CREATED: "created",
    pb.AppliedResource.ACTION_UPDATED: "updated",
    pb.AppliedResource.ACTION_DELETED: "deleted",
}


@connected
async def export(
    client: Client,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write it here, not to stdout.", show_default=False)
    ] = None,
    tenant: Annotated[
        str, typer.Option(help="Only of this tenant and its projects.", show_default=False)
    ] = "",
    digests: Annotated[
        bool,
        typer.Option("--digests", help="With digests of secrets and keys, so that they work elsewhere too."),
    ] = False,
) -> None:
    """Write the whole configuration as YAML, without secrets."""
    text = documents.write(
        await client.admin.export(tenant_id=tenant, include_digests=digests, timeout_s=_TIMEOUT_S)
    )
    if output is None:
        terminal.write(text)
        return
    try:
        _write_private(output, text)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error.strerror}") from None


@connected
async def apply(
    client: Client,
    file: Annotated[
        str, typer.Option("--file", "-f", help="The YAML file; `-` is stdin.", show_default=False)
    ],
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete what is not in the file, of the kinds that are.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Make the configuration as the file has it: all of it, or nothing. What is so already is left alone."""
    source, text = _read(file)
    given = documents.read(text, source)
    try:
        applied = await client.admin.apply(
            [document.resource for document in given], prune=prune, dry_run=dry_run, timeout_s=_TIMEOUT_S
        )
    except InvalidRequest as error:
        for violation in error.violations:
            place = violation.field.removeprefix("resources[").partition("]")[0]
            if place.isdecimal() and int(place) < len(given):
                terminal.note(f"{source}, line {given[int(place)].line}:")
        raise
    changed = [one for one in applied if one.action != pb.AppliedResource.ACTION_UNCHANGED]
    terminal.rows(
        ("ACTION", "KIND", "ID"),
        [
            (_DONE.get(one.action, str(one.action)), ResourceKind.named(one.name), one.name.id)
            for one in changed
        ],
    )
    counts = Counter(_DONE.get(one.action, str(one.action)) for one in applied)
    said = ", ".join(f"{counts[word]} {word}" for word in _DONE.values() if counts[word]) or "nothing given"
    terminal.note(f"{'would be: ' if dry_run else ''}{said}")


def _read(file: str) -> tuple[str, str]:
    """(what it is called, its text). Raises ConfigurationError."""
    try:
        if file == "-":
            return "stdin", sys.stdin.read(documents.MAX_BYTES + 1)
        with Path(file).open(encoding="utf-8") as opened:
            return file, opened.read(documents.MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file} is not UTF-8") from None


def _write_private(path: Path, text: str) -> None:
    """Replaces the file at once; digests are nobody else's business."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(
        os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
    fresh.replace(path)
