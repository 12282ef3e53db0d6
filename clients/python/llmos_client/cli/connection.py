"""The options that say where the platform is and who asks. A credential is never an argument: the arguments
of a process can be read by everyone on the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llmos_client.async_client import AsyncClient
from llmos_client.cli import terminal
from llmos_client.config import DEFAULT_TARGET, ClientOptions, is_local

DEVELOPMENT_KEY = Path(".state/auth/admin-key")
"""Where a development mesh that was started in the current folder keeps its administrator's key."""

_PANEL = "Connection"

Target = Annotated[
    str | None,
    typer.Option(
        help=f"host:port of the gateway. (LLMOS_TARGET; otherwise {DEFAULT_TARGET})",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="A file with an API key or access token. (LLMOS_API_KEY_FILE, or LLMOS_API_KEY itself)",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of whom to trust. (LLMOS_TLS_CA_FILE)",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of this client's certificate, for mTLS. (LLMOS_TLS_CERT_FILE)",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of that certificate's key. (LLMOS_TLS_KEY_FILE)",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Tls = Annotated[
    bool,
    typer.Option("--tls", help="Use TLS, and trust the system's authorities.", rich_help_panel=_PANEL),
]
AllowPlaintext = Annotated[
    bool,
    typer.Option(
        "--allow-plaintext",
        help="Send the key unencrypted to another machine: only where the network encrypts.",
        rich_help_panel=_PANEL,
    ),
]


def connect(
    *,
    target: str | None,
    api_key_file: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    tls: bool,
    allow_plaintext: bool,
) -> AsyncClient:
    """The client that the options ask for. Raises ConfigurationError. Call it inside the event loop."""
    return AsyncClient(
        target,
        **ClientOptions(
            api_key_file=api_key_file or _development_key(target),
            tls_ca_file=ca,
            tls_cert_file=cert,
            tls_key_file=key,
            tls=tls,
            allow_plaintext=allow_plaintext,
        ),
    )


def _development_key(target: str | None) -> Path | None:
    """The key of a mesh that was started here, where no other was given. It stays on this machine."""
    if os.environ.get("LLMOS_API_KEY") or os.environ.get("LLMOS_API_KEY_FILE"):
        return None
    if not is_local(target or os.environ.get("LLMOS_TARGET") or DEFAULT_TARGET):
        return None
    if not DEVELOPMENT_KEY.is_file():
        return None
    terminal.note(f"using the development mesh's key {DEVELOPMENT_KEY}")
    return DEVELOPMENT_KEY
