"""What the rounds say: medians of ratios with their spread, and whether the aims are met."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """A median between the least and the greatest, or between the quartiles."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def quartiles(cls, values: Sequence[float]) -> Spread:
        """Of three values or fewer: between the least and the greatest."""
        if len(values) < 4:
            return cls.of(values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.least)}..{_short(self.greatest)})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Of each round by itself: what slows a whole round down cancels out."""
    return Spread.of([above / below for above, below in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True, slots=True)
class Aim:
    """A measured figure beside what it should be."""

    name: str
    measured: Spread
    target: float
    at_most: bool = False
    """Whether less is better."""

    @property
    def met(self) -> bool:
        if self.at_most:
            return self.measured.median <= self.target
        return self.measured.median >= self.target

    def line(self) -> str:
        """`aim <name> <measured> <target> met|short`."""
        return (
            f"aim {self.name} {_short(self.measured.median)} {_short(self.target)}"
            f" {'met' if self.met else 'short'}"
        )


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def rounds_from(text: str) -> int:
    """How many rounds an argument of the command line asks for. Raises ArgumentTypeError: of none there is
    nothing to say."""
    rounds = int(text)
    if rounds < 1:
        raise argparse.ArgumentTypeError(f"at least one round, not {rounds}")
    return rounds
