"""Prompt lookup: what comes next is guessed to be what came next before, after the same few tokens.

Answers that quote (extraction, summaries, code that is changed a little) repeat long stretches of their
prompt. A guess is computed beside the token that is due, in the same step, and kept as far as the sampler
draws the same tokens: so nothing but the time is changed by it. See Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTHS = (3, 2)
"""Of what must have occurred before; the longer says more."""
_MEMORY = 0.7
"""Weight of what was known of the worth of guesses, against the last one."""
_WORTH = 0.7
"""Guesses that bring fewer tokens on average do not pay: a step of several tokens takes longer."""
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256
"""Tokens without a guess after guesses have failed."""


class PromptLookup:
    """One sequence's. Memory is bounded by the sequence's length."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        """Where it went on after these tokens, the last time."""
        self._indexed = 0
        self._worth = 2 * _WORTH
        self._resume = 0
        self._pause = _FIRST_PAUSE

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """What may follow `tokens`, `most` of it; mostly nothing. `tokens` only grow from call to call."""
        if len(tokens) < self._resume or most <= 0:
            return ()
        for end in range(max(self._indexed, _LENGTHS[-1]), len(tokens)):
            for length in _LENGTHS:
                if end >= length:
                    self._after[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
        for length in _LENGTHS:
            place = self._after.get(tuple(tokens[-length:]))
            if place is not None:
                # Where it is cut short by the end, it repeats itself.
                period = len(tokens) - place
                return tuple(tokens[place + number % period] for number in range(most))
        return ()

    def learn(self, tokens: int, kept: int) -> None:
        """`kept` tokens of a guess were right, and the sequence has `tokens` now.

        Guessing pauses where it does not pay.
        """
        self._worth = _MEMORY * self._worth + (1 - _MEMORY) * kept
        if self._worth >= _WORTH:
            self._pause = _FIRST_PAUSE
            return
        self._resume = tokens + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._worth = _WORTH  # One more try, then.
