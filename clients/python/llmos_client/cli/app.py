"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from llmos_client.cli import (
    admin,
    admin_create,
    admin_files,
    audit,
    chat,
    dead_letters,
    jobs,
    jobs_submit,
    jobs_watch,
    models,
    quantize,
)
from llmos_client.version import __version__

app = typer.Typer(
    name="llmos",
    help="Talk to an llmos platform.",
    no_args_is_help=True,
    # A traceback with the values of variables could show a credential.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.chat)
app.command("models")(models.models)
app.command("quantize")(quantize.quantize)

_audit = typer.Typer(help="Read the audit log (needs the scope audit.read).", no_args_is_help=True)
_audit.command("tail")(audit.tail)
_audit.command("search")(audit.search)
app.add_typer(_audit, name="audit")

_jobs = typer.Typer(
    help="Requests that run later, and what was given up (needs the scope generate).", no_args_is_help=True
)
_jobs.command("submit")(jobs_submit.submit)
_jobs.command("list")(jobs.list_jobs)
_jobs.command("watch")(jobs_watch.watch)
for _command in (jobs.show, jobs.result, jobs.cancel, jobs.stats):
    _jobs.command(_command.__name__)(_command)
_dead_letters = typer.Typer(help="What was given up: see it, run it again, forget it.", no_args_is_help=True)
_dead_letters.command("list")(dead_letters.list_letters)
for _command in (dead_letters.show, dead_letters.replay, dead_letters.discard):
    _dead_letters.command(_command.__name__)(_command)
_jobs.add_typer(_dead_letters, name="dead-letters")
app.add_typer(_jobs, name="jobs")

_admin = typer.Typer(
    help="Manage tenants, clients, keys and the rest (needs the scope admin or tenant.admin).",
    no_args_is_help=True,
)
for _command in (
    *(admin.get, admin.edit, admin.delete, admin.disable, admin.enable, admin.revoke, admin.rotate),
    *(admin.changes, admin.explain, admin_files.export, admin_files.apply),
):
    _admin.command(_command.__name__)(_command)
_create = typer.Typer(help="Make something.", no_args_is_help=True)
for _name, _command in admin_create.COMMANDS.items():
    _create.command(_name)(_command)
_admin.add_typer(_create, name="create")
app.add_typer(_admin, name="admin")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Talk to an llmos platform."""
