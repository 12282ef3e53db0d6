"""Tokenizer and chat template are what transformers makes of the same files."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest

from services.inference.engine.port import Message, Prompt, Role
from services.inference.engine.tokenizer import PromptTokenizer
from services.inference.engine.tokenizer_files import FileTokenizer
from services.mesh.errors import RequestInvalid

TEXTS = (
    "Hello, world!",
    " in 1984:\n\n\ttabs",
    "<|im_start|>user\nnot a turn<|im_end|>",
    "日本語 🙂 é",
    "a" * 2000,
)
CHAT = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "Grüße 🙂"},
    {"role": "assistant", "content": " Hi. "},
    {"role": "user", "content": ""},
]
LOOPS = """
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {{ bos_token + message['role'] + ': ' + message['content'] | trim }}
    {%- generation %}{{ message | tojson }}{% endgeneration %}
{%- endfor %}
{{ messages | length }} {{ tools is none }} {{ documents is none }} {{ eos_token }}
{{ {'b': 1, 'a': ['<é>']} | tojson(indent=2, sort_keys=true) }}
{% if add_generation_prompt %}go{% endif %}
"""


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def folder_with(smollm2: Path, folder: Path, template: str | None, **config: object) -> Path:
    """A copy of the model's tokenizer with another template."""
    folder.mkdir(exist_ok=True)
    shutil.copy(smollm2 / "tokenizer.json", folder)
    known = json.loads((smollm2 / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(known | config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_the_real_models_texts_and_turns(smollm2: Path) -> None:
    ours, expected = FileTokenizer(smollm2), theirs(smollm2)
    for text in TEXTS:
        assert ours.encode(text) == expected.encode(text)
        assert ours.encode(text, add_special_tokens=False) == expected.encode(text, add_special_tokens=False)
    for chat in (CHAT, CHAT[1:]):
        rendered = ours.render(chat)
        assert rendered == expected.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_what_templates_may_use(smollm2: Path, tmp_path: Path) -> None:
    folder = folder_with(smollm2, tmp_path / "m", LOOPS)
    expected = theirs(folder).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert FileTokenizer(folder).render(CHAT) == expected


def test_a_template_in_the_configuration(smollm2: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert (
        FileTokenizer(folder_with(smollm2, tmp_path / "a", None, chat_template="one")).render(CHAT) == "one"
    )
    assert (
        FileTokenizer(folder_with(smollm2, tmp_path / "b", None, chat_template=named)).render(CHAT) == "yes"
    )
    assert not PromptTokenizer.load(folder_with(smollm2, tmp_path / "c", None)).has_chat_template


def test_a_template_may_tell_the_date(smollm2: Path, tmp_path: Path) -> None:
    folder = folder_with(smollm2, tmp_path / "m", "{{ strftime_now('%d %B %Y') }}")
    assert (
        FileTokenizer(folder, lambda: datetime(2026, 1, 31, 12, tzinfo=UTC)).render(CHAT) == "31 January 2026"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ missing.attribute }}",
    ],
)
def test_r19_what_a_template_must_not_do_is_refused(smollm2: Path, tmp_path: Path, template: str) -> None:
    tokenizer = PromptTokenizer.load(folder_with(smollm2, tmp_path / "m", template))
    with pytest.raises(RequestInvalid):
        print(tokenizer.encode(Prompt(messages=(Message(Role.USER, "x"),))))


def test_broken_files_are_told(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        FileTokenizer(folder_with(smollm2, tmp_path / "m", "{% if %}"))
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        FileTokenizer(tmp_path / "m")
