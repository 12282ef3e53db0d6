"""What a step of so many tokens takes, learnt from the steps that were run.

A straight line, seconds = base + per_token * tokens, fitted by least squares in which older steps count less
and less. It bounds how much of a prompt may be computed beside others' decoding, and tells which requests
cannot meet their deadline any more.
"""

from __future__ import annotations

_DECAY = 0.97
_MIN_PER_TOKEN_S = 1e-7
_MIN_SPREAD = 1e-3
"""Steps of all but equal size say nothing of the slope: the last one that was known is kept."""


class StepCost:
    """The fit. The parameters are the first guess, for a machine that nothing is known of."""

    def __init__(self, base_s: float = 0.005, per_token_s: float = 0.001) -> None:
        self._base_s = base_s
        self._per_token_s = per_token_s
        # Weighted sums over the steps: 1, x = tokens, xx, y = seconds, xy.
        self._n = self._x = self._xx = self._y = self._xy = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` tokens took `seconds`."""
        self._n = self._n * _DECAY + 1
        self._x = self._x * _DECAY + tokens
        self._xx = self._xx * _DECAY + tokens * tokens
        self._y = self._y * _DECAY + seconds
        self._xy = self._xy * _DECAY + tokens * seconds
        spread = self._n * self._xx - self._x * self._x
        if spread > _MIN_SPREAD * self._n * self._xx:
            slope = (self._n * self._xy - self._x * self._y) / spread
            self._per_token_s = max(slope, _MIN_PER_TOKEN_S)
        self._base_s = max(0.0, (self._y - self._per_token_s * self._x) / self._n)

    def seconds(self, tokens: int) -> float:
        """The estimate for one step."""
        return self._base_s + self._per_token_s * tokens

    def tokens_within(self, seconds: float) -> int:
        """How many tokens a step of `seconds` has; 0 where not even an empty one is that quick."""
        return max(0, int((seconds - self._base_s) / self._per_token_s))
