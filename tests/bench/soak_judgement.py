"""Whether a soak left anything: a straight line through each process's memory, and its greatest value."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.soak_samples import Sample

MEMORY = " rss_mib"
DESCRIPTORS = " descriptors"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What counts as flat, after the warm-up."""

    warm_up: float = 0.25
    """The share of the time that is not judged."""
    growth_mib: float = 8.0
    """How much the line may rise from the warm-up to the end: this, or …"""
    growth_share: float = 0.03
    """… this share of the median, whichever is more."""
    peak: float = 1.15
    """How far above its median (and `growth_mib`) a process may ever be."""
    descriptors: float = 16.0
    """How much the line of open descriptors may rise."""


@dataclass(frozen=True, slots=True)
class Trend:
    """One process, after the warm-up."""

    name: str
    first: float
    median: float
    greatest: float
    growth: float
    """What the line rises over the whole window."""
    flat: bool


def trends(samples: Sequence[Sample], bounds: Bounds) -> list[Trend]:
    """Memory in MiB, then descriptors, of each process that has been there all the time."""
    last_s = samples[-1].time_s
    window = [sample for sample in samples if sample.time_s >= bounds.warm_up * last_s]
    found: list[Trend] = []
    for suffix in (MEMORY, DESCRIPTORS):
        names = [name for name in window[-1].values if name.endswith(suffix)]
        there = [name for name in names if all(name in sample.values for sample in window)]
        found += [_trend(name, window, bounds) for name in there]
    return found


def _trend(name: str, window: Sequence[Sample], bounds: Bounds) -> Trend:
    times = [sample.time_s for sample in window]
    values = [sample.values[name] for sample in window]
    median, greatest = statistics.median(values), max(values)
    slope = statistics.linear_regression(times, values).slope if len(set(times)) > 1 else 0.0
    growth = slope * (times[-1] - times[0])
    if name.endswith(MEMORY):
        allowed = max(bounds.growth_mib, bounds.growth_share * median)
        flat = growth <= allowed and greatest <= max(bounds.peak * median, median + bounds.growth_mib)
    else:
        flat = growth <= bounds.descriptors
    return Trend(name, values[0], median, greatest, growth, flat)
