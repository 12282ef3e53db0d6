"""Stop strings, found in a text that comes in pieces.

The result does not depend on where the pieces are cut: the stop string that is *completed* first ends the
text (of several completed by the same character, the longest). Text that may be the beginning of a stop
string is held back, so at most one stop string's length less one character is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches one choice's text."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string is not empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Takes the next piece; returns what is safe to emit. After `stopped`, nothing more."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        buffer = self._held + text
        cut = self._first_stop(buffer)
        if cut is not None:
            self.stopped = True
            self._held = ""
            return buffer[:cut]
        keep = self._possible_beginning(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """The text ends without a stop string: returns what was held back."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, buffer: str) -> int | None:
        """Where the stop string begins that is completed first."""
        found = [(start + len(stop), start) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible_beginning(self, buffer: str) -> int:
        """The length of the longest end of `buffer` with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest
