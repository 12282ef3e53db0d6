"""`llmos audit`"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict

from llmos_client.audit_types import AuditFilter, AuditRecord, Outcome
from llmos_client.cli import connection, terminal, times

RequestId = Annotated[str, typer.Option("--request-id", help="Only this request.", show_default=False)]
ClientId = Annotated[str, typer.Option("--client", help="Only requests of this client.", show_default=False)]
OnlyOutcome = Annotated[Outcome | None, typer.Option(help="Only requests that ended so.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, with all that is known.")]

HEADERS = ("RECEIVED", "OUTCOME", "METHOD", "MODEL", "TOKENS", "SECONDS", "CLIENT", "REQUEST")
_WIDTHS = (24, 10, 16, 24, 9, 8, 20, 0)


def tail(
    last: Annotated[
        int, typer.Option("--last", "-n", min=0, max=1000, help="Stored records to begin with.")
    ] = 10,
    request_id: RequestId = "",
    client_id: ClientId = "",
    outcome: OnlyOutcome = None,
    as_json: Json = False,
    target: connection.Target = None,
    api_key_file: connection.ApiKeyFile = None,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    tls: connection.Tls = False,
    allow_plaintext: connection.AllowPlaintext = False,
) -> None:
    """Follow the audit log until Ctrl-C. A request comes again when its outcome is stored."""
    wanted = AuditFilter(request_id=request_id, client_id=client_id, outcome=outcome)

    async def work() -> None:
        async with connection.connect(
            target=target,
            api_key_file=api_key_file,
            ca=ca,
            cert=cert,
            key=key,
            tls=tls,
            allow_plaintext=allow_plaintext,
        ) as client:
            if not as_json and sys.stdout.isatty():
                _show_line(HEADERS)
            async with client.audit.tail(wanted, last=last) as records:
                async for record in records:
                    if as_json:
                        _show_json([record])
                    else:
                        _show_line(_cells(record))

    terminal.run(work)


def search(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100_000, help="So many at most.")] = 50,
    since: Annotated[
        str | None,
        typer.Option(
            help="Received at or after: a time (ISO 8601), or an age such as 30s, 10m, 2h, 1d.",
            show_default=False,
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Received before; as --since.", show_default=False)
    ] = None,
    request_id: RequestId = "",
    client_id: ClientId = "",
    outcome: OnlyOutcome = None,
    open_only: Annotated[bool, typer.Option("--open", help="Only requests without an outcome.")] = False,
    as_json: Json = False,
    target: connection.Target = None,
    api_key_file: connection.ApiKeyFile = None,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    tls: connection.Tls = False,
    allow_plaintext: connection.AllowPlaintext = False,
) -> None:
    """Find requests in the audit log, newest first."""
    wanted = AuditFilter(
        request_id=request_id,
        client_id=client_id,
        outcome=outcome,
        since=times.ago("--since", since),
        until=times.ago("--until", until),
        open_only=open_only,
    )

    async def work() -> None:
        async with connection.connect(
            target=target,
            api_key_file=api_key_file,
            ca=ca,
            cert=cert,
            key=key,
            tls=tls,
            allow_plaintext=allow_plaintext,
        ) as client:
            found = await client.audit.search(wanted, limit=limit)
        if as_json:
            _show_json(found)
        else:
            terminal.rows(HEADERS, [_cells(record) for record in found])

    terminal.run(work)


def _cells(record: AuditRecord) -> tuple[str, ...]:
    duration_s = record.duration_s
    outcome = str(record.outcome) if record.outcome else "running"
    return (
        times.shown(record.receive_time),
        f"{outcome} ({record.error_reason})" if record.error_reason else outcome,
        record.method.rpartition("/")[2] or "-",
        record.model or "-",
        "cached"
        if record.served_from_cache
        else f"{record.usage.prompt_tokens}+{record.usage.completion_tokens}",
        f"{duration_s:.3f}" if duration_s is not None else "-",
        f"{record.tenant_id}/{record.client_id}",
        record.request_id,
    )


def _show_line(cells: Iterable[str]) -> None:
    """Columns on a terminal, in line where they fit; tab-separated anywhere else."""
    if sys.stdout.isatty():
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
    else:
        line = "\t".join(cells)
    terminal.write(line + "\n")


def _show_json(records: Iterable[AuditRecord]) -> None:
    for record in records:
        known = MessageToDict(record.raw, preserving_proto_field_name=True)
        terminal.write(json.dumps(known, ensure_ascii=False) + "\n")
