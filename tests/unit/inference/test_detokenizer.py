"""Text from tokens: any Unicode, whole characters only, the same text as the tokenizer's own decoder."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from services.inference.engine.detokenizer import (
    Detokenizer,
    TokenTable,
    UnsupportedTokenizer,
    byte_level_alphabet,
)

REPLACEMENT = "\ufffd"
VOCAB_TOKENS = 49_152
ALPHABET = {byte: character for character, byte in byte_level_alphabet().items()}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁▁▁", "▁Hi", "x▁y", "a", "B", ".", "é", "日本", "🦙", "👩‍👩‍👧", "<0x4g>", "e\u0301"]
ADDED = [("<s>", True), ("</s>", True), ("<tool▁call>", False), ("two words", False), (" lead", False)]

with_spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
without_first_space = [*with_spaces, decoders.Strip(content=" ", left=1)]
SENTENCEPIECE = {
    "gemma": decoders.Sequence(with_spaces),
    "llama and mistral": decoders.Sequence(without_first_space),
    "two spaces": decoders.Sequence([*with_spaces, decoders.Strip(content=" ", left=2)]),
    "from GGUF": decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace("▁", " "),
            decoders.Strip(content=" ", left=1),
        ]
    ),
    "metaspace": decoders.Metaspace(replacement="▁", prepend_scheme="always"),
    "metaspace, first": decoders.Metaspace(replacement="▁", prepend_scheme="first"),
    "metaspace, never": decoders.Metaspace(replacement="▁", prepend_scheme="never"),
    "metaspace with bytes": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
}


def small_tokenizer(pieces: list[str], decoder: Any) -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoder
    for content, special in ADDED:
        token = AddedToken(content, normalized=False, special=special)
        tokenizer.add_special_tokens([token]) if special else tokenizer.add_tokens([token])
    return tokenizer


def table_of(tokenizer: Tokenizer) -> TokenTable:
    return TokenTable.of(json.loads(tokenizer.to_str()))


def pieces(table: TokenTable, ids: list[int], **options: bool) -> list[str]:
    """What comes with each token, and what comes at the end."""
    detokenizer = Detokenizer(table, **options)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.fixture(scope="module")
def own_decoder(smollm2: Path) -> Tokenizer:
    """The tokenizer of the `tokenizers` library, as the judge."""
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


@pytest.fixture(scope="module")
def table(smollm2: Path) -> TokenTable:
    return TokenTable.of(json.loads((smollm2 / "tokenizer.json").read_bytes()))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_every_text_comes_back_in_whole_characters(
    table: TokenTable, own_decoder: Tokenizer, text: str
) -> None:
    ids = own_decoder.encode(text, add_special_tokens=False).ids
    # The vocabulary lacks a few bytes, and a text may spell a special token: those do not come back.
    assume(own_decoder.decode(ids, skip_special_tokens=True) == text)
    said = pieces(table, ids)
    assert "".join(said) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in said)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, VOCAB_TOKENS - 1), max_size=40))
def test_any_tokens_give_what_the_tokenizers_decoder_gives(
    table: TokenTable, own_decoder: Tokenizer, ids: list[int]
) -> None:
    assert "".join(pieces(table, ids)) == own_decoder.decode(ids, skip_special_tokens=True)


SENTENCEPIECE_TOKENIZERS = {
    kind: small_tokenizer([*BYTES, *WORDS], decoder) for kind, decoder in SENTENCEPIECE.items()
}
SENTENCEPIECE_TABLES = {kind: table_of(tokenizer) for kind, tokenizer in SENTENCEPIECE_TOKENIZERS.items()}

# Every byte, so that most sequences are not UTF-8; a vocabulary's ordinary pieces; added tokens, one of them
# spelled with the alphabet by accident.
BYTE_LEVEL = small_tokenizer([*ALPHABET.values(), "Ġthe", "ĠðŁ", "日本"], decoders.ByteLevel())
BYTE_LEVEL.add_tokens([AddedToken("café", normalized=False)])
BYTE_LEVEL_TABLE = table_of(BYTE_LEVEL)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=12))
def test_byte_level_bytes_cut_anywhere(ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL_TABLE, ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


PLAIN = len(BYTES) + WORDS.index("a")
# A character in bytes is one element of a sequence, so that runs of bytes are UTF-8.
PLAIN_TOKENS = st.one_of(
    st.integers(256, 255 + len(WORDS) + len(ADDED)).map(lambda token: [token]),
    st.characters(codec="utf-8").map(lambda character: list(character.encode())),
)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
@settings(max_examples=80, deadline=None)
@given(parts=st.lists(PLAIN_TOKENS, max_size=8))
@example(parts=[list("▁".encode())])
@example(parts=[[PLAIN], list("▁".encode()), [PLAIN]])
def test_sentencepiece_text_is_what_its_decoder_gives(kind: str, parts: list[list[int]]) -> None:
    tokenizer = SENTENCEPIECE_TOKENIZERS[kind]
    ids = [token for part in parts for token in part]
    if kind.startswith("metaspace"):
        # It takes the spaces of an added token, and of a byte, at the very beginning for what they are;
        # nobody has one. A special token before it is no beginning.
        heard = [token for token in ids if token not in SENTENCEPIECE_TABLES[kind].special]
        assume(not tokenizer.decode(heard[:1]).startswith((" lead", "two")))
        assume(heard[:1] != [ord(" ")])
        # Nor does anybody spell in bytes the character that stands for a space, there.
        run = bytes(takewhile(lambda token: token < len(BYTES), heard))
        assume("▁".encode() not in run)
    said = "".join(pieces(SENTENCEPIECE_TABLES[kind], ids))
    assert said == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255 + len(WORDS)), max_size=10))
def test_of_bytes_that_are_not_utf8_only_the_bad_ones_are_lost(ids: list[int]) -> None:
    tokenizer, table = SENTENCEPIECE_TOKENIZERS["gemma"], SENTENCEPIECE_TABLES["gemma"]
    said = "".join(pieces(table, ids))
    theirs = tokenizer.decode(ids)
    good = b"".join(map(table.raw, ids)).decode(errors="ignore")
    assert said.replace(REPLACEMENT, "") == good
    if REPLACEMENT in said:
        assert REPLACEMENT in theirs
    else:
        assert said == theirs
    # A run without a good character: one for each byte, as theirs.
    assert "".join(pieces(table, [0xE4, 0xBD, 261])) == "��a" == tokenizer.decode([0xE4, 0xBD, 261])


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_the_tokenizers_that_transformers_builds(name: str) -> None:
    from transformers import GemmaTokenizer, LlamaTokenizer

    vocab = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", "<pad>", *BYTES, *WORDS])}
    kind = {"llama": LlamaTokenizer, "gemma": GemmaTokenizer}[name]
    tokenizer = kind(vocab=vocab, merges=[])
    table = table_of(tokenizer.backend_tokenizer)
    hi, space, smile = vocab["▁Hi"], vocab["▁"], [vocab[f"<0x{byte:02X}>"] for byte in "🙂".encode()]
    for ids in ([hi, hi], [space, hi], [1, hi, *smile, 2], [*smile, hi], [hi, *smile[:2]], [space, space]):
        said = "".join(pieces(table, ids))
        assert said == tokenizer.decode(ids, skip_special_tokens=True), ids
    assert "".join(pieces(table, [hi, hi])) == ("Hi Hi" if name == "llama" else " Hi Hi")


def test_a_text_that_continues_a_prompt_keeps_its_first_space() -> None:
    for kind in ("llama and mistral", "metaspace"):
        table = SENTENCEPIECE_TABLES[kind]
        ids = [SENTENCEPIECE_TOKENIZERS[kind].token_to_id("▁Hi")] * 2
        assert "".join(pieces(table, ids)) == "Hi Hi"
        assert "".join(pieces(table, ids, continues=True)) == " Hi Hi"


def test_a_character_of_several_tokens_comes_with_its_last() -> None:
    table = BYTE_LEVEL_TABLE
    special = BYTE_LEVEL.token_to_id("<s>")
    detokenizer = Detokenizer(table)
    byte = [BYTE_LEVEL.token_to_id(ALPHABET[byte]) for byte in "🦙!".encode()]
    said = [detokenizer.push(token) for token in [*byte[:4], special, byte[4]]]
    assert said == ["", "", "", "🦙", "", "!"]
    assert table.raw(special) == b"<s>"


def test_bytes_that_can_never_be_text_hold_nothing_up_and_come_at_the_end() -> None:
    byte = [BYTE_LEVEL.token_to_id(ALPHABET[byte]) for byte in (0xF0, ord("a"), 0xBF, 0xF0, 0x9F)]
    assert pieces(BYTE_LEVEL_TABLE, byte) == ["", f"{REPLACEMENT}a", REPLACEMENT, "", "", REPLACEMENT]


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece"},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        {"type": "Replace", "pattern": {"Regex": "_+"}, "content": " "},
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},  # Of each token: nothing is fused.
            ],
        },
        None,
    ],
)
def test_a_decoder_that_is_not_understood_is_refused(decoder: Any) -> None:
    with pytest.raises(UnsupportedTokenizer, match="not supported"):
        TokenTable.of({"decoder": decoder, "model": {"vocab": {"a": 0}}})


def test_a_unigram_vocabulary_is_a_list() -> None:
    table = TokenTable.of(
        {
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
            "model": {"vocab": [["<unk>", 0.0], ["▁Hi", -1.0]]},
        }
    )
    assert (len(table), table.raw(1)) == (2, b" Hi")
