"""Text from token ids, as they come.

Works on bytes: each token stands for some bytes, and an incremental UTF-8 decoder holds back a character
that is not complete. So no piece ever holds half a character, whatever the token borders are. Bytes that can
never become a character give U+FFFD, as the tokenizer's own decoder does; what is incomplete at the very end
gives nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any


class UnsupportedTokenizer(Exception):
    """The tokenizer's decoder is of a kind that is not known here."""


class TokenTable:
    """The bytes of each token. Special tokens stand for none."""

    def __init__(self, pieces: Sequence[bytes], special: frozenset[int]) -> None:
        self._pieces = tuple(pieces)
        self.special = special
        self.longest_bytes = max(map(len, pieces), default=0)

    def __len__(self) -> int:
        return len(self._pieces)

    def raw(self, token: int) -> bytes:
        """The token's bytes, also of a special token; empty for an id without one."""
        return self._pieces[token] if token < len(self._pieces) else b""

    def text_bytes(self, token: int) -> bytes:
        """What the token adds to the text."""
        return b"" if token in self.special else self.raw(token)

    @classmethod
    def of(cls, tokenizer_json: Mapping[str, Any]) -> TokenTable:
        """From the content of a `tokenizer.json`. Raises UnsupportedTokenizer."""
        spell = _speller(tokenizer_json.get("decoder") or {})
        vocab: Mapping[str, int] = tokenizer_json["model"]["vocab"]
        added = tokenizer_json.get("added_tokens") or []
        size = 1 + max([*vocab.values(), *(token["id"] for token in added)])
        pieces = [b""] * size
        for token, index in vocab.items():
            pieces[index] = spell(token)
        for token in added:
            pieces[token["id"]] = token["content"].encode()
        return cls(pieces, frozenset(token["id"] for token in added if token["special"]))


def _speller(decoder: Mapping[str, Any]) -> Any:
    """How a vocabulary writes bytes: GPT-2's alphabet (ByteLevel), or SentencePiece's with `<0xNN>`."""
    kinds = [decoder.get("type")]
    if kinds == ["Sequence"]:
        kinds = [part.get("type") for part in decoder["decoders"]]
    if "ByteLevel" in kinds:
        alphabet = byte_level_alphabet()
        return lambda token: bytes(alphabet[character] for character in token)
    if "ByteFallback" in kinds:
        return _sentencepiece_bytes
    raise UnsupportedTokenizer(f"a tokenizer with the decoder {kinds} is not supported")


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + offset): byte for offset, byte in enumerate(others)}


class Detokenizer:
    """One choice's text."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that became complete with this token."""
        return self._decoder.decode(self._table.text_bytes(token))
