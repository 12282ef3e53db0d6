"""Stop strings: the result must not depend on where the text was cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.engine.stopping import StopMatcher

# Few letters, so that stop strings begin, nearly end and overlap all the time.
letters = st.text(alphabet="ab é", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab é", min_size=1, max_size=5), max_size=4)


def by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """The stop string that is completed first ends the text; of several, the longest."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(borders)]


@given(letters, stop_lists, st.lists(st.integers(0, 100), max_size=8))
def test_the_cuts_do_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    said = "".join(matcher.push(piece) for piece in pieces_of(text, cuts))
    assert (said + matcher.flush(), matcher.stopped) == by_definition(text, stops)


@given(letters, stop_lists, st.lists(st.integers(0, 100), max_size=8))
def test_nothing_is_said_that_would_have_to_be_taken_back(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops)
    said = ""
    longest = max(map(len, stops), default=1)
    seen = ""
    for piece in pieces_of(text, cuts):
        seen += piece
        said += matcher.push(piece)
        assert by_definition(seen, stops)[0].startswith(said)
        # Held back is never more than what may be the beginning of a stop string.
        if not matcher.stopped:
            assert len(seen) - len(said) < longest


@given(letters, letters, stop_lists, st.lists(st.integers(0, 100), max_size=8))
def test_what_was_delivered_elsewhere_can_be_pushed_as_one_piece(
    delivered: str, rest: str, stops: list[str], cuts: list[int]
) -> None:
    undisturbed, replayed = StopMatcher(stops), StopMatcher(stops)
    said = "".join(undisturbed.push(piece) for piece in pieces_of(delivered, cuts))
    assert replayed.push(delivered) == said
    assert replayed.stopped == undisturbed.stopped
    assert [replayed.push(character) for character in rest] == [
        undisturbed.push(character) for character in rest
    ]
    assert replayed.flush() == undisturbed.flush()


def test_stop_strings_of_any_unicode() -> None:
    matcher = StopMatcher(["👩‍👩‍👧!", "\0", "\u202eend"])
    assert matcher.push("é 👩‍👩‍") == "é "
    assert matcher.push("👧?\u202e") == "👩‍👩‍👧?"
    assert matcher.push("end") == ""
    assert matcher.stopped


def test_a_border_inside_a_stop_string() -> None:
    matcher = StopMatcher(["###"])
    assert [matcher.push(piece) for piece in ("Answer: 42 #", "#", "# and more")] == ["Answer: 42 ", "", ""]
    assert matcher.stopped
    assert matcher.flush() == ""


def test_what_only_began_is_given_at_the_end() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("a ##") == "a "
    assert matcher.push("b") == "##b"
    assert matcher.push("#") == ""
    assert matcher.flush() == "#"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        StopMatcher([""])
