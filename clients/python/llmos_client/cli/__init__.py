"""The command `llmos`.

- `chat`: a conversation in the terminal, or one question and its answer
- `models`: what there is to talk to
- `audit tail`, `audit search`: what the audit log knows
- `jobs …`: requests that run later, and what was given up
- `admin …`: tenants, clients, keys, roles and the rest, one by one or as a file
- `quantize`: a model folder of quantised blocks, by the inference service's own command

`connection` holds the options that all commands share, `terminal` what they print and how they fail: errors
are one sentence on stderr; exit codes are 0 (well), 1 (failed), 2 (wrong use), 130 (interrupted).
"""

from __future__ import annotations

import os

# gRPC's own log lines do not belong into a conversation. It reads this when its first channel is made.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from llmos_client.cli.app import app


def main() -> None:
    """The entry point."""
    app(prog_name="llmos")


__all__ = ["app", "main"]
