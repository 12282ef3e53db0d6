"""`llmos quantize`: hands over to the inference service's own command, whose libraries a client lacks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llmos_client.cli import terminal
from llmos_client.errors import ConfigurationError

MODULE = "services.inference.quantise"
NEEDED = ("gguf", "safetensors", "torch")


class Blocks(StrEnum):
    """What `--to` takes."""

    Q8_0 = "Q8_0"
    Q4_1 = "Q4_1"
    Q4_0 = "Q4_0"
    KEEP = "keep"


def quantize(
    source: Annotated[Path, typer.Argument(help="A model's folder of safetensors, or a .gguf file.")],
    target: Annotated[Path, typer.Argument(help="The folder to make; it must not exist, or be empty.")],
    to: Annotated[
        Blocks | None,
        typer.Option(
            help="The blocks: 8.5, 5 or 4.5 bits a weight; keep: a .gguf file's own, which is its default.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text of which source and result are compared.", show_default=False),
    ] = None,
) -> None:
    """Make a model folder whose matrices are quantised blocks, and say what that costs."""
    arguments = ["--to", to.value] if to else []
    arguments += ["--text", str(text)] if text else []
    with terminal.failing_well():
        _check_installed()
        # -P: what is run is what is installed, whatever lies in the current folder.
        command = [sys.executable, "-P", "-m", MODULE, *arguments, "--", str(source), str(target)]
        code = _run(command)
    raise typer.Exit(code)


def _check_installed() -> None:
    """Raises ConfigurationError. Imports nothing."""
    services = importlib.util.find_spec("services")
    places = (services and services.submodule_search_locations) or []
    found = any((Path(place) / "inference" / "quantise").is_dir() for place in places)
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking or not found:
        what = ", ".join(lacking) if found else "the service itself"
        raise ConfigurationError(
            f"Quantising needs the inference service in this Python, which lacks {what}.",
            hint="A checkout of llmos has it in .venv/bin/llmos; requirements/inference.txt lists the rest.",
        )


def _run(command: list[str]) -> int:
    """The command's exit code."""
    with subprocess.Popen(command) as process:
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                # It has got the signal too, and is clearing up.
                continue
            return code if code >= 0 else 128 - code
