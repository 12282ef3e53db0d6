"""Do these counts come from those probabilities? Pearson's test, with no library for statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

ALARM = 1e-9
"""Below this p-value a sample does not come from the distribution: a false alarm in a thousand million."""
LEAST_EXPECTED = 8.0
"""The rarest outcomes are put together until they are expected so often: the test's own condition."""


def p_value(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """How likely counts as odd as these are. 0 where something came that cannot."""
    draws = sum(counts)
    if any(count and not share for count, share in zip(counts, probabilities, strict=True)):
        return 0.0
    bins: list[tuple[float, int]] = []
    expected, seen = 0.0, 0
    for share, count in sorted(zip(probabilities, counts, strict=True)):
        expected += share * draws
        seen += count
        if expected >= LEAST_EXPECTED:
            bins.append((expected, seen))
            expected, seen = 0.0, 0
    if not bins:
        raise ValueError("too few draws to tell anything")
    bins[-1] = (bins[-1][0] + expected, bins[-1][1] + seen)
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in bins)
    return survival(statistic, len(bins) - 1)


def survival(statistic: float, freedom: int) -> float:
    """The probability that chi-square with so many degrees of freedom exceeds the statistic.

    The regularised upper incomplete gamma function Q(freedom / 2, statistic / 2): its recurrence
    Q(a + 1, x) = Q(a, x) + x^a e^-x / gamma(a + 1), from Q(1/2, x) = erfc(sqrt x) or Q(1, x) = e^-x.
    """
    if freedom == 0:
        return 1.0
    x = statistic / 2
    if x == 0:
        return 1.0
    a = 0.5 if freedom % 2 else 1.0
    result = math.erfc(math.sqrt(x)) if freedom % 2 else math.exp(-x)
    while a < freedom / 2:
        result += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return min(result, 1.0)
