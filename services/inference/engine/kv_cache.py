"""Which page of the KV pool belongs to whom, and which hold a prefix that may come again.

A page is free, held (by one sequence or, a full page, by several that share it), or idle: full, held by none,
and kept for the next prompt that begins alike, until its place is needed (least recently used first). A full
page is named by a digest over its tokens and all that came before them, salted by tenant: nobody's prompt is
ever found by another tenant, not even by timing.

Only full pages are shared, and a full page is never written again, so nothing is copied.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from services.inference.engine.step import PAGE_TOKENS

_DIGEST_BYTES = 16


def pages_for(tokens: int) -> int:
    """How many pages hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


class OutOfPages(Exception):
    """Every page is held."""


class SequencePages:
    """One sequence's pages. `KvCache` makes and changes it."""

    def __init__(self, root: bytes) -> None:
        self.ids: list[int] = []
        """Page i holds positions i * PAGE_TOKENS and on."""
        self.cached_tokens = 0
        """How many tokens were found when it was opened."""
        self._digests = [root]
        """The root, then one for each page that is full and named."""


class KvCache:
    """The books of a pool of pages. One thread uses it; nothing in it waits."""

    def __init__(self, pages: int, *, keep_prefixes: bool = True) -> None:
        self.pages = pages
        self._keep_prefixes = keep_prefixes
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._names: list[bytes | None] = [None] * pages
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be had: free, or idle."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.pages - self.available

    def open(self, tokens: Sequence[int], tenant: str) -> SequencePages:
        """A sequence's pages, beginning with those that hold the longest known prefix of `tokens`.

        At least one token is always left to be computed: its logits are wanted.
        """
        sequence = SequencePages(_digest(b"", tenant.encode()))
        for index in range((len(tokens) - 1) // PAGE_TOKENS):
            name = _digest(sequence._digests[-1], _page_bytes(tokens, index))
            page = self._named.get(name)
            if page is None:
                break
            self._hold(page)
            sequence.ids.append(page)
            sequence._digests.append(name)
        sequence.cached_tokens = len(sequence.ids) * PAGE_TOKENS
        return sequence

    def missing(self, sequence: SequencePages, tokens: int) -> int:
        """How many more pages the sequence needs to hold `tokens` tokens."""
        return max(0, pages_for(tokens) - len(sequence.ids))

    def grow(self, sequence: SequencePages, tokens: int) -> None:
        """Gives the sequence room for `tokens` tokens. Raises OutOfPages, and then gives nothing."""
        missing = self.missing(sequence, tokens)
        if missing > self.available:
            raise OutOfPages(f"{missing} pages are needed, {self.available} can be had")
        for _ in range(missing):
            page = self._free.pop() if self._free else self._evict()
            self._holders[page] = 1
            sequence.ids.append(page)

    def commit(self, sequence: SequencePages, tokens: Sequence[int], computed: int) -> None:
        """Names the pages that `computed` of the tokens have filled, so that others can find them."""
        if not self._keep_prefixes:
            return
        for index in range(len(sequence._digests) - 1, computed // PAGE_TOKENS):
            name = _digest(sequence._digests[-1], _page_bytes(tokens, index))
            sequence._digests.append(name)
            page = sequence.ids[index]
            # Where two computed the same at the same time, the first is found and the other stays nameless.
            if name not in self._named:
                self._named[name] = page
                self._names[page] = name

    def close(self, sequence: SequencePages) -> None:
        """The sequence lets go of its pages. The end of a prefix goes before its beginning."""
        for page in reversed(sequence.ids):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._names[page] is None:
                self._free.append(page)
            else:
                self._idle[page] = None
        sequence.ids.clear()

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._holders[page] += 1

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        name = self._names[page]
        if name is not None:
            del self._named[name]
        self._names[page] = None
        return page


def _page_bytes(tokens: Sequence[int], index: int) -> bytes:
    page = tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
    return np.array(page, dtype=np.uint32).tobytes()


def _digest(before: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(before + content, digest_size=_DIGEST_BYTES).digest()
