"""A model folder's tokenizer and chat template, without transformers, whose import and whose way of loading
them take half of a start.

The template is rendered as transformers does it: in jinja2's sandbox, in which nothing can be changed and no
attribute that begins with an underscore be read, with `tojson`, `raise_exception`, `strftime_now`, loop
controls and `{% generation %}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from services.mesh.clock import SystemClock

_CLOCK = SystemClock()
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class FileTokenizer:
    """What `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` say."""

    def __init__(self, folder: Path, now: Callable[[], datetime] = _CLOCK.now) -> None:
        """Raises OSError; ValueError and jinja2.TemplateError where a file is not what it should be."""
        self._tokenizer = _load(folder / "tokenizer.json")
        config = _json(folder / "tokenizer_config.json")
        self._special = _special_tokens(_json(folder / "special_tokens_map.json") | config)
        self.chat_template = _template_text(folder, config)
        self._template = None
        if self.chat_template:
            self._template = _environment(now).from_string(self.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with those that the tokenizer itself puts around a text, unless it is told not to."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text, up to where the assistant begins to speak.

        Raises jinja2.TemplateError where the template refuses it; ValueError where there is no template.
        """
        if self._template is None:
            raise ValueError("the model has no chat template")
        return self._template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special
        )


def _load(file: Path) -> Any:
    try:
        return Tokenizer.from_file(str(file))
    except OSError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{file}: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_bytes())
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Under the names by which templates know them."""
    found: dict[str, str] = {}
    for name in SPECIAL:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _template_text(folder: Path, config: Mapping[str, Any]) -> str:
    """The default template; empty where there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = config.get("chat_template") or ""
    if isinstance(given, list):
        return next((str(each["template"]) for each in given if each.get("name") == "default"), "")
    return str(given)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant says; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: now().astimezone().strftime(form)
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
