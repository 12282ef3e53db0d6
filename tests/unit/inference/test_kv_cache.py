"""The books of the KV pool: who holds which page, and which prefixes are found again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from services.inference.engine.kv_cache import KvCache, OutOfPages, SequencePages, pages_for
from services.inference.engine.step import PAGE_TOKENS


def run(cache: KvCache, tokens: list[int], tenant: str = "t") -> SequencePages:
    """A sequence whose tokens have all been computed."""
    sequence = cache.open(tokens, tenant)
    cache.grow(sequence, len(tokens))
    cache.commit(sequence, tokens, len(tokens))
    return sequence


def test_a_prefix_is_found_to_its_last_full_page() -> None:
    cache = KvCache(32)
    prompt = list(range(5 * PAGE_TOKENS + 3))
    first = run(cache, prompt)
    again = cache.open([*prompt[:-1], 999], "t")
    assert again.cached_tokens == 5 * PAGE_TOKENS
    assert again.ids == first.ids[:5]
    other = cache.open([*prompt[: 2 * PAGE_TOKENS], 999, *prompt[2 * PAGE_TOKENS + 1 :]], "t")
    assert other.ids == first.ids[:2]


def test_one_token_is_always_left_to_compute() -> None:
    cache = KvCache(8)
    prompt = list(range(2 * PAGE_TOKENS))
    run(cache, prompt)
    assert cache.open(prompt, "t").cached_tokens == PAGE_TOKENS


def test_r20_no_prefix_is_found_across_tenants() -> None:
    cache = KvCache(16)
    prompt = list(range(3 * PAGE_TOKENS + 1))
    run(cache, prompt, "one")
    assert cache.open(prompt, "two").cached_tokens == 0
    assert cache.open(prompt, "").cached_tokens == 0
    assert cache.open(prompt, "one").cached_tokens == 3 * PAGE_TOKENS


def test_a_page_that_is_not_full_is_never_shared() -> None:
    cache = KvCache(8)
    prompt = list(range(PAGE_TOKENS + 5))
    sequence = cache.open(prompt, "t")
    cache.grow(sequence, len(prompt))
    cache.commit(sequence, prompt, PAGE_TOKENS - 1)
    assert cache.open(prompt, "t").cached_tokens == 0
    cache.commit(sequence, prompt, len(prompt))
    assert cache.open(prompt, "t").cached_tokens == PAGE_TOKENS


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    cache = KvCache(6)
    old, new = [1] * (2 * PAGE_TOKENS + 1), [2] * (2 * PAGE_TOKENS + 1)
    for prompt in (old, new):
        cache.close(run(cache, prompt))
    assert cache.available == 6
    cache.close(run(cache, [3] * (2 * PAGE_TOKENS + 1)))
    assert cache.open(new, "t").cached_tokens == 2 * PAGE_TOKENS
    assert cache.open(old, "t").cached_tokens == PAGE_TOKENS


def test_what_cannot_be_had_changes_nothing() -> None:
    cache = KvCache(2)
    held = run(cache, [1] * PAGE_TOKENS)
    sequence = cache.open([2], "t")
    with pytest.raises(OutOfPages, match="2 pages are needed, 1 can be had"):
        cache.grow(sequence, 2 * PAGE_TOKENS)
    assert not sequence.ids
    cache.close(held)
    cache.grow(sequence, 2 * PAGE_TOKENS)
    assert len(sequence.ids) == 2


def test_without_keeping_prefixes_nothing_is_found() -> None:
    cache = KvCache(8, keep_prefixes=False)
    cache.close(run(cache, [1] * 40))
    assert cache.open([1] * 40, "t").cached_tokens == 0
    assert cache.available == 8


@settings(max_examples=50)
@given(st.integers(0, 200))
def test_pages_hold_their_tokens(tokens: int) -> None:
    assert pages_for(tokens) * PAGE_TOKENS >= tokens > (pages_for(tokens) - 1) * PAGE_TOKENS


class Books(RuleBasedStateMachine):
    """Any order of opening, growing, committing and closing keeps the books."""

    PAGES = 12
    sequences: Bundle[tuple[SequencePages, list[int]]] = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.cache = KvCache(self.PAGES)
        self.open: list[tuple[SequencePages, list[int]]] = []

    # Few tokens and tenants, so that prefixes meet.
    @rule(
        target=sequences,
        start=st.integers(0, 2),
        length=st.integers(1, 5 * PAGE_TOKENS),
        tenant=st.sampled_from("ab"),
    )
    def begin(self, start: int, length: int, tenant: str) -> object:
        tokens = [start] * length
        sequence = self.cache.open(tokens, tenant)
        assert sequence.cached_tokens < length
        if self.cache.missing(sequence, length) > self.cache.available:
            self.cache.close(sequence)
            return multiple()
        self.cache.grow(sequence, length)
        self.open.append((sequence, tokens))
        return self.open[-1]

    @rule(each=sequences, share=st.floats(0, 1))
    def compute(self, each: tuple[SequencePages, list[int]], share: float) -> None:
        sequence, tokens = each
        self.cache.commit(sequence, tokens, max(sequence.cached_tokens, int(share * len(tokens))))

    @rule(each=consumes(sequences))
    def finish(self, each: tuple[SequencePages, list[int]]) -> None:
        self.cache.close(each[0])
        self.open = [other for other in self.open if other is not each]

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = {page for sequence, _ in self.open for page in sequence.ids}
        assert len(held) == self.cache.held
        assert held <= set(range(self.PAGES))
        for sequence, tokens in self.open:
            assert len(sequence.ids) == pages_for(len(tokens))
            assert len(set(sequence.ids)) == len(sequence.ids)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
