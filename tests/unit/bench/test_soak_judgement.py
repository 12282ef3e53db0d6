"""What a soak calls flat."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.soak_judgement import Bounds, trends
from tests.bench.soak_samples import Sample, write_csv

MINUTES = 20


def samples(memory: Callable[[float], float], descriptors: Callable[[float], float]) -> list[Sample]:
    """A value every five seconds; the functions get the share of the time that has passed."""
    count = MINUTES * 12
    return [
        Sample(
            index * 5.0,
            {
                "x rss_mib": memory(index / count),
                "x descriptors": descriptors(index / count),
                "requests": index,
            },
        )
        for index in range(count)
    ]


@pytest.mark.parametrize(
    ("memory", "flat"),
    [
        pytest.param(lambda t: 100 + 5 * math.sin(40 * t), True, id="waves"),
        pytest.param(lambda t: 100 + 200 * min(t * 5, 1), True, id="a warm-up"),
        pytest.param(lambda t: 100 + 60 * t, False, id="a leak"),
        pytest.param(lambda t: 900 + 25 * t, True, id="within the share of a large process"),
        pytest.param(lambda t: 900 + 60 * t, False, id="a leak in a large process"),
        pytest.param(lambda t: 200 + 100 * (0.60 < t < 0.62), False, id="a peak"),
    ],
)
def test_memory(memory: Callable[[float], float], flat: bool) -> None:
    (judged, descriptors) = trends(samples(memory, lambda t: 30), Bounds())
    assert judged.name == "x rss_mib"
    assert judged.flat == flat
    assert descriptors.flat


def test_descriptors() -> None:
    (memory, descriptors) = trends(samples(lambda t: 100, lambda t: 30 + 100 * t), Bounds())
    assert memory.flat
    assert not descriptors.flat
    assert descriptors.growth == pytest.approx(75, rel=0.02)


def test_the_samples_can_be_plotted(tmp_path: Path) -> None:
    write_csv(tmp_path / "soak.csv", [Sample(0, {"a": 1}), Sample(5, {"a": 2, "b": 3})])
    assert (tmp_path / "soak.csv").read_text().splitlines() == ["time_s,a,b", "0.00,1.00,", "5.00,2.00,3.00"]
