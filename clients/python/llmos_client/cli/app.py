"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from llmos_client.cli import audit, chat, models, quantize
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
