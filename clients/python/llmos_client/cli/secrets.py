"""Where a secret goes that was just made: to stdout alone, or into a private file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llmos_client.admin_types import MadeResource, ResourceKind, id_of
from llmos_client.cli import terminal
from llmos_client.errors import ConfigurationError

SecretFile = Annotated[
    Path | None,
    typer.Option(
        "--secret-file",
        help="Write the secret into this new file (mode 0600), not to stdout.",
        show_default=False,
    ),
]


class Keeper:
    """Opens the file before anything is made: a secret that cannot be written would be lost."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: int | None = None

    def __enter__(self) -> Keeper:
        if self._path is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                self._file = os.open(self._path, flags, 0o600)
            except OSError as error:
                raise ConfigurationError(
                    f"The secret cannot be written to {self._path}: {error.strerror}",
                    hint="Name a file that does not exist yet.",
                ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            if kind is not None and self._path is not None:
                self._path.unlink(missing_ok=True)

    def keep(self, made: MadeResource) -> None:
        """Hands the secret over, and says on stderr what was made."""
        kind, resource_id = ResourceKind.of(made.resource), id_of(made.resource)
        terminal.note(f"{kind} {resource_id} was made")
        if not made.secret:
            return
        if self._file is not None:
            os.write(self._file, f"{made.secret}\n".encode())
            os.fsync(self._file)
            terminal.note(f"its secret is in {self._path}; it cannot be read again")
            return
        terminal.note("its secret follows; it cannot be read again")
        terminal.write(f"{made.secret}\n")
