"""`llmos models`"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict

from llmos_client.cli import connection, terminal


def models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    target: connection.Target = None,
    api_key_file: connection.ApiKeyFile = None,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    tls: connection.Tls = False,
    allow_plaintext: connection.AllowPlaintext = False,
) -> None:
    """List the models that your key may use."""

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
            found = await client.models()
        if as_json:
            for model in found:
                terminal.write(json.dumps(MessageToDict(model.raw, preserving_proto_field_name=True)) + "\n")
            return
        terminal.rows(
            ("MODEL", "READY", "CONTEXT", "CAN", "COMPUTED BY", "REVISION"),
            [
                (
                    model.id,
                    "yes" if model.ready else "no",
                    str(model.context_tokens),
                    ", ".join(model.capabilities),
                    _kernels(model.numerics_id),
                    model.revision,
                )
                for model in found
            ],
        )

    terminal.run(work)


def _kernels(numerics_id: str) -> str:
    """Kernels, number formats and instruction set: what stands between the weights and the sampling."""
    return "/".join(numerics_id.split("/")[1:-1])
