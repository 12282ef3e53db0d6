"""The input of a batch, line by line, however it comes in pieces."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.batches.lines import InputError, Line, RawLine, read, split

ENDPOINT = "/v1/completions"
texts = st.text(max_size=20).filter(lambda text: "\n" not in text and "\r" not in text)
lines = st.lists(st.one_of(texts, st.just(""), st.just("x" * 60)), max_size=12)
cuts = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def pieces(content: bytes, sizes: list[int]) -> list[bytes]:
    """Cut at these sizes, over and over."""
    found, at, turn = [], 0, 0
    while at < len(content):
        size = sizes[turn % len(sizes)]
        found.append(content[at : at + size])
        at, turn = at + size, turn + 1
    return found


async def come(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def all_of(content: bytes, sizes: list[int], number: int = 0, offset: int = 0) -> list[RawLine]:
    parts = pieces(content[offset:], sizes)
    return [raw async for raw in split(come(parts), number=number, offset=offset, max_line_bytes=50)]


@given(lines, cuts, st.sampled_from(["\n", "\r\n"]), st.booleans())
async def test_lines_are_the_same_however_they_are_cut(
    given_lines: list[str], sizes: list[int], end: str, ends: bool
) -> None:
    content = end.join(given_lines).encode("utf-8", "surrogatepass") + (end.encode() if ends else b"")
    found = await all_of(content, sizes)
    expected = [
        (number, None if len(raw) > 50 else raw)
        for number, raw in enumerate(content.split(b"\n"), 1)
        if raw.strip() and (number > 1 or raw.removeprefix(b"\xef\xbb\xbf").strip())
    ]
    assert [raw.number for raw in found] == [number for number, _ in expected]
    for raw, (number, content_of) in zip(found, expected, strict=True):
        if content_of is not None and number == 1:
            content_of = content_of.removeprefix(b"\xef\xbb\xbf")
        assert raw.content == content_of
    # From any line on, it goes on as from the beginning.
    for index, raw in enumerate(found):
        assert await all_of(content, sizes, raw.number, raw.next_offset) == found[index + 1 :]


@given(st.binary(max_size=200))
async def test_whatever_a_line_holds_it_is_a_request_or_an_error(content: bytes) -> None:
    found = read(RawLine(3, content, 0), ENDPOINT)
    assert found.number == 3 if isinstance(found, Line) else found.line == 3
    if isinstance(found, InputError):
        assert found.code
        assert found.message


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "custom_id": st.one_of(st.text(), st.none(), st.integers()),
            "method": st.sampled_from(["POST", "GET", None]),
            "url": st.sampled_from([ENDPOINT, "/v1/other", 1]),
            "body": st.one_of(st.none(), st.dictionaries(st.text(), st.integers())),
            "other": st.none(),
        },
    )
)
async def test_only_a_whole_request_is_one(fields: dict[str, object]) -> None:
    raw = RawLine(1, json.dumps(fields).encode(), 0)
    found = read(raw, ENDPOINT)
    whole = (
        fields.keys() == {"custom_id", "method", "url", "body"}
        and isinstance(fields["custom_id"], str)
        and 1 <= len(fields["custom_id"]) <= 512
        and (fields["method"], fields["url"]) == ("POST", ENDPOINT)
    )
    assert isinstance(found, Line) == whole, found


def test_a_line_that_is_too_long() -> None:
    found = read(RawLine(7, None, 0), ENDPOINT)
    assert isinstance(found, InputError)
    assert (found.line, found.code) == (7, "line_too_long")
