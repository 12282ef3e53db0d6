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
        self._watches = [_Watch(stop) for stop in stops]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Takes the next piece; returns what is safe to emit. After `stopped`, nothing more.

        What was delivered elsewhere can be pushed as one piece: the state is the same.
        """
        if self.stopped:
            return ""
        buffer = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            completed = [len(watch.stop) for watch in self._watches if watch.take(character)]
            if completed:
                self.stopped = True
                self._held = ""
                return buffer[: end - max(completed)]
        safe = len(buffer) - max((watch.matched for watch in self._watches), default=0)
        self._held = buffer[safe:]
        return buffer[:safe]

    def flush(self) -> str:
        """The text ends without a stop string: returns what was held back."""
        held, self._held = self._held, ""
        return held


class _Watch:
    """One stop string against the text, a character at a time (Knuth, Morris and Pratt).

    Its cost does not depend on what the strings are: the caller chooses them, and the model their text.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """How much of the stop string the text ends with."""
        self._shorter = [0] * (len(stop) + 1)
        """By length of a beginning of the stop string: the next shorter beginning that it ends with."""
        shorter = 0
        for length in range(2, len(stop) + 1):
            shorter = self._longer(shorter, stop[length - 1])
            self._shorter[length] = shorter

    def take(self, character: str) -> bool:
        """Whether the stop string is complete."""
        self.matched = self._longer(self.matched, character)
        return self.matched == len(self.stop)

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.stop[matched] == character)
