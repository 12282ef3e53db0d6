"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from llmos_client.cli import admin, admin_create, admin_files, audit, chat, models, quantize
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
