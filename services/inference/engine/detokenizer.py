"""Text from token ids, as they come: the text that the tokenizer's own decoder gives for all of them.

Works on bytes: each token stands for some bytes, and an incremental UTF-8 decoder holds back a character
that is not complete. So no piece ever holds half a character, whatever the token borders are, and special
tokens give nothing. Bytes that can never become a character give U+FFFD.

Two families of vocabularies are known. GPT-2's (ByteLevel) spells every byte with a printable character.
SentencePiece's writes a space as U+2581, and bytes that it has no piece for as `<0xNN>`; some of its
decoders drop the space at the very beginning, which the tokenizer had put there. One difference is meant:
of a run of `<0xNN>` that is not UTF-8 the tokenizers library gives up the good characters too; here, where
they have been sent by then, only the bad bytes.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\ufffd"
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_EACH_BYTE = "llmos-each-byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class UnsupportedTokenizer(Exception):
    """The tokenizer's decoder is of a kind that is not known here."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a decoder reads a vocabulary."""

    to_bytes: Callable[[str], bytes]
    """Of a token."""
    errors: str = "replace"
    """U+FFFD for each sequence that is cut short, or for each of its bytes; a name that codecs knows."""
    first_spaces: int = 0
    """So many spaces are dropped from the beginning of a text."""
    first_token_spaces: bool = False
    """Whether all spaces are dropped from the first token."""
    spaces: frozenset[str] = frozenset()
    """Characters that are spaces also where bytes spell them: the decoder joins bytes before it looks."""


class TokenTable:
    """The bytes of each token. Special tokens stand for none in a text."""

    def __init__(self, pieces: Sequence[bytes], special: frozenset[int], spelling: Spelling) -> None:
        self._pieces = tuple(pieces)
        self.special = special
        self.spelling = spelling
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
        spelling = _spelling(tokenizer_json.get("decoder") or {})
        vocab = _vocabulary(tokenizer_json["model"])
        added = tokenizer_json.get("added_tokens") or []
        # The decoder reads added tokens like any other.
        vocab.update((token["content"], token["id"]) for token in added)
        pieces = [b""] * (1 + max(vocab.values()))
        for token, index in vocab.items():
            pieces[index] = spelling.to_bytes(token)
        return cls(pieces, frozenset(token["id"] for token in added if token["special"]), spelling)


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pairs of piece and score.
        return {piece: index for index, (piece, _) in enumerate(vocab)}
    return dict(vocab)


def _spelling(decoder: Mapping[str, Any]) -> Spelling:
    """Understands what transformers writes for the models it knows, and refuses the rest."""
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    unsupported = UnsupportedTokenizer(f"a tokenizer with the decoder {kinds} is not supported")
    byte_level = byte_fallback = fused = first_token_spaces = False
    spaces: set[str] = set()
    after_bytes: set[str] = set()
    first_spaces = 0
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(space)}, "content": " "} if len(space) == 1:
                spaces.add(space)
                after_bytes.update([space] if byte_fallback else [])
            case {"type": "Metaspace", "replacement": str(space)}:
                spaces.add(space)
                after_bytes.update([space] if byte_fallback else [])
                first_token_spaces = step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused or byte_level:
                first_spaces = start
            case _:
                raise unsupported
    if byte_level and not spaces - {_SPACE}:
        return Spelling(_byte_level_bytes, first_spaces=first_spaces)
    if not spaces:
        raise unsupported

    def to_bytes(token: str) -> bytes:
        if byte_fallback and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for space in spaces:
            token = token.replace(space, " ")
        return token.encode()

    return Spelling(to_bytes, _EACH_BYTE, first_spaces, first_token_spaces, frozenset(after_bytes))


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + offset): byte for offset, byte in enumerate(others)}


_ALPHABET = byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()  # An added token that is not spelled with the alphabet stands for itself.


class Detokenizer:
    """One choice's text.

    With `continues`, the text goes on where a raw prompt ends: the space at its beginning is a real one.
    """

    def __init__(self, table: TokenTable, *, continues: bool = False) -> None:
        self._table = table
        spelling = table.spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors=spelling.errors)
        self._drop_spaces = 0 if continues else spelling.first_spaces
        self._drop_in_token = not continues and spelling.first_token_spaces

    def push(self, token: int) -> str:
        """The text that became complete with this token."""
        piece = self._table.text_bytes(token)
        if self._drop_in_token and piece:
            self._drop_in_token = False
            piece = piece.replace(b" ", b"")
        return self._said(self._decoder.decode(piece))

    def flush(self) -> str:
        """The text ends here: what is still incomplete will never be a character."""
        return self._said(self._decoder.decode(b"", final=True))

    def _said(self, text: str) -> str:
        for space in self._table.spelling.spaces:
            text = text.replace(space, " ")
        if not (self._drop_spaces and text):
            return text
        rest = text.lstrip(" ")
        dropped = min(len(text) - len(rest), self._drop_spaces)
        # Only as long as nothing else has come.
        self._drop_spaces = 0 if rest else self._drop_spaces - dropped
        return text[dropped:]
