"""`llmos chat`"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import Annotated

import typer

from llmos_client.async_client import AsyncClient, AsyncStream
from llmos_client.calls import StreamOptions
from llmos_client.cli import connection, terminal
from llmos_client.errors import AuthenticationError, ConfigurationError, LlmosError, NotFound
from llmos_client.generation_types import Message

MAX_MESSAGES = 200
"""Of a conversation; older ones are forgotten."""
MAX_QUESTION_BYTES = 1024 * 1024
COMMANDS = "Ctrl-C ends an answer, and the chat at the prompt. /reset forgets the conversation, /exit leaves."


def chat(
    question: Annotated[
        str | None,
        typer.Argument(
            help="Ask this and exit. Without it: a conversation; or, where stdin is a pipe, what it holds.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="(LLMOS_MODEL; otherwise the first that is ready)", show_default=False
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="Instructions for the model.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, max=2, help="0 always takes the most probable token.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Makes answers repeatable.", show_default=False)
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout", min=0.001, help="Seconds that an answer may take.", show_default=False),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show usage, times, request id and trace id after an answer.")
    ] = False,
    target: connection.Target = None,
    api_key_file: connection.ApiKeyFile = None,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    tls: connection.Tls = False,
    allow_plaintext: connection.AllowPlaintext = False,
) -> None:
    """Chat with a model; answers are shown as they come."""
    given = {
        "model": model,
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "timeout_s": timeout_s,
    }
    options = StreamOptions(**{name: value for name, value in given.items() if value is not None})  # type: ignore[typeddict-item]

    async def opened() -> AsyncClient:
        return connection.connect(
            target=target,
            api_key_file=api_key_file,
            ca=ca,
            cert=cert,
            key=key,
            tls=tls,
            allow_plaintext=allow_plaintext,
        )

    with terminal.failing_well(), asyncio.Runner() as runner:
        client = runner.run(opened())
        try:
            conversation = _Conversation(client, options, stats=stats)
            runner.run(conversation.choose_model())
            if question is None and not sys.stdin.isatty():
                question = _piped_question()
            if question is None:
                _converse(runner, conversation)
            else:
                runner.run(conversation.ask(question))
        finally:
            runner.run(client.close())


def _piped_question() -> str:
    text = sys.stdin.read(MAX_QUESTION_BYTES + 1)
    if len(text) > MAX_QUESTION_BYTES:
        raise ConfigurationError(f"The question on stdin is longer than {MAX_QUESTION_BYTES} characters.")
    if not text.strip():
        raise ConfigurationError("There is no question: stdin is empty.")
    return text


def _converse(runner: asyncio.Runner, conversation: _Conversation) -> None:
    """Asks until there is nothing more to ask. A failed or cancelled answer does not end the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives the prompt its editing and history)
    terminal.note(f"{conversation.model}. {COMMANDS}")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            terminal.write("\n")
            return
        match line:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                conversation.reset()
                continue
            case "/help":
                terminal.note(COMMANDS)
                continue
        try:
            runner.run(conversation.ask(line))
        except KeyboardInterrupt:
            terminal.note("(cancelled)")
        except AuthenticationError:
            raise
        except LlmosError as error:
            terminal.report(error)


class _Conversation:
    """What was said so far, and how the next answer is asked for."""

    def __init__(self, client: AsyncClient, options: StreamOptions, *, stats: bool) -> None:
        self._client = client
        self._options = options
        self._stats = stats
        self._messages: list[Message] = []

    @property
    def model(self) -> str:
        return self._options["model"]

    async def choose_model(self) -> None:
        """Takes the first model that is ready where none was named."""
        named = self._options.get("model") or self._client.default_model
        if not named:
            models = [model for model in await self._client.models() if "embed" not in model.capabilities]
            ready = [model.id for model in models if model.ready] or [model.id for model in models]
            if not ready:
                raise NotFound("The platform has no model that this key may use.", reason="MODEL_NOT_FOUND")
            named = ready[0]
        self._options["model"] = named

    def reset(self) -> None:
        self._messages.clear()

    async def ask(self, question: str) -> None:
        """Shows the answer as it comes. What was shown of a cancelled one stays in the conversation."""
        messages = [*self._messages, Message("user", question)][-MAX_MESSAGES:]
        begun_s = time.monotonic()
        first_s: float | None = None
        stream = self._client.stream(messages, **self._options)
        try:
            async with stream:
                async for delta in stream:
                    if first_s is None:
                        first_s = time.monotonic() - begun_s
                    terminal.write(delta.text)
        finally:
            if stream.text:
                self._messages = [*messages, Message("assistant", stream.text)]
                if not stream.text.endswith("\n"):
                    terminal.write("\n")
        if self._stats:
            terminal.note(_facts(stream, first_s, time.monotonic() - begun_s))


def _facts(stream: AsyncStream, first_s: float | None, all_s: float) -> str:
    usage, started = stream.usage, stream.started
    if usage is None or started is None:
        return ""
    return "\n".join(
        [
            f"model    {started.model} ({started.model_revision}), seed {started.seed}",
            f"tokens   {usage.prompt_tokens} of prompt ({usage.cached_prompt_tokens} cached),"
            f" {usage.completion_tokens} of answer; ended by {stream.finish_reason}",
            f"times    first token after {first_s or all_s:.2f} s, all {all_s:.2f} s,"
            f" {usage.completion_tokens / all_s:.1f} tokens/s",
            f"request  {stream.request_id}",
            f"trace    {stream.trace_id}",
        ]
    )
