"""Prompts to token ids, with the model's own tokenizer and chat template. A client can not send one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.inference.engine.detokenizer import TokenTable
from services.inference.engine.port import Prompt
from services.mesh.errors import RequestInvalid, Violation


class PromptTokenizer:
    """One model's tokenizer."""

    def __init__(self, tokenizer: Any, table: TokenTable) -> None:
        self._tokenizer = tokenizer
        self.table = table

    @classmethod
    def load(cls, folder: Path) -> PromptTokenizer:
        """Raises UnsupportedTokenizer, OSError; ValueError, jinja2.TemplateError on files that are broken."""
        from services.inference.engine.tokenizer_files import FileTokenizer

        tokenizer = FileTokenizer(folder)
        table = TokenTable.of(json.loads((folder / "tokenizer.json").read_bytes()))
        return cls(tokenizer, table)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt, at least one. Raises RequestInvalid."""
        if prompt.messages:
            text = self._render(prompt)
            # The template writes the special tokens itself.
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = self._tokenizer.encode(prompt.text)
        if not ids:
            raise invalid("spec.prompt", "the prompt has no tokens")
        return list(ids)

    def _render(self, prompt: Prompt) -> str:
        import jinja2

        if not self.has_chat_template:
            raise invalid("spec.prompt.chat", "the model has no chat template; send text")
        messages = [{"role": message.role.value, "content": message.content} for message in prompt.messages]
        try:
            return str(self._tokenizer.render(messages))
        except jinja2.TemplateError as error:
            raise invalid("spec.prompt.chat", f"the model's chat template refuses it: {error}") from error


def invalid(field: str, description: str) -> RequestInvalid:
    """A RequestInvalid about one field."""
    return RequestInvalid(f"`{field}`: {description}.", violations=[Violation(field, description)])
