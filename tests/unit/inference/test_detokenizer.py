"""Text from tokens: any Unicode, whole characters only, the same text as the tokenizer's own decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.inference.engine.detokenizer import (
    Detokenizer,
    TokenTable,
    UnsupportedTokenizer,
    byte_level_alphabet,
)
from services.inference.engine.tokenizer import PromptTokenizer

REPLACEMENT = "\ufffd"
VOCAB_TOKENS = 49_152


@pytest.fixture(scope="module")
def own_decoder(smollm2: Path) -> Any:
    """The tokenizer of the `tokenizers` library, as the judge."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


def pieces(tokenizer: PromptTokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.table)
    return [detokenizer.push(token) for token in ids]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_every_text_comes_back_in_whole_characters(
    tokenizer: PromptTokenizer, own_decoder: Any, text: str
) -> None:
    ids = own_decoder.encode(text, add_special_tokens=False).ids
    # The vocabulary lacks a few bytes, and a text may spell a special token: those do not come back.
    assume(own_decoder.decode(ids, skip_special_tokens=True) == text)
    said = pieces(tokenizer, ids)
    assert "".join(said) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in said)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, VOCAB_TOKENS - 1), max_size=40))
def test_any_tokens_give_what_the_tokenizers_decoder_gives(
    tokenizer: PromptTokenizer, own_decoder: Any, ids: list[int]
) -> None:
    said = "".join(pieces(tokenizer, ids))
    expected = own_decoder.decode(ids, skip_special_tokens=True)
    # Bytes at the very end that are not yet a character are held back, where the decoder gives U+FFFD.
    assert expected.startswith(said)
    assert expected[len(said) :].strip(REPLACEMENT) == ""


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer: PromptTokenizer) -> None:
    alphabet = {byte: character for character, byte in byte_level_alphabet().items()}
    table = TokenTable.of(
        {
            "decoder": {"type": "ByteLevel"},
            "model": {"vocab": {alphabet[byte]: byte for byte in range(256)}},
            "added_tokens": [{"id": 256, "content": "<end>", "special": True}],
        }
    )
    detokenizer = Detokenizer(table)
    said = [detokenizer.push(token) for token in [*"🦙".encode(), 256, ord("!")]]
    assert said == ["", "", "", "🦙", "", "!"]
    assert table.raw(256) == b"<end>"


def test_bytes_that_can_never_be_text_hold_nothing_up(tokenizer: PromptTokenizer) -> None:
    alphabet = {byte: character for character, byte in byte_level_alphabet().items()}
    table = TokenTable.of(
        {
            "decoder": {"type": "ByteLevel"},
            "model": {"vocab": {alphabet[byte]: byte for byte in range(256)}},
        }
    )
    detokenizer = Detokenizer(table)
    assert [detokenizer.push(token) for token in [0xF0, ord("a"), 0xBF, 0xBF]] == [
        "",
        f"{REPLACEMENT}a",
        REPLACEMENT,
        REPLACEMENT,
    ]


def test_sentencepiece_spells_bytes_and_spaces() -> None:
    table = TokenTable.of(
        {
            "decoder": {
                "type": "Sequence",
                "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}],
            },
            "model": {"vocab": {"▁Hi": 0, "<0xC3>": 1, "<0xA9>": 2}},
        }
    )
    detokenizer = Detokenizer(table)
    assert [detokenizer.push(token) for token in (0, 1, 2)] == [" Hi", "", "é"]


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedTokenizer, match="WordPiece"):
        TokenTable.of({"decoder": {"type": "WordPiece"}, "model": {"vocab": {"a": 0}}})
