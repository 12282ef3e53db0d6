"""Commands that need a connection: its options are added to each command's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from llmos_client.async_client import AsyncClient
from llmos_client.cli import connection, terminal

_OPTIONS: dict[str, tuple[Any, object]] = {
    "target": (connection.Target, None),
    "api_key_file": (connection.ApiKeyFile, None),
    "ca": (connection.Ca, None),
    "cert": (connection.Cert, None),
    "key": (connection.Key, None),
    "tls": (connection.Tls, False),
    "allow_plaintext": (connection.AllowPlaintext, False),
}


def connected(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """`async def function(client, …)` as a command: with a client that its options ask for, and failing as
    all commands do."""
    signature = inspect.signature(function, eval_str=True)
    own = list(signature.parameters.values())[1:]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _OPTIONS.items()
    ]

    def command(**values: Any) -> None:
        options = {name: values.pop(name) for name in _OPTIONS}

        async def work() -> None:
            async with connection.connect(**options) as client:
                await function(client, **values)

        terminal.run(work)

    described: Any = command
    described.__name__ = function.__name__
    described.__doc__ = function.__doc__
    described.__signature__ = signature.replace(parameters=[*own, *added], return_annotation=None)
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return command


Client = AsyncClient
